"""A connection within bounds: uvicorn has none for what comes before a request's body, neither bytes nor time."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any, Literal

import h11
from starlette.responses import Response
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol
from uvicorn.server import ServerState

from service.api.parser import Parser
from service.api.problems import problem
from service.api.turns import Turns
from service.api.unread import hold_little
from service.errors import HeadersTimeout, ServiceError
from service.settings import Settings

SLICE = 8192  # bytes that are parsed in one turn
EVENTS = 64  # events of one turn, such as the start of a request or a chunk
RESERVE = 32

Awaited = Literal["first head", "head", "rest of a body"] | None


class Flow(FlowControl):
    """Reading rests while uvicorn wants it to, and while there is more to parse (`held`)."""

    held = False

    def hold(self, held: bool) -> None:
        """Read no more until what has been read is parsed."""
        self.held = held
        self._apply()

    def pause_reading(self) -> None:
        """Uvicorn's wish."""
        self.read_paused = True
        self._apply()

    def resume_reading(self) -> None:
        """Uvicorn's wish."""
        self.read_paused = False
        self._apply()

    def _apply(self) -> None:
        if self._transport.is_closing():
            return
        if self.held or self.read_paused:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()


class BoundedConnection(H11Protocol):
    """Refuses a head (request line and headers) that is too long or too slow; bodies are bounded where they are read.
    Gives up an answer that is read too slowly: `unread` sends it in slices, and each slice has a time limit.

    What was read is parsed a slice at a time, and connections take turns. Nothing is parsed and little is read while
    a request is answered. Bytes that are no request are answered here, since no application sees them.
    """

    settings: Settings
    reserve: dict[BoundedConnection, None]
    turns: Turns

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.conn: Parser = Parser(self.settings.max_header_bytes)
        self._pending = bytearray()
        self._waits_its_turn = False
        self._awaited: Awaited = None
        self._timer: asyncio.TimerHandle | None = None
        self._unread_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self.flow: Flow = Flow(transport)
        if len(self.connections) - len(self.reserve) > self.settings.max_connections:
            self._enter_reserve()
        self._watch()
        hold_little(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.reserve.pop(self, None)
        self._pending.clear()
        self._stop_timer()
        self._stop_unread_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self.conn.their_state is h11.IDLE and not self._pending and not self.conn.trailing_data[0]:
            data = data.lstrip(b"\r\n")  # empty lines before a request stand for nothing (RFC 9112, 2.2)
        if data:
            self._unset_keepalive_if_required()
            self._pending += data
            if not self._waits_its_turn:
                self._parse()

    def on_response_complete(self) -> None:
        self.conn.budget = 0  # the next request waits its turn
        super().on_response_complete()
        self._settle()

    def _take_turn(self) -> None:
        self._waits_its_turn = False
        self._parse()

    def _parse(self) -> None:
        """Parse what is left of the last slice, then one more."""
        if self in self.reserve and len(self.connections) - len(self.reserve) < self.settings.max_connections:
            self._leave_reserve()
        self.conn.budget = EVENTS
        if self._may_parse() and self.conn.trailing_data[0]:
            self.handle_events()
        self._feed(SLICE)
        self._feed(self.conn.remaining)  # a body of known length costs nothing to parse
        self._settle()

    def _feed(self, size: int) -> None:
        part = bytes(self._pending[:size])
        if part and self.conn.budget and self._may_parse():
            del self._pending[:size]
            self.conn.receive_data(part)
            self.handle_events()

    def _may_parse(self) -> bool:
        return self.conn.their_state in (h11.IDLE, h11.SEND_BODY) and not self.transport.is_closing()

    def _settle(self) -> None:
        """After each step: wait for the next turn if there is more to parse, and read no more until then."""
        if self.conn.their_state is h11.MUST_CLOSE or self.transport.is_closing():
            self._pending.clear()  # nothing follows the last request
        more = self._pending or (self.conn.budget == 0 and self.conn.trailing_data[0])
        if more and self._may_parse() and not self._waits_its_turn:
            self._waits_its_turn = True
            self.turns.wait(self._take_turn)
        self.flow.hold(bool(self._pending))
        if self in self.reserve and self.cycle and self.cycle.response_complete and not self._is_in_body():
            self.transport.close()
        self._watch()

    def _is_in_body(self) -> bool:
        """Whether the rest of a body must come first: were the connection closed, its sender might miss the answer."""
        return bool(self.conn.their_state is h11.SEND_BODY)

    def _should_upgrade(self) -> bool:
        return False  # the request is answered as if it had not asked for that (RFC 9110, 7.8)

    def shutdown(self) -> None:
        if not self.transport.is_closing():
            super().shutdown()

    def _enter_reserve(self) -> None:
        """Stay for one answer. Where the reserve is full, its oldest connection makes room."""
        if len(self.reserve) >= RESERVE:
            oldest = next(iter(self.reserve))
            del self.reserve[oldest]
            oldest.transport.abort()
        self.reserve[self] = None
        self.app_state = {**self.app_state, "reserve": True}

    def _leave_reserve(self) -> None:
        del self.reserve[self]
        self.app_state = {name: value for name, value in self.app_state.items() if name != "reserve"}

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
        self._refuse(self.conn.error)

    def _watch(self) -> None:
        """Bound the time of what is awaited now. It does not run while a request is answered."""
        awaited = self._what_is_awaited()
        if awaited != self._awaited:
            self._stop_timer()
            self._awaited = awaited
            if awaited is not None:
                self._timer = self.loop.call_later(self.settings.body_timeout_s, self._on_slow)

    def _what_is_awaited(self) -> Awaited:
        if self.transport.is_closing():
            return None
        if self.conn.their_state is h11.IDLE:
            if self.conn.trailing_data[0]:
                self._unset_keepalive_if_required()
                return "head"
            if self.cycle is None:
                return "first head"  # type: ignore[unreachable]  # as uvicorn has it
            self._keep_alive()
        elif self._is_in_body() and self.cycle.response_complete:
            return "rest of a body"  # a client that still sends it must see the answer
        return None

    def _keep_alive(self) -> None:
        if self.timeout_keep_alive_task is None:  # the body, of no use any more, ended it
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_slow(self) -> None:
        self._timer = None
        if self._awaited == "head":
            seconds = self.settings.body_timeout_s
            self._refuse(HeadersTimeout(f"The headers did not arrive within {seconds:g} seconds."))
        else:
            self.transport.close()

    def _refuse(self, error: ServiceError) -> None:
        """Answer what never became a whole request, and close. A request whose answer has begun gets no second one."""
        if self.conn.in_body and self.cycle.response_started:
            self.transport.close()
            return
        request_id = uuid.uuid4().hex
        response: Response = problem({"path": "/", "state": {"request_id": request_id}}, error)
        response.headers.update({"connection": "close", "x-request-id": request_id})
        lines = [name + b": " + value + b"\r\n" for name, value in response.raw_headers]
        status = b"HTTP/1.1 %d %s\r\n" % (error.status, STATUS_PHRASES[error.status])
        self.transport.write(b"".join([status, *lines, b"\r\n", bytes(response.body)]))
        self.transport.close()


def bounded_connection(settings: Settings) -> type[BoundedConnection]:
    """The kind of connection to give to uvicorn; its instances share a reserve and take turns."""
    return type("Connection", (BoundedConnection,), {"settings": settings, "reserve": {}, "turns": Turns()})
