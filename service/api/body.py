"""A request's body within its bounds: bytes are counted while they stream, and the whole must come in time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager

from starlette.requests import Request

from service.errors import BodyTimeout, BodyTooLarge, QueueFull

ARRIVING_RETRY_S = 1.0


class Arrivals:
    """The bytes of all bodies that are being read; those of accepted requests are the queue's to count."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.size = 0

    def add(self, size: int) -> None:
        """Raises QueueFull where there is no room for so many more."""
        self.size += size
        if self.size > self._limit:
            detail = f"The bodies that are arriving now have more than {self._limit} bytes together."
            raise QueueFull(detail, retry_after=ARRIVING_RETRY_S)


class Body:
    """The body of one request; `size` counts the bytes that came. Reading more than `limit` raises BodyTooLarge."""

    def __init__(self, request: Request, limit: int, arrivals: Arrivals) -> None:
        self._request = request
        self._limit = limit
        self._arrivals = arrivals
        self.size = 0
        declared = request.headers.get("content-length", "")
        if declared.isascii() and declared.isdigit():
            self._check(int(declared[:18]))

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The body as it arrives. Raises Starlette's ClientDisconnect when the client leaves before its end."""
        async with aclosing(self._request.stream()) as stream:
            async for chunk in stream:
                self.size += len(chunk)
                self._arrivals.add(len(chunk))
                self._check(self.size)
                yield chunk

    def forget(self) -> None:
        """The body arrives no more: it is accepted or given up."""
        self._arrivals.size -= self.size

    async def read(self) -> bytes:
        """The whole body."""
        async with aclosing(self.chunks()) as chunks:
            return b"".join([chunk async for chunk in chunks])

    def _check(self, size: int) -> None:
        if size > self._limit:
            raise BodyTooLarge(f"The body has more than the {self._limit} bytes that one request may bring.")


@asynccontextmanager
async def arriving_within(seconds: float) -> AsyncIterator[None]:
    """Raises BodyTimeout when what is done inside takes longer."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise BodyTimeout(f"The body did not arrive within {seconds:g} seconds.") from None
