"""Answers that nobody has read yet: their bytes are counted and bounded, and each is sent in slices.

uvicorn hands a whole chunk to the transport at once, whatever its size, and waits only before the next one. With slices
an answer waits for its reader, and the connection can demand that each of them is read within a time. Where the answers
that wait are many or large, further ones wait in files.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.spool import Spool, slices
from service.errors import AnswersUnread

SLICE_BYTES = 128 * 1024
IN_MEMORY_BYTES = 32 * 2**20
"""Of all answers together. An answer that would exceed this waits in a file."""
MAX_FILES = 256
"""Answers that wait in files at a time; the process may have so many more files open."""
UNREAD_RETRY_S = 5.0


def hold_little(transport: asyncio.Transport) -> None:
    """Pause writing while anything is unread, and have the kernel take no more than a slice that it cannot send.

    Else a reader of a few kB/s seems to stand still: the kernel wants megabytes of its buffer free before more.
    """
    transport.set_write_buffer_limits(high=0)
    with contextlib.suppress(OSError):  # of a client that has left already
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, SLICE_BYTES)


class Unread:
    """The bytes of all answers that began and did not end: in all, in memory, and in how many files the others are."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.size = 0
        self.in_memory = 0
        self.files = 0

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
        answer = _Answer(send, self._unread)
        try:
            await self.app(scope, receive, answer.send)
        finally:
            answer.end()


class _Answer:
    """One answer on its way to its reader."""

    def __init__(self, send: Send, unread: Unread) -> None:
        self._send = send
        self._unread = unread
        self._size = 0
        self._spool: Spool | None = None

    async def send(self, message: Message) -> None:
        """Send a message of the application, its body in slices."""
        if message["type"] == "http.response.start":
            self._begin(int(Headers(raw=message["headers"]).get("content-length", "0")))
        if message["type"] != "http.response.body":
            await self._send(message)
            return
        body, more = message.get("body", b""), message.get("more_body", False)
        if self._spool is None:
            for part in slices(body, SLICE_BYTES):
                await self._send_part(part)
        else:
            await asyncio.to_thread(self._spool.add, body)
            if not more:
                parts = self._spool.parts(SLICE_BYTES)
                while part := await asyncio.to_thread(next, parts, b""):
                    await self._send_part(part)
        if not more:  # waits until the last slice has left the transport
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    def end(self) -> None:
        """The answer is read, or given up."""
        self._unread.size -= self._size
        if self._spool is None:
            self._unread.in_memory -= self._size
        else:
            self._unread.files -= 1
            self._spool.close()

    def _begin(self, size: int) -> None:
        self._size = size
        self._unread.size += size
        if self._unread.in_memory + size > IN_MEMORY_BYTES and self._unread.files < MAX_FILES:
            with contextlib.suppress(OSError):  # it waits in memory then
                self._spool = Spool()
        if self._spool is None:
            self._unread.in_memory += size
        else:
            self._unread.files += 1

    async def _send_part(self, part: bytes) -> None:
        await self._send({"type": "http.response.body", "body": part, "more_body": True})
