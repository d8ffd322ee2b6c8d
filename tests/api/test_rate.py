"""The request rate: what a bucket holds, whom it counts for, and that Retry-After tells the truth."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest

from service.api.rate import MAX_CLIENTS, Rate
from service.keys import make_key
from tests.api.support import Api, check_problem

TICK = 1e-5


@pytest.mark.parametrize(
    ("per_second", "burst"), [(0.1, 1), (0.5, 1), (0.9, 1), (1, 2), (5, 10), (7.5, 15), (1000, 2000)]
)
def test_a_full_bucket_holds_two_seconds_and_at_least_one_request(per_second: float, burst: int) -> None:
    rate = Rate(per_second)
    assert [rate.take("ann", 100.0) for _ in range(burst)] == [0.0] * burst
    wait = rate.take("ann", 100.0)
    assert 0 < wait <= 1 / per_second + TICK
    assert rate.take("ann", 100.0) == wait  # who is refused loses nothing
    assert rate.take("ann", 100.0 + wait - TICK) > 0
    assert rate.take("ann", 100.0 + wait + TICK) == 0
    assert rate.take("ann", 100.0 + wait + TICK) > 0
    assert [rate.take("bob", 100.0) for _ in range(burst)] == [0.0] * burst


def test_who_never_stops_asking_gets_the_rate_and_the_burst() -> None:
    rate = Rate(5)
    answered = sum(rate.take("ann", step / 100) == 0 for step in range(100_000))
    assert answered == pytest.approx(10 + 5 * 1000, abs=1)


def test_a_bucket_never_holds_more_than_the_burst() -> None:
    rate = Rate(5)
    rate.take("ann", 0.0)
    assert sum(rate.take("ann", 1e6) == 0 for _ in range(20)) == 10


def test_clients_without_end_take_no_memory_without_end() -> None:
    rate = Rate(0.001)
    for number in range(2 * MAX_CLIENTS):
        rate.take(f"address {number}", 1.0)
        assert rate.take("ann", 1.0) == (0.0 if number == 0 else 1000.0)  # who keeps asking is not forgotten
    assert len(rate._full_at) == MAX_CLIENTS


def post(api: Api, address: str = "10.0.0.1", path: str = "/models/resnet/infer", **headers: str) -> httpx.Response:
    async def exchange() -> httpx.Response:
        transport = httpx.ASGITransport(app=api.app, client=(address, 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.post(path, content=b"x", headers={"content-type": "image/png", **headers})

    return asyncio.run(exchange())


def test_work_is_limited_by_address_and_the_rest_is_not() -> None:
    api = Api(max_rate=0.01)
    assert post(api).status_code == 200
    for path in ("/models/resnet/infer", "/models/resnet/heatmap", "/models/none/infer"):
        response = post(api, path=path)
        detail = check_problem(response, 429, "rate_limited")["detail"]
        assert "0.01 requests per second" in detail
        assert "10.0.0.1" in detail
        assert 90 < int(response.headers["retry-after"]) <= 100
    assert len(api.dispatcher.asked) == 1
    assert post(api, "10.0.0.2").status_code == 200
    for _ in range(20):
        assert {api.get(path).status_code for path in ("/models", "/methods", "/readyz", "/openapi.json")} == {200}


def test_with_keys_each_key_has_its_rate_from_wherever_it_comes(tmp_path: Path) -> None:
    made = {name: make_key(name, "predict") for name in ("ann", "bob")}
    (tmp_path / "keys").write_text("\n".join(line for _, line in made.values()))
    api = Api(max_rate=0.01, api_keys_file=tmp_path / "keys")
    for _ in range(3):  # who has no key spends nobody's
        assert post(api).status_code == post(api, **{"x-api-key": "wrong"}).status_code == 401
    for name, (key, _) in made.items():
        assert post(api, "10.0.0.1", **{"x-api-key": key}).status_code == 200
        detail = check_problem(post(api, "10.0.0.2", **{"x-api-key": key}), 429, "rate_limited")["detail"]
        assert f"key {name!r}" in detail


def test_no_rate_is_no_limit() -> None:
    api = Api()
    assert {post(api).status_code for _ in range(50)} == {200}
