"""Turns of connections, counted in rounds of the event loop over real sockets; no seconds are measured."""

from __future__ import annotations

import asyncio
from collections import Counter

import uvicorn
from starlette.responses import Response
from uvicorn.server import ServerState

from service.api.connection import EVENTS, SLICE, BoundedConnection, bounded_connection
from service.api.turns import Turns
from service.settings import Settings
from tests.api.support import StandIn, make_app

CLIENTS, REQUESTS = 5, 200
READ = 256 * 1024  # asyncio reads so much at once
REQUEST = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
LAST = REQUEST[:-2] + b"Connection: close\r\n\r\n"
CHUNKED = b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"


class Seen:
    """What the connections did in each round of the event loop."""

    def __init__(self) -> None:
        self.round = 0
        self.turns = Counter[int]()
        self.events = Counter[int]()
        self.fed = self.kept = 0

    async def count(self) -> None:
        while True:
            self.round += 1
            await asyncio.sleep(0)


def watched(settings: Settings, seen: Seen) -> type[BoundedConnection]:
    """The server's own kind of connection, whose steps are written down."""
    kind = bounded_connection(settings)

    class Watched(kind):  # type: ignore[misc, valid-type]  # it is made at run time
        def _take_turn(self) -> None:
            seen.turns[seen.round] += 1
            super()._take_turn()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            seen.kept = max(seen.kept, len(self._pending))

        def handle_events(self) -> None:
            before = self.conn.budget
            seen.fed = max(seen.fed, len(self.conn.trailing_data[0]))
            super().handle_events()
            seen.events[seen.round] += before - self.conn.budget

    return Watched


async def ask(port: int, sent: bytes) -> bytes:
    """Send bytes, and read until the server closes, with or without an answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(sent)
        return await reader.read()
    except ConnectionResetError:  # it closed with bytes unread
        return b""
    finally:
        writer.transport.abort()


async def slow() -> Response:
    for _ in range(1000):
        await asyncio.sleep(0)
    return Response()


async def crowd(sent: bytes) -> tuple[Seen, list[bytes]]:
    """What happens where several clients send the same bytes at once, and what they are answered."""
    seen, settings = Seen(), Settings()
    kind = watched(settings, seen)
    app = make_app(StandIn(), settings)
    app.get("/slow")(slow)
    config = uvicorn.Config(app, http=kind, ws="none", log_config=None, lifespan="off")
    config.load()
    state = ServerState()
    door = await asyncio.get_running_loop().create_server(lambda: kind(config, state, {}), "127.0.0.1", 0)
    counter = asyncio.ensure_future(seen.count())
    try:
        port = door.sockets[0].getsockname()[1]
        return seen, await asyncio.gather(*[ask(port, sent) for _ in range(CLIENTS)])
    finally:
        counter.cancel()
        door.close()


def test_each_request_of_a_pipeline_waits_for_its_turn() -> None:
    seen, answers = asyncio.run(crowd(REQUEST * REQUESTS + LAST))
    assert [answer.count(b"HTTP/1.1 200") for answer in answers] == [REQUESTS + 1] * CLIENTS
    assert max(seen.turns.values()) == 1
    assert seen.turns.total() >= REQUESTS * CLIENTS


def test_a_turn_is_short() -> None:
    """In the first round all connections begin at once."""
    seen, answers = asyncio.run(crowd(CHUNKED + b"1\r\na\r\n" * 5000 + b"0\r\n\r\n" + LAST))
    assert [answer.count(b"HTTP/1.1") for answer in answers] == [2] * CLIENTS
    assert max(seen.turns.values()) == 1
    assert sorted(seen.events.values())[-2] <= EVENTS
    assert seen.events.total() > 5000 * CLIENTS
    assert seen.fed <= SLICE + len(REQUEST)


def test_little_is_read_behind_a_request_that_is_answered() -> None:
    seen, _ = asyncio.run(crowd(REQUEST.replace(b"livez", b"slow") + b"\0" * 20 * READ))
    assert SLICE < seen.kept <= READ


def test_nothing_is_kept_of_what_follows_the_last_request() -> None:
    seen, _ = asyncio.run(crowd(LAST.replace(b"livez", b"slow") + REQUEST * 20_000))
    assert seen.kept == 0


def test_one_callback_has_its_turn_in_each_round() -> None:
    async def rounds() -> list[int]:
        seen, turns, had = Seen(), Turns(), list[int]()
        counter = asyncio.ensure_future(seen.count())
        for _ in range(CLIENTS):
            turns.wait(lambda: had.append(seen.round))
        for _ in range(2 * CLIENTS):
            await asyncio.sleep(0)
        counter.cancel()
        return had

    had = asyncio.run(rounds())
    assert had == list(range(had[0], had[0] + CLIENTS))
