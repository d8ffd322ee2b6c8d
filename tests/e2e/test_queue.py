"""The queue's bound and what it says of itself: never passed, told at once, and true; deadlines drop the work."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import write_tiny
from tests.e2e.support import post
from tests.server import Server, running, wait_until

MAX_QUEUE = 8
SLOW: dict[str, Any] = {"method": "rise", "gen_params": {"n": 6000}, "timeout_s": 120}


@pytest.fixture(scope="module")
def bounded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("bounded")
    write_tiny(folder / "models" / "tiny")
    with running(folder, "--models", str(folder / "models"), "--max-queue", str(MAX_QUEUE)) as server:
        yield server


@pytest.fixture
def client(bounded: Server) -> Iterator[httpx.Client]:
    with bounded.client(timeout=180) as one:
        wait_until(lambda: held(one) == 0, 60, bounded)
        yield one


def held(client: httpx.Client) -> float:
    families = text_string_to_metric_families(client.get("/metrics").text)
    return next(one.samples[0].value for one in families if one.name == "heatmap_queue_requests")


def test_a_full_queue_is_told_at_once_and_the_time_to_come_again_is_true(
    bounded: Server, client: httpx.Client, chelsea: bytes
) -> None:
    assert post(client, chelsea, **SLOW).status_code == 200  # what it costs is known from here on
    with ThreadPoolExecutor(MAX_QUEUE) as pool:
        waiting = [pool.submit(post, client, chelsea, **SLOW) for _ in range(MAX_QUEUE // 2)]
        wait_until(lambda: held(client) == MAX_QUEUE // 2, 60, bounded)
        told = []
        while (refused := post(client, chelsea, **SLOW)).status_code == 429:
            assert refused.json()["code"] == "queue_full"
            assert f"at most {MAX_QUEUE // 2}" in refused.json()["detail"]
            told.append(int(refused.headers["Retry-After"]))
            assert post(client, chelsea).status_code == 200, "quick requests have room"
            time.sleep(told[-1])
        assert refused.status_code == 200
        assert 1 <= len(told) <= 10, told  # once where nothing else keeps the machine busy
        assert [answer.result().status_code for answer in waiting] == [200] * len(waiting)


def test_the_depth_never_passes_its_bound(bounded: Server, client: httpx.Client, chelsea: bytes) -> None:
    with ThreadPoolExecutor(4 * MAX_QUEUE) as pool:
        asking = [pool.submit(post, client, [chelsea] * 8) for _ in range(4 * MAX_QUEUE)]
        depths = []
        while not all(answer.done() for answer in asking):
            depths.append(held(client))
        statuses = {answer.result().status_code for answer in asking}
    assert max(depths) <= MAX_QUEUE
    assert statuses == {200, 429}


def test_a_deadline_in_compute_drops_the_work_at_its_next_step(
    bounded: Server, client: httpx.Client, chelsea: bytes
) -> None:
    long = {**SLOW, "gen_params": {"n": 20_000}}
    began = time.monotonic()
    late = post(client, [chelsea] * 8, **{**long, "timeout_s": 0.5})
    assert (late.status_code, late.json()["code"]) == (504, "deadline_exceeded")
    assert "0.5 seconds" in late.json()["detail"]
    assert post(client, chelsea).status_code == 200
    assert time.monotonic() - began < 25, "the device is free again"
    again = post(client, [chelsea] * 8, **{**long, "timeout_s": 0.5})
    assert (again.status_code, again.json()["code"]) == (504, "deadline_too_short"), "and it has learned"


def test_a_deadline_in_the_queue_drops_the_request(bounded: Server, client: httpx.Client, chelsea: bytes) -> None:
    with ThreadPoolExecutor(1) as pool:
        before = pool.submit(post, client, [chelsea] * 4, **SLOW)
        wait_until(lambda: held(client) == 1, 60, bounded)
        late = post(client, chelsea, priority="batch", method="score_cam", timeout_s=0.1)
        assert (late.status_code, late.json()["code"]) == (504, "deadline_exceeded")
        assert held(client) == 1
        assert before.result().status_code == 200
