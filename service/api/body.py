"""A request's body within its bounds: bytes are counted while they stream, and the whole must come in time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager

from starlette.requests import Request

from service.errors import BodyTimeout, BodyTooLarge


class Body:
    """The body of one request; `size` counts the bytes that came. Reading more than `limit` raises BodyTooLarge."""

    def __init__(self, request: Request, limit: int) -> None:
        self._request = request
        self._limit = limit
        self.size = 0
        declared = request.headers.get("content-length", "")
        if declared.isascii() and declared.isdigit():
            self._check(int(declared[:18]))

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The body as it arrives. Raises Starlette's ClientDisconnect when the client leaves before its end."""
        async with aclosing(self._request.stream()) as stream:
            async for chunk in stream:
                self.size += len(chunk)
                self._check(self.size)
                yield chunk

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
