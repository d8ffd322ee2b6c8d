"""Pictures of few bytes that take seconds to decode: beside them others are answered, and too slow ones are refused."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from PIL import Image

from tests.conftest import write_tiny
from tests.e2e.support import file_of, post
from tests.server import Server, running, wait_until

SIDES = (8000, 6000)
FLOOD = 30
ANSWER_S = 2.0
SLOW_S = 10.0


def scans(number: int) -> bytes:
    """A progressive JPEG whose last scan comes so often."""
    data = file_of(Image.new("RGB", SIDES, (3, 7, 77)), "JPEG", progressive=True)
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * number + data[-2:]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("slow")
    write_tiny(folder / "models" / "tiny")
    with running(folder, "--models", str(folder / "models"), "--grace-s", "0") as server:
        yield server


def in_flight(client: httpx.Client) -> float:
    (line,) = [line for line in client.get("/metrics").text.splitlines() if line.startswith("heatmap_queue_requests")]
    return float(line.split()[-1])


def test_a_quick_client_is_answered_beside_more_slow_pictures_than_a_worker_has_room(
    service: Server, chelsea: bytes
) -> None:
    slow = [file_of(Image.new("RGB", SIDES, (3, 7, 77)), "WEBP", lossless=True, method=0), scans(90)]
    with service.client() as client, ThreadPoolExecutor(FLOOD) as pool:
        under_way = [pool.submit(post, client, slow[number % 2], timeout_s=SLOW_S) for number in range(FLOOD)]
        wait_until(lambda: in_flight(client) == FLOOD, 30, service)
        for _ in range(5):
            started = time.monotonic()
            response = post(client, chelsea)
            assert response.status_code == 200, response.text
            assert time.monotonic() - started < ANSWER_S
        assert any(not one.done() for one in under_way), "they have not been answered before it"


def test_a_picture_that_decodes_too_long_is_refused(service: Server) -> None:
    with service.client() as client:
        refused = post(client, scans(400))
    assert (refused.status_code, refused.json()["code"]) == (413, "picture_too_slow")
    assert refused.json()["errors"][0]["pointer"] == "/images/0"
    assert "the limit is 5" in refused.json()["detail"]
