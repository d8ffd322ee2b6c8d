"""A connection within bounds: uvicorn has none for what comes before a request's body, neither bytes nor time."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

from starlette.responses import Response
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from service.api.problems import problem
from service.api.unread import hold_little
from service.errors import HeadersTimeout, HeadersTooLarge, MalformedRequest, ServiceError
from service.settings import Settings


class BoundedConnection(HttpToolsProtocol):
    """Refuses a head (request line and headers) that is too long or too slow; bodies are bounded where they are read.
    Gives up an answer that is read too slowly, for it is held in memory: `unread` sends slices, each has a time.

    What no parser made a request of is answered here, since no application sees it.
    """

    settings: Settings

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._head_bytes = 0
        self._in_head = True
        self._head_timer: asyncio.TimerHandle | None = None
        self._unread_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        hold_little(transport)
        self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        self._stop_unread_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._head_bytes += len(data)
        super().data_received(data)
        if not self._in_head or self.transport.is_closing():
            return
        if self._head_bytes > self.settings.max_header_bytes:
            self._refuse(headers_too_large(self.settings.max_header_bytes))
        elif self._head_bytes and self._head_timer is None:  # an empty line ends uvicorn's keep-alive timer, too
            self._start_head_timer()

    def on_message_begin(self) -> None:
        self._unset_keepalive_if_required()  # which may run since the bytes before these, of the same read
        super().on_message_begin()
        self._start_head_timer()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_head_timer()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._head_bytes, self._in_head = 0, True
        if self.cycle.response_complete:  # the body, of no use any more, ended uvicorn's keep-alive timer
            self._stop_head_timer()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.more_body:  # that nobody reads; a client that still sends it must see the answer
            self._start_head_timer()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread_timer = self.loop.call_later(self.settings.body_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop_unread_timer()
        super().resume_writing()

    def _stop_unread_timer(self) -> None:
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002
        self._refuse(MalformedRequest("The bytes on the connection are no HTTP/1.1 request."))

    def _start_head_timer(self) -> None:
        self._stop_head_timer()
        self._head_timer = self.loop.call_later(self.settings.body_timeout_s, self._on_slow_head)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _on_slow_head(self) -> None:
        self._head_timer = None
        seconds = self.settings.body_timeout_s
        if self._answering():  # the client may well wait
            self._start_head_timer()
        elif self._in_head and self._head_bytes:
            self._refuse(HeadersTimeout(f"The headers did not arrive within {seconds:g} seconds."))
        else:
            self.transport.close()

    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse(self, error: ServiceError) -> None:
        """Answer what never became a whole request, and close; where one before it is being answered, after that."""
        if self._answering() and not self.cycle.more_body:
            self.cycle.keep_alive = False
            self.flow.pause_reading()
            return
        request_id = uuid.uuid4().hex
        response: Response = problem({"path": "/", "state": {"request_id": request_id}}, error)
        response.headers.update({"connection": "close", "x-request-id": request_id})
        lines = [name + b": " + value + b"\r\n" for name, value in response.raw_headers]
        self.transport.write(b"".join([STATUS_LINE[error.status], *lines, b"\r\n", bytes(response.body)]))
        self.transport.close()


def headers_too_large(limit: int) -> HeadersTooLarge:
    """The error of a request whose line and headers have more than `limit` bytes."""
    return HeadersTooLarge(f"The request's line and headers have more than {limit} bytes.")


def bounded_connection(settings: Settings) -> type[BoundedConnection]:
    """The kind of connection to give to uvicorn."""
    return type("Connection", (BoundedConnection,), {"settings": settings})
