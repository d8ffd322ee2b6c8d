"""Answers that nobody has read yet: their bytes are counted and bounded, and each is sent in slices.

uvicorn hands a whole chunk to the transport at once, whatever its size, and waits only before the next one. With slices
an answer waits for its reader, and the connection can demand that each of them is read within a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import AnswersUnread

SLICE_BYTES = 128 * 1024
UNREAD_RETRY_S = 5.0


def hold_little(transport: asyncio.Transport) -> None:
    """Pause writing while anything is unread, and have the kernel take no more than a slice that it cannot send.

    Else a reader of a few kB/s seems to stand still: the kernel wants megabytes of its buffer free before more.
    """
    transport.set_write_buffer_limits(high=0)
    with contextlib.suppress(OSError):  # of a client that has left already
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, SLICE_BYTES)


class Unread:
    """The bytes of all answers that began and did not end. An answer stays in memory as a whole until it ends."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.size = 0

    def check(self) -> None:
        """Raises AnswersUnread while there is no room for another answer."""
        if self.size > self._limit:
            detail = f"Answers with more than {self._limit} bytes together wait for their clients to read them."
            raise AnswersUnread(detail, retry_after=UNREAD_RETRY_S)


class UnreadMiddleware:
    """Pure ASGI. Counts each answer from its headers until its last byte has left the transport."""

    def __init__(self, app: ASGIApp, unread: Unread) -> None:
        self.app = app
        self._unread = unread

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        size = 0

        async def sliced(message: Message) -> None:
            nonlocal size
            if message["type"] == "http.response.start":
                size = int(Headers(raw=message["headers"]).get("content-length", "0"))
                self._unread.size += size
            if message["type"] != "http.response.body":
                await send(message)
                return
            body = memoryview(message.get("body", b""))
            for start in range(0, len(body), SLICE_BYTES):
                part = bytes(body[start : start + SLICE_BYTES])
                await send({"type": "http.response.body", "body": part, "more_body": True})
            if not message.get("more_body", False):  # waits until the last slice has left the transport
                await send({"type": "http.response.body", "body": b"", "more_body": False})

        try:
            await self.app(scope, receive, sliced)
        finally:
            self._unread.size -= size
