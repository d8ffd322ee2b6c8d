"""Alive, and ready or not."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

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


def test_metrics_count_every_request_by_how_it_ended() -> None:
    api = Api()
    api.raw()
    api.raw()
    api.json(colormap="no_such")
    api.get("/models/unknown")
    text = api.get("/metrics").text
    samples = {
        (sample.labels["status"], sample.labels["code"], sample.labels["outcome"]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "heatmap_http_requests_total"
    }
    assert samples == {
        ("200", "", "answered"): 2,
        ("422", "invalid_request", "refused"): 1,
        ("404", "model_not_found", "refused"): 1,
    }
    stages = 'heatmap_stage_seconds_sum{model="resnet",stage='
    told = {line.split('"')[3]: float(line.split()[-1]) for line in text.splitlines() if line.startswith(stages)}
    assert told == {"queue": 2 * 0.001, "decode": 2 * 0.002, "compute": 2 * 0.003, "render": 2 * 0.004}
