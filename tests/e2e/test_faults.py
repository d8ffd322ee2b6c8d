"""Killed workers, signals and the server's death, injected for real into a server of its own."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from service.app import SAME_SIGNAL_S
from tests.conftest import write_tiny
from tests.server import Server, is_worker, running, wait_until
from tests.threads import repeating

pytestmark = pytest.mark.alone

RECOVERY_S = 100.0  # ten times the target: the machines that run tests are shared


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of the embedded model whose workers may be killed."""
    folder = tmp_path_factory.mktemp("victim")
    (folder / "temporary").mkdir()
    with running(folder, TMPDIR=str(folder / "temporary")) as server:
        yield server


@pytest.fixture
def mortal(tmp_path: Path) -> Iterator[Server]:
    """A server that a test may bring to its end."""
    write_tiny(tmp_path / "models" / "tiny")
    (tmp_path / "temporary").mkdir()
    with running(tmp_path, "--models", str(tmp_path / "models"), TMPDIR=str(tmp_path / "temporary")) as server:
        yield server


def explain_slowly(server: Server, picture: bytes) -> httpx.Response:
    """A request of some seconds: many pictures, several maps of each, in the picture's own size."""
    with server.client() as client:
        model = client.get("/models").json()["models"][0]["id"]
        return client.post(
            f"/models/{model}/heatmap",
            files=[("images", picture)] * 32,
            data={"method": "guided_grad_cam", "target_classes": ["0", "1", "2"], "timeout_s": "300"},
        )


def in_flight(server: Server, picture: bytes, pool: ThreadPoolExecutor) -> Future[httpx.Response]:
    """A slow request that has reached the worker."""
    answer = pool.submit(explain_slowly, server, picture)
    wait_until(lambda: server.given() > 0, 60, server)
    assert not answer.done()
    return answer


def test_a_killed_worker_costs_no_accepted_request(victim: Server, chelsea: bytes) -> None:
    (worker,) = victim.workers()

    def readiness() -> int:
        time.sleep(0.01)
        return client.get("/readyz").status_code

    with victim.client() as client, repeating(readiness) as seen, ThreadPoolExecutor(1) as pool:
        wait_until(lambda: seen, 60, victim)
        answer = in_flight(victim, chelsea, pool)
        killed = time.monotonic()
        worker.kill()
        response = answer.result()
        recovered = time.monotonic() - killed
        victim.wait_ready()
        asked = len(seen)
        wait_until(lambda: len(seen) > asked + 1, 60, victim)
    assert response.status_code == 200, response.text
    assert len(response.json()["results"]) == 32
    assert recovered < RECOVERY_S
    assert 503 in seen
    assert seen[0] == seen[-1] == 200
    assert [process.pid for process in victim.workers()] != [worker.pid]


def test_a_worker_that_dies_twice_under_a_request_costs_it_a_typed_503(victim: Server, chelsea: bytes) -> None:
    with ThreadPoolExecutor(1) as pool:
        answer = in_flight(victim, chelsea, pool)
        for _ in range(2):
            wait_until(lambda: victim.given() > 0 or answer.done(), 60, victim)
            (worker,) = victim.workers()
            worker.kill()
            wait_until(lambda pid=worker.pid: [w.pid for w in victim.workers()] not in ([], [pid]), 60, victim)
            if not answer.done():
                victim.wait_ready()
        response = answer.result()
    assert response.status_code == 503
    assert response.json()["code"] == "worker_lost"
    assert int(response.headers["Retry-After"]) >= 1


def test_the_process_that_workers_are_forked_from_may_die_too(victim: Server, chelsea: bytes) -> None:
    victim.wait_ready()
    with ThreadPoolExecutor(1) as pool:
        answer = in_flight(victim, chelsea, pool)
        for process in (*victim.templates(), *victim.workers()):
            process.kill()
        assert answer.result().status_code == 200
    victim.wait_ready()
    (template,) = victim.templates()
    template.kill()  # alone: its worker, an orphan now, serves on
    with victim.client() as client:
        for _ in range(3):
            assert client.post("/models/efficientnet_lite0/heatmap", files={"image": chelsea}).status_code == 200
    orphans = [process for process in psutil.process_iter() if is_worker(process) and serves(process, victim)]
    assert len(orphans) == 1
    orphans[0].kill()
    with victim.client() as client:
        wait_until(lambda: client.get("/readyz").status_code == 503, 60, victim)
    victim.wait_ready()


def serves(process: psutil.Process, server: Server) -> bool:
    """Whether this is a worker of that server, found by its temporary folder, whoever its parent is."""
    folder = server.log.parent / "temporary"  # which no other server on the machine uses
    return any(str(process.pid) == path.name for path in folder.glob("heatmap-service-*/*"))


def test_without_a_worker_new_requests_get_a_typed_503_and_probes_answer(victim: Server, chelsea: bytes) -> None:
    with victim.client() as client:
        (worker,) = victim.workers()
        worker.kill()
        wait_until(lambda: client.get("/readyz").status_code == 503, 60, victim)
        refused = client.post("/models/efficientnet_lite0/heatmap", files={"image": chelsea})
        assert (refused.status_code, refused.json()["code"]) == (503, "no_worker")
        assert "Retry-After" in refused.headers
        assert client.get("/livez").status_code == 200
        assert client.get("/models/efficientnet_lite0").json()["state"] == "ready"
        victim.wait_ready()
        assert client.post("/models/efficientnet_lite0/heatmap", files={"image": chelsea}).status_code == 200


def test_sigterm_answers_what_was_accepted_refuses_the_rest_and_leaves_nobody(mortal: Server, chelsea: bytes) -> None:
    family = mortal.family()
    with ThreadPoolExecutor(1) as pool, mortal.client() as client:
        client.get("/livez")  # a connection that is open before the server closes its door
        answer = in_flight(mortal, chelsea, pool)
        mortal.signal(signal.SIGTERM)
        wait_until(lambda: client.get("/readyz").status_code == 503, 60, mortal)
        refused = client.post("/models/tiny/heatmap", files={"image": chelsea})
        assert (refused.status_code, refused.json()["code"]) == (503, "draining")
        assert answer.result().status_code == 200
    assert mortal.wait_exit(timeout_s=60) == 0
    wait_until(lambda: not any(process.is_running() for process in family), 60, mortal)


def test_sigkill_of_the_server_takes_the_workers_along(mortal: Server, chelsea: bytes, tmp_path: Path) -> None:
    (folder,) = (tmp_path / "temporary").glob("heatmap-service-*")
    family = mortal.family()
    assert mortal.workers()
    with ThreadPoolExecutor(1) as pool:
        answer = in_flight(mortal, chelsea, pool)
        mortal.signal(signal.SIGKILL)
        with pytest.raises(httpx.TransportError):
            answer.result()
    mortal.wait_exit(timeout_s=60)
    wait_until(lambda: not any(alive(process) for process in family), 60, mortal)
    assert not folder.exists()


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def accepted(server: Server) -> bool:
    with server.client() as client:
        return "heatmap_queue_requests 1.0" in client.get("/metrics").text


@pytest.mark.parametrize("step", ["start", "drain", "stop"])
def test_a_second_sigterm_ends_all_at_once(tmp_path: Path, chelsea: bytes, step: str) -> None:
    write_tiny(tmp_path / "models" / "tiny")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    options = ["--models", str(tmp_path / "models"), "--grace-s", "0" if step == "stop" else "60"]
    ready = step != "start"
    with running(tmp_path, *options, ready=ready, TMPDIR=str(temporary)) as server, ThreadPoolExecutor(1) as pool:
        if ready:
            pool.submit(explain_slowly, server, chelsea)  # its worker is busy: it is not answered, or stops late
            wait_until(lambda: accepted(server), 10, server)
        family = server.family()
        server.signal(signal.SIGTERM)
        server.signal(signal.SIGTERM)  # as make or a process group passes it on: it counts as one
        if step == "drain":
            with server.client() as client:
                wait_until(lambda: client.get("/readyz").status_code == 503, 5, server)
        else:
            wait_until(lambda: "Waiting for application shutdown" in server.log.read_text(), 10, server)
        time.sleep(SAME_SIGNAL_S)
        assert server.process.poll() is None
        server.signal(signal.SIGTERM)
        assert server.wait_exit(timeout_s=4) == 128 + signal.SIGTERM
        wait_until(lambda: not any(alive(process) for process in family), 10, server)
    assert not list(temporary.glob("heatmap-service-*"))
