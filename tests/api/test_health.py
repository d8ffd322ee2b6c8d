"""Alive, and ready or not."""

from __future__ import annotations

from tests.api.support import FAILED, LOADING, READY, Api, StandIn


def test_alive() -> None:
    response = Api(StandIn(LOADING, serves=False)).get("/livez")
    assert (response.status_code, response.json()) == (200, {"status": "alive"})


def test_ready_although_a_model_failed() -> None:
    response = Api(StandIn(READY, FAILED)).get("/readyz")
    assert (response.status_code, response.json()) == (
        200,
        {"status": "ready", "failed_models": {"broken": "no weights"}},
    )


def test_not_ready_says_why() -> None:
    response = Api(StandIn(LOADING, FAILED, serves=False)).get("/readyz")
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) >= 1
    assert response.json() == {
        "status": "not_ready",
        "reasons": ["no worker serves", "model slow is loading"],
        "failed_models": {"broken": "no weights"},
    }
