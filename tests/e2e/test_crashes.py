"""Crashes, hangs, lost devices and full memory, each brought about for real by a picture, beside innocent requests."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import write_tiny
from tests.e2e.support import RAW, map_of, only, post, results, same_map
from tests.fragile import Fault, harmless, picture_of, write_deadly, write_fragile
from tests.server import Server, running, wait_until

HANG_S = 5.0
INNOCENTS = 6


@pytest.fixture(scope="module")
def fragile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("fragile")
    write_fragile(folder / "models" / "fragile")
    write_fragile(folder / "models" / "other")
    options = ("--models", str(folder / "models"), "--hang-s", str(HANG_S), "--activation-cache", "0")
    with running(folder, *options) as server:
        yield server


@pytest.fixture
def client(fragile: Server) -> Iterator[httpx.Client]:
    fragile.wait_ready()
    with fragile.client() as one:
        yield one


def ask(client: httpx.Client, picture: bytes, **fields: Any) -> httpx.Response:
    return post(client, picture, "fragile", **fields)


def worker_of(server: Server) -> int:
    wait_until(lambda: len(server.workers()) == 1, 60, server)
    (worker,) = server.workers()
    return worker.pid


def answered_beside(client: httpx.Client, guilty: bytes) -> httpx.Response:
    """The answer to the guilty picture. Innocents in the same queue, and batches, are answered as they are alone."""
    pictures = [harmless(number) for number in range(INNOCENTS)]
    alone = [map_of(only(client, picture, "fragile", **RAW)) for picture in pictures]
    with ThreadPoolExecutor(2 * INNOCENTS + 1) as pool:
        slow = pool.submit(post, client, [picture_of(Fault.TAKE_TIME)] * 4, "fragile")  # the others wait, and meet
        company: list[Future[httpx.Response]] = []
        for number, picture in enumerate(pictures):
            company.append(pool.submit(post, client, picture, "fragile", **RAW))
            if number == INNOCENTS // 2:
                answer = pool.submit(ask, client, guilty, **RAW)
        assert slow.result().status_code == 200
        for one, expected in zip(company, alone, strict=True):
            response = one.result()
            assert response.status_code == 200, response.text
            assert same_map(map_of(response.json()["results"][0]["heatmaps"][0]), expected, 1e-4)
        return answer.result()


def test_a_picture_that_crashes_its_worker_twice_while_alone_is_quarantined(
    fragile: Server, client: httpx.Client
) -> None:
    guilty = picture_of(Fault.SEGFAULT)
    before = worker_of(fragile)
    first = ask(client, guilty)
    assert (first.status_code, first.json()["code"]) == (422, "picture_quarantined"), first.text
    assert [place["pointer"] for place in first.json()["errors"]] == ["/images/0"]
    fragile.wait_ready()
    survivor = worker_of(fragile)
    assert survivor != before
    again = ask(client, guilty)
    assert (again.status_code, again.json()["code"]) == (422, "picture_quarantined")
    beside = post(client, [harmless(0), guilty], "fragile")
    assert (beside.status_code, beside.json()["errors"][0]["pointer"]) == (422, "/images/1")
    elsewhere = post(client, guilty, "other")
    assert elsewhere.status_code == 422
    assert ask(client, harmless(0)).status_code == 200
    assert worker_of(fragile) == survivor, "what is known to crash is not tried again"


@pytest.mark.parametrize("fault", [Fault.ABORT, Fault.LOSE_DEVICE])
def test_only_the_guilty_request_fails(fragile: Server, client: httpx.Client, fault: Fault) -> None:
    before = worker_of(fragile)
    response = answered_beside(client, picture_of(fault, size=40))
    assert response.status_code in (422, 503), response.text
    assert response.json()["code"] in ("picture_quarantined", "worker_lost")
    fragile.wait_ready()
    assert worker_of(fragile) != before
    assert ask(client, harmless(1)).status_code == 200


def test_a_lost_device_is_no_fault_of_the_picture(fragile: Server, client: httpx.Client) -> None:
    for _ in range(2):
        response = ask(client, picture_of(Fault.LOSE_DEVICE))
        assert (response.status_code, response.json()["code"]) == (503, "worker_lost")
        fragile.wait_ready()
    assert "the device is lost to this process" in fragile.log.read_text()


def test_a_worker_that_hangs_is_replaced(fragile: Server, client: httpx.Client) -> None:
    before = worker_of(fragile)
    response = answered_beside(client, picture_of(Fault.HANG))
    assert (response.status_code, response.json()["code"]) == (503, "worker_lost"), response.text
    assert f"shows no progress for {HANG_S:g} s" in fragile.log.read_text()
    fragile.wait_ready()
    assert worker_of(fragile) != before


def test_a_picture_that_hangs_its_worker_twice_while_alone_is_quarantined(
    fragile: Server, client: httpx.Client
) -> None:
    guilty = picture_of(Fault.HANG, size=48)
    first = ask(client, guilty)
    assert (first.status_code, first.json()["code"]) == (422, "picture_quarantined"), first.text
    fragile.wait_ready()
    survivor = worker_of(fragile)
    assert ask(client, guilty).status_code == 422
    assert ask(client, harmless(0)).status_code == 200
    assert worker_of(fragile) == survivor


def test_a_worker_that_is_stopped_from_outside_is_replaced_and_costs_nobody_an_answer(
    fragile: Server, client: httpx.Client
) -> None:
    (worker,) = fragile.workers()
    worker.send_signal(signal.SIGSTOP)
    with ThreadPoolExecutor(INNOCENTS) as pool:
        answers = list(pool.map(lambda number: ask(client, harmless(number)), range(INNOCENTS)))
    assert [answer.status_code for answer in answers] == [200] * INNOCENTS
    assert worker_of(fragile) != worker.pid


def test_what_is_slow_but_moves_on_does_not_hang(fragile: Server, client: httpx.Client) -> None:
    before = worker_of(fragile)
    response = post(
        client, [picture_of(Fault.TAKE_TIME, size=32 + number) for number in range(60)], "fragile", timeout_s=120
    )
    assert response.status_code == 200
    assert float(response.headers["Server-Timing"].rpartition("dur=")[2]) > HANG_S * 1000
    assert worker_of(fragile) == before


def test_a_batch_that_needs_too_much_memory_is_split(fragile: Server, client: httpx.Client) -> None:
    before = worker_of(fragile)
    hungry = [picture_of(Fault.OUT_OF_MEMORY_IN_COMPANY, size=32 + number) for number in range(5)]
    found = results(client, [*hungry, harmless(2)], "fragile", **RAW)
    assert same_map(map_of(found[5]["heatmaps"][0]), map_of(only(client, harmless(2), "fragile", **RAW)), 1e-4)
    assert worker_of(fragile) == before


def test_a_picture_for_which_there_is_no_memory_is_a_507_and_the_next_is_fine(
    fragile: Server, client: httpx.Client
) -> None:
    before = worker_of(fragile)
    response = answered_beside(client, picture_of(Fault.OUT_OF_MEMORY))
    assert (response.status_code, response.json()["code"]) == (507, "out_of_device_memory")
    assert ask(client, harmless(3)).status_code == 200
    assert worker_of(fragile) == before


def test_a_file_of_the_repository_that_is_gone_costs_the_replaced_worker_that_model_alone(tmp_path: Path) -> None:
    for name in ("fragile", "other"):
        write_fragile(tmp_path / "models" / name)
    with running(tmp_path, "--models", str(tmp_path / "models")) as server, server.client() as client:
        (tmp_path / "models" / "other" / "model.toml").unlink()
        server.workers()[0].kill()
        wait_until(lambda: client.get("/models/other").json()["state"] == "failed", 60, server)
        server.wait_ready()
        assert ask(client, harmless(4)).status_code == 200
        refused = post(client, harmless(4), "other")
        assert (refused.status_code, refused.json()["code"]) == (503, "model_failed")


def test_a_model_whose_load_crashes_costs_nobody_the_others(tmp_path: Path) -> None:
    write_deadly(tmp_path / "models" / "deadly")  # loaded first
    write_tiny(tmp_path / "models" / "tiny")
    with running(tmp_path, "--models", str(tmp_path / "models")) as server, server.client() as client:
        failed = post(client, harmless(0), "deadly")
        assert (failed.status_code, failed.json()["code"]) == (503, "model_failed")
        assert "two workers in a row died" in failed.json()["detail"]
        worker = worker_of(server)
        assert post(client, harmless(0)).status_code == 200
        assert worker_of(server) == worker
