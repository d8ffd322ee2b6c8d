"""Attacks on connections, over real sockets: others are answered soon meanwhile, and memory stays bounded."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest

from tests.conftest import write_tiny
from tests.e2e.support import file_of, post, resized, text_of
from tests.e2e.test_sockets import connect, head, replies, until_closed
from tests.server import Server, running, wait_until

ATTACKERS, ATTACK_S = 10, 2.0
PROBE_S, CLIENT_S, GROWTH = 0.5, 2.0, 100_000_000
MAX_CONNECTIONS, RESERVE = 20, 32

LIVE = head(verb="GET", url="/livez", close=False)
CHUNKED = head("Content-Type: image/png", "Transfer-Encoding: chunked", close=False)
MANY = LIVE * (246_000 // len(LIVE))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("attacked")
    write_tiny(folder / "models" / "tiny")
    with running(folder, "--models", str(folder / "models")) as one:
        yield one


@pytest.fixture
def limited(tmp_path: Path) -> Iterator[Server]:
    write_tiny(tmp_path / "models" / "tiny")
    with running(tmp_path, "--models", str(tmp_path / "models"), "--max-connections", str(MAX_CONNECTIONS)) as one:
        yield one


@pytest.fixture(scope="module")
def photograph(chelsea: bytes) -> bytes:
    return file_of(resized(chelsea, 96, 64), "JPEG")


def slow(photograph: bytes) -> bytes:
    """A request of about two seconds."""
    fields = {"images": [text_of(photograph)] * 8, "method": "rise", "gen_params": {"n": 20_000}, "timeout_s": 2}
    body = json.dumps(fields).encode()
    return head("Content-Type: application/json", f"Content-Length: {len(body)}", close=False) + body


def flood(server: Server, first: bytes, more: bytes, until: float) -> None:
    """Send without reading, one connection after another, until the time has come."""
    while time.monotonic() < until:
        with connect(server) as connection:
            connection.settimeout(0.2)
            try:
                connection.sendall(first)
                while time.monotonic() < until:
                    connection.sendall(more)
            except OSError:  # cut off, or not read on
                continue


def flood_and_read(server: Server, first: bytes, more: bytes, until: float) -> None:
    """As `flood`, but each connection's answers are read."""
    while time.monotonic() < until:
        with connect(server) as connection:
            connection.settimeout(0.2)
            try:
                connection.sendall(first + more)
                while time.monotonic() < until and connection.recv(1_000_000):
                    pass
            except OSError:
                continue


ATTACKS: dict[str, tuple[Callable[[Server, bytes, bytes, float], None], bytes, bytes]] = {
    "trailers": (flood, CHUNKED + b"0\r\n", b"a: b\r\n" * 20_000),
    "trailers behind a chunk": (flood, CHUNKED + b"1\r\na\r\n0\r\n", b"a: b\r\n" * 20_000),
    "a chunk extension": (flood, CHUNKED + b"1;", b"a" * 200_000),
    "chunk extensions": (flood, CHUNKED, (b"1;" + b"a" * 4000 + b"\r\na\r\n") * 50),
    "chunks of one byte": (flood, CHUNKED, b"1\r\na\r\n" * 30_000),
    "pipelines": (flood_and_read, MANY, b""),
    "pipelines that nobody reads": (flood, MANY, MANY),
    "heads of many headers": (flood, b"", b"GET /livez HTTP/1.1\r\nHost: localhost\r\n" + b"a:\r\n" * 15_000 + b"\r\n"),
    "a pipeline behind a refused body": (flood, CHUNKED.replace(b"image/png", b"a/b") + b"0\r\n\r\n", MANY),
}


def probe(server: Server, until: float) -> list[float]:
    """The seconds that each of many probes took, each on a connection of its own."""
    took = []
    while time.monotonic() < until:
        before = time.monotonic()
        with connect(server) as connection:
            connection.sendall(head(verb="GET", url="/livez"))
            (reply,) = replies(until_closed(connection))
        assert reply.status == 200
        took.append(time.monotonic() - before)
        threading.Event().wait(0.01)
    return took


@pytest.mark.parametrize("name", [*ATTACKS, "pipelines behind a slow POST"])
def test_others_are_answered_during_an_attack(server: Server, photograph: bytes, name: str) -> None:
    attack, first, more = ATTACKS.get(name, (flood, slow(photograph), MANY))
    memory = psutil.Process(server.process.pid).memory_info
    before, until = memory().rss, time.monotonic() + ATTACK_S
    with ThreadPoolExecutor(ATTACKERS + 1) as pool:
        attackers = [pool.submit(attack, server, first, more, until) for _ in range(ATTACKERS)]
        probes = pool.submit(probe, server, until)
        with server.client(timeout=CLIENT_S) as client:
            answered = client.get("/models") if "POST" in name else post(client, photograph, target_classes=[0])
        took = probes.result()
    for one in attackers:
        one.result()
    print(
        f"{name}: {len(took)} probes, p99 {np.quantile(took, 0.99) * 1e3:.0f} ms, max {max(took) * 1e3:.0f} ms, "
        f"memory {(memory().rss - before) / 1e6:+.0f} MB"
    )
    assert answered.status_code == 200
    assert max(took) <= PROBE_S
    assert memory().rss - before <= GROWTH


def test_a_long_pipeline_is_answered_in_order(server: Server) -> None:
    """Longer than a slice, so that parsing stops and goes on many times."""
    paths = [f"/nowhere/{number}" for number in range(500)]
    requests = b"".join(head(verb="GET", url=path, close=False) for path in paths[:-1]) + head(
        verb="GET", url=paths[-1]
    )
    with connect(server) as connection, ThreadPoolExecutor(1) as pool:
        sent = pool.submit(connection.sendall, requests)
        answers = replies(until_closed(connection))
        sent.result()
    assert [re.findall(r"/nowhere/\d+", reply.problem["detail"])[0] for reply in answers] == paths


def established(server: Server) -> int:
    connections = psutil.Process(server.process.pid).net_connections("tcp")
    return sum(one.status == "ESTABLISHED" for one in connections)


def take_all(server: Server, stack: ExitStack) -> list[socket.socket]:
    """As many connections as may be open."""
    taken = [stack.enter_context(connect(server)) for _ in range(MAX_CONNECTIONS)]
    wait_until(lambda: established(server) >= MAX_CONNECTIONS, 10)
    return taken


def test_over_the_limit_probes_are_answered_and_all_else_is_refused(limited: Server) -> None:
    with ExitStack() as stack:
        taken = take_all(limited, stack)
        refused = httpx.get(f"{limited.url}/models")
        assert (refused.status_code, refused.json()["code"]) == (503, "too_many_connections")
        assert (refused.headers["connection"], refused.headers["retry-after"]) == ("close", "1")
        assert refused.json()["request_id"] == refused.headers["x-request-id"]
        for path in ("/livez", "/readyz"):
            answer = httpx.get(f"{limited.url}{path}")
            assert (answer.status_code, answer.headers["connection"]) == (200, "close")
        more = [stack.enter_context(connect(limited)) for _ in range(RESERVE + 20)]  # more than the reserve holds
        assert httpx.get(f"{limited.url}/livez").status_code == 200
        more[0].settimeout(10)  # much less than a head may take
        assert until_closed(more[0]) == b""
        taken[0].sendall(head(verb="GET", url="/models"))
        assert until_closed(taken[0]).startswith(b"HTTP/1.1 200")
        assert established(limited) <= MAX_CONNECTIONS + RESERVE
    wait_until(lambda: httpx.get(f"{limited.url}/models").status_code == 200, 10)
    with ExitStack() as stack:
        take_all(limited, stack)
        assert httpx.get(f"{limited.url}/models").status_code == 503  # the reserve has forgotten those of before


def test_trailers_count_behind_a_body_and_to_their_end(server: Server) -> None:
    trailers = b"a:\r\n" * 10_000 + b"\r\n"
    for body in (b"0\r\n", b"1\r\na\r\n0\r\n"):
        with connect(server) as connection:
            connection.sendall(CHUNKED + body + trailers)
            (reply,) = replies(until_closed(connection))
        assert (reply.status, reply.problem["code"]) == (431, "headers_too_large")


@pytest.mark.parametrize("between", [b"", b"\r\n", b"\r\n\r\n"])
@pytest.mark.parametrize("at_once", [True, False])
def test_an_empty_line_behind_a_body_stands_for_nothing(server: Server, between: bytes, at_once: bool) -> None:
    """As some clients send it (RFC 9112, 2.2)."""
    first = head("Content-Type: text/plain", "Content-Length: 3", url="/nowhere", close=False) + b"abc"
    parts = (
        [first + between + head(verb="GET", url="/livez")]
        if at_once
        else [first, between, head(verb="GET", url="/livez")]
    )
    with connect(server) as connection:
        for part in parts:
            connection.sendall(part)
            threading.Event().wait(0.05)
        answers = replies(until_closed(connection))
    assert [reply.status for reply in answers] == [404, 200]


def test_a_connection_leaves_the_reserve_when_there_is_room(limited: Server) -> None:
    with ExitStack() as stack:
        taken = [stack.enter_context(connect(limited)) for _ in range(MAX_CONNECTIONS)]
        early = stack.enter_context(connect(limited))
        early.sendall(LIVE[:10])
        wait_until(lambda: httpx.get(f"{limited.url}/models").status_code == 503, 10)
        for connection in taken:
            connection.close()
        wait_until(lambda: httpx.get(f"{limited.url}/models").status_code == 200, 10)
        early.sendall(LIVE[10:] + head(verb="GET", url="/models"))
        assert [reply.status for reply in replies(until_closed(early))] == [200, 200]


def test_a_refused_sender_of_a_large_body_sees_the_refusal(limited: Server) -> None:
    """The connection is closed behind the body: earlier, the reset might overtake the answer."""
    with ExitStack() as stack:
        for _ in range(MAX_CONNECTIONS):
            stack.enter_context(connect(limited))
        wait_until(lambda: httpx.get(f"{limited.url}/models").status_code == 503, 10)
        refused = httpx.post(f"{limited.url}/models/tiny/heatmap", content=bytes(20_000_000), timeout=30)
        assert (refused.status_code, refused.json()["code"]) == (503, "too_many_connections")


def test_the_server_is_well(server: Server, photograph: bytes) -> None:
    with server.client() as client:
        assert post(client, photograph, target_classes=[0]).status_code == 200
    log = server.log.read_text()
    assert not re.search(r"Traceback|defect|exited|Unhandled", log), log
