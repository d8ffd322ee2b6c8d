"""Clients that leave: while they send, wait, are computed and read. Their work stops, and nobody else notices."""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

from tests.conftest import write_tiny
from tests.e2e.support import file_of, resized, text_of
from tests.server import Server, processor_s, running, wait_until
from tests.soak.answers import Reply, check_same
from tests.soak.cases import Case, case
from tests.soak.traffic import reset_on_close

pytestmark = pytest.mark.alone

PATH = "/models/tiny/heatmap"
MINUTES: dict[str, Any] = {"method": "rise", "gen_params": {"n": 20_000}, "timeout_s": 300}
"""Some minutes of work in company, most of one alone: whoever does not stop it is found out."""
STOP_S = 30.0
"""The worker must be idle again within this time. One chunk takes it some hundredths of a second."""
QUICK_S = 30.0
ENDS = ["RST", "FIN"]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of the tiny model, whose log tells of no defect at the end."""
    folder = tmp_path_factory.mktemp("disconnects")
    write_tiny(folder / "models" / "tiny")
    with running(folder, "--models", str(folder / "models")) as server:
        yield server
    log = server.log.read_text()
    assert "Traceback" not in log, log
    assert "met a defect" not in log, log


@pytest.fixture(autouse=True)
def _the_service_lives_on(service: Server, photograph: bytes) -> Iterator[None]:
    """Before and after each test nothing is computed; after it, a request is answered at once by the same worker."""
    (worker,) = service.workers()
    descriptors = psutil.Process(service.process.pid).num_fds()
    yield
    wait_until(lambda: idle(service), STOP_S, service)
    with service.client(timeout=QUICK_S) as client:
        assert client.post(PATH, json=asked(photograph)).status_code == 200
        assert client.get("/livez").status_code == 200
    assert service.workers() == [worker]
    wait_until(lambda: psutil.Process(service.process.pid).num_fds() <= descriptors, STOP_S, service)


@pytest.fixture(scope="module")
def photograph(chelsea: bytes) -> bytes:
    return file_of(resized(chelsea, 96, 64), "JPEG")


def asked(*pictures: bytes, **fields: Any) -> dict[str, Any]:
    return {"images": [text_of(picture) for picture in pictures], **fields}


def slow(*pictures: bytes) -> Case:
    return case("slow", PATH, json=asked(*pictures, **MINUTES))


class Leaver:
    """A client on a bare socket that sends a request and leaves as it likes."""

    def __init__(self, server: Server, request: bytes) -> None:
        address = urlsplit(server.url)
        self.socket = socket.create_connection((address.hostname, address.port), timeout=60)
        self.socket.sendall(request)

    def leave(self, end: str) -> None:
        if end == "RST":
            reset_on_close(self.socket)
        self.socket.close()


@contextlib.contextmanager
def computing(server: Server, one: Case, end: str = "RST") -> Iterator[None]:
    """A client whose request is computed meanwhile, and who leaves at the end."""
    client = Leaver(server, one.wire())
    try:
        wait_computing(server)
        yield
    finally:
        client.leave(end)


def load_of(server: Server) -> float:
    """How much of a core the worker takes."""
    (worker,) = server.workers()
    return float(worker.cpu_percent(interval=0.2)) / 100


def wait_computing(server: Server) -> None:
    """Wait until the worker has taken 0.2 s more of processor time, however long a slow machine needs for that."""
    (worker,) = server.workers()
    before = processor_s(worker)
    wait_until(lambda: processor_s(worker) > before + 0.2, 60, server)


def idle(server: Server) -> bool:
    return load_of(server) < 0.1


# In compute


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("count", [1, 12])
def test_what_is_computed_stops(service: Server, photograph: bytes, end: str, count: int) -> None:
    with computing(service, slow(*[photograph] * count), end):
        assert not idle(service)


# In the queue


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize(
    "count",
    [
        pytest.param(1, id="in the worker"),
        pytest.param(30, id="in the server"),  # the worker is given no more requests while it has so many pictures
    ],
)
def test_what_waits_is_never_begun(service: Server, photograph: bytes, end: str, count: int) -> None:
    with computing(service, slow(*[photograph] * count)):
        waiting = [Leaver(service, slow(photograph).wire()) for _ in range(3)]
        behind = Leaver(service, case("behind", PATH, json=asked(photograph)).wire())
        for client in waiting:
            client.leave(end)
    assert behind.socket.recv(1000).startswith(b"HTTP/1.1 200 ")
    behind.leave(end)


@pytest.mark.parametrize("end", ENDS)
def test_half_a_body_is_no_request(service: Server, photograph: bytes, end: str) -> None:
    whole = slow(photograph).wire()
    for part in (whole[:40], whole[: len(whole) // 2], whole[:-1]):
        Leaver(service, part).leave(end)
    assert idle(service)


# In a batch with others


MANY = 600
"""Classes of each request: a batch computes them one after the other, for a second or more."""


@pytest.mark.parametrize("end", ENDS)
def test_batch_mates_are_answered_as_if_they_were_alone(service: Server, chelsea: bytes, end: str) -> None:
    requests = [many(file_of(resized(chelsea, 64 + 8 * number, 64)), number) for number in range(4)]

    def ask(request: Case) -> Reply:
        with service.client() as client:
            response = client.post(request.path, content=request.body, headers=dict(request.headers))
        assert response.status_code == 200, response.text
        return Reply(200, dict(response.headers), response.content)

    alone = [ask(request) for request in requests]
    with ThreadPoolExecutor(4) as pool:
        with computing(service, slow(chelsea)):  # so that the others wait, and then share a batch
            early, late = (Leaver(service, request.wire()) for request in requests[:2])
            staying = [pool.submit(ask, request) for request in requests]
            wait_until(lambda: connections(service) == 7, 60, service)
            early.leave(end)
        wait_computing(service)
        late.leave(end)
        together = [answer.result() for answer in staying]
    for one, other in zip(together, alone, strict=True):
        check_same(one, other, chaotic=False)
    assert len({computed(one) for one in together}) == 1, "they shared no batch"
    assert len({computed(one) for one in alone}) == 4


def many(picture: bytes, first: int) -> Case:
    classes = [(first + number) % 5 for number in range(MANY)]
    fields = {"target_classes": classes, "gen_params": {"scaling": "none"}, "format": "npy", "size": "model"}
    return case("many", PATH, json=asked(picture, **fields))


def computed(reply: Reply) -> str:
    """How long it was computed, to the microsecond: what shares a batch was computed together."""
    (duration,) = re.findall(r"compute;dur=([\d.]+)", reply.headers["server-timing"])
    return str(duration)


def connections(server: Server) -> int:
    """How many clients are connected."""
    found = psutil.Process(server.process.pid).net_connections("tcp")
    return sum(one.status == psutil.CONN_ESTABLISHED for one in found)


# After compute


@pytest.mark.parametrize("end", ENDS)
def test_an_answer_that_is_read_halfway_is_given_up(service: Server, chelsea: bytes, end: str) -> None:
    large = case("large", PATH, json=asked(*[chelsea] * 12, target_classes=[0, 1, 2], format="npy"))
    client = Leaver(service, large.wire())
    head = client.socket.recv(100_000)
    assert head.startswith(b"HTTP/1.1 200 ")
    length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    assert length > 20_000_000, "more than the sockets' buffers hold"
    client.leave(end)  # a FIN turns into a RST, for there is more to read
