"""Answers that are read slowly, over real sockets with the server's own connection class."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import tempfile
import threading
import time
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.responses import Response, StreamingResponse

from service.api import unread as module
from service.api.answers import ChunkedResponse
from service.api.connection import bounded_connection
from service.api.unread import Unread
from service.errors import AnswersUnread
from service.settings import Settings
from service.workers.messages import Answer, ExplainRequest
from tests.api.support import StandIn, make_app
from tests.server import wait_until

LARGE = 12 * 2**20
SLICE = 128 * 1024  # what must be read in WAIT_S
SIZES = {"/whole": LARGE, "/chunked": LARGE, "/streamed": LARGE, "/short": SLICE + 40_000}
WAIT_S = 1.0
READERS = 4


@contextmanager
def serving(dispatcher: StandIn | None = None, **settings: Any) -> Iterator[int]:
    """The API with some answers beside it; yields its port."""
    given = Settings(**{"body_timeout_s": WAIT_S, **settings})
    app = make_app(dispatcher or StandIn(), given)

    @app.get("/whole")
    async def whole() -> Response:
        return Response(b"w" * LARGE)

    @app.get("/short")
    async def short() -> Response:
        return Response(b"s" * SIZES["/short"])

    @app.get("/chunked")
    async def chunked() -> Response:
        return ChunkedResponse([b"c" * 2**20 for _ in range(LARGE // 2**20)], "text/plain")

    @app.get("/streamed")
    async def streamed() -> Response:
        async def parts() -> AsyncIterator[bytes]:
            for _ in range(LARGE // 2**20):
                yield b"s" * 2**20

        return StreamingResponse(parts(), headers={"content-length": str(LARGE)})

    door = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, http=bounded_connection(given), ws="none", log_config=None, lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=asyncio.run, args=(server.serve([door]),))
    thread.start()
    try:
        yield door.getsockname()[1]
    finally:
        server.should_exit = server.force_exit = True
        thread.join()


def ask_unread(port: int, path: str = "/whole") -> socket.socket:
    """A client that asks and does not read; its own buffer is small."""
    one = socket.socket()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    one.settimeout(20)
    one.connect(("127.0.0.1", port))
    one.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    return one


def post(port: int) -> httpx.Response:
    url = f"http://127.0.0.1:{port}/models/resnet/heatmap"
    return httpx.post(url, content=b"picture", headers={"content-type": "image/png"})


@pytest.mark.parametrize("path", SIZES)
def test_new_work_is_refused_while_answers_wait_to_be_read_and_taken_afterwards(path: str) -> None:
    """Also where all but the last bytes of an answer went into the kernel's buffers."""
    with serving(max_unread_bytes=SIZES[path] - 1, body_timeout_s=60) as port:
        assert post(port).status_code == 200
        with ask_unread(port, path):
            wait_until(lambda: post(port).status_code == 503, 10)
            refused = post(port)
            assert (refused.status_code, refused.json()["code"]) == (503, "answers_unread")
            assert int(refused.headers["retry-after"]) >= 1
        wait_until(lambda: post(port).status_code == 200, 10)


@pytest.mark.parametrize("path", ["/whole", "/streamed"])
def test_an_answer_that_is_read_in_drops_is_aborted(path: str) -> None:
    """Some progress is not enough: what is left would stay in memory for days."""
    received = 0

    def drop_by_drop() -> bool:
        nonlocal received
        received += len(slow.recv(2048))
        return post(port).status_code == 200

    with serving(max_unread_bytes=LARGE - 1) as port, ask_unread(port, path) as slow:
        wait_until(lambda: post(port).status_code == 503, 10)
        wait_until(drop_by_drop, 20 * WAIT_S)
    assert 0 < received < LARGE


@pytest.mark.parametrize("path", ["/whole", "/streamed"])
def test_an_answer_that_is_read_steadily_arrives_whole(path: str) -> None:
    """Also where it takes much longer than one slice may."""
    with serving(max_unread_bytes=LARGE) as port, ask_unread(port, path) as steady:
        steady.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
        assert read(steady, steadily_s=2.5 * WAIT_S) == path[1:2].encode() * LARGE


def read(one: socket.socket, steadily_s: float = 0.0) -> bytes:
    """A large answer's body, read at four times the least rate for so long and then at once."""
    began, received = time.monotonic(), bytearray()
    while b"\r\n\r\n" not in received or len(received.partition(b"\r\n\r\n")[2]) < LARGE:
        data = one.recv(2**20)
        assert data, len(received)
        received += data
        time.sleep(0.0 if time.monotonic() - began > steadily_s else len(data) / (4 * SLICE) * WAIT_S)
    return bytes(received.partition(b"\r\n\r\n")[2])


def test_of_large_answers_one_is_in_memory_and_the_others_wait_in_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IN_MEMORY_BYTES", LARGE)
    with serving(max_unread_bytes=READERS * LARGE - 1, body_timeout_s=60) as port, contextlib.ExitStack() as stack:
        assert post(port).status_code == 200
        tracemalloc.start()
        stack.callback(tracemalloc.stop)
        readers = [stack.enter_context(ask_unread(port, "/chunked")) for _ in range(READERS)]
        wait_until(lambda: post(port).status_code == 503, 10)  # all have begun
        wait_until(lambda: tracemalloc.get_traced_memory()[0] < 1.5 * LARGE, 10)
        for one in readers:
            assert read(one) == b"c" * LARGE


@pytest.mark.parametrize("path", ["/whole", "/streamed"])
def test_without_a_temporary_folder_answers_wait_in_memory(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(module, "IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with serving() as port, ask_unread(port, path) as one:
        assert read(one) == path[1:2].encode() * LARGE


class Held(StandIn):
    """Answers when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.release = threading.Event()

    async def explain(self, request: ExplainRequest, size_bytes: int, timeout_s: float) -> Answer:
        answer = await super().explain(request, size_bytes, timeout_s)
        await asyncio.to_thread(self.release.wait)
        return answer


def test_what_was_accepted_earlier_is_refused_too_once_it_is_computed() -> None:
    """Else the answers of all that is queued would wait beyond the bound."""
    held = Held()
    with serving(held, max_unread_bytes=LARGE - 1, body_timeout_s=60) as port, ThreadPoolExecutor() as threads:
        accepted = threads.submit(post, port)
        wait_until(lambda: len(held.asked) == 1, 10)
        with ask_unread(port):
            wait_until(lambda: post(port).status_code == 503, 10)
            held.release.set()
            assert accepted.result().json()["code"] == "answers_unread"
        assert len(held.asked) == 1


def test_the_bound_counts_all_answers_together() -> None:
    unread = Unread(limit=10)
    unread.size += 10
    unread.check()
    unread.size += 1
    with pytest.raises(AnswersUnread, match="more than 10 bytes"):
        unread.check()
