"""Every error is a problem, whatever raised it, and never shows a traceback."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from fastapi import FastAPI, HTTPException

from service.errors import (
    DeadlineExceeded,
    FieldError,
    OutOfDeviceMemory,
    QueueFull,
    ServiceError,
    UnknownLayer,
    WorkerLost,
)
from tests.api.support import Api, ask, check_problem


@pytest.fixture
def api() -> Api:
    return Api()


@pytest.mark.parametrize(
    ("error", "retry_after"),
    [
        (QueueFull("full", retry_after=0.2), "1"),
        (QueueFull("full", retry_after=2.1), "3"),
        (WorkerLost("died", retry_after=5), "5"),
        (OutOfDeviceMemory("too large"), None),
    ],
)
def test_errors_of_the_service(api: Api, error: ServiceError, retry_after: str | None) -> None:
    api.dispatcher.failure = error
    response = api.raw(accept="image/png")
    problem = check_problem(response, error.status, error.code)
    assert (problem["title"], problem["detail"]) == (error.title, error.detail)
    assert problem["instance"] == "/models/resnet/heatmap"
    assert "errors" not in problem
    assert response.headers.get("retry-after") == retry_after


def test_errors_point_at_the_input(api: Api) -> None:
    api.dispatcher.failure = UnknownLayer("no such", errors=(FieldError("/gen_params/target_conv_layer", "no such"),))
    problem = check_problem(api.raw(), 422, "unknown_layer")
    assert problem["errors"] == [{"pointer": "/gen_params/target_conv_layer", "detail": "no such"}]


def test_a_deadline_is_told_in_the_clients_number(api: Api) -> None:
    api.dispatcher.failure = DeadlineExceeded("within what was left")
    assert "its 7 seconds" in check_problem(api.raw("timeout_s=7"), 504, "deadline_exceeded")["detail"]


def test_a_defect_is_logged_and_not_shown(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    api.dispatcher.failure = RuntimeError("the secret")
    with caplog.at_level(logging.ERROR):
        response = api.raw()
    check_problem(response, 500, "internal_error")
    assert "secret" not in response.text
    assert "Traceback" not in response.text
    (record,) = [record for record in caplog.records if record.exc_info]
    assert response.headers["x-request-id"] in record.getMessage()


@pytest.mark.parametrize("path", ["/modles", "/models/a/b/c", "/%2e%2e/etc", "/\u00e4%0A", "/" + "x" * 5000])
def test_unknown_paths(api: Api, path: str) -> None:
    problem = check_problem(api.get(path), 404, "path_not_found")
    assert len(problem["detail"]) < 1000
    if path == "/modles":
        assert "'/models'" in problem["detail"]


@pytest.mark.parametrize("model_id", ["resnt", "..%5c", "%00", "a" * 300, "%22%3Cscript%3E"])
@pytest.mark.parametrize("suffix", ["", "/layers", "/classes"])
def test_unknown_models(api: Api, model_id: str, suffix: str) -> None:
    problem = check_problem(api.get(f"/models/{model_id}{suffix}"), 404, "model_not_found")
    if model_id == "resnt":
        assert "'resnet'" in problem["detail"]


def test_unknown_models_are_told_before_the_body_is_judged(api: Api) -> None:
    for endpoint in ("heatmap", "infer"):
        check_problem(api.post(f"/models/resnt/{endpoint}", content=b"?"), 404, "model_not_found")


def test_wrong_verbs(api: Api) -> None:
    for method, url, allowed in (
        ("GET", "/models/a/heatmap", "POST"),
        ("POST", "/livez", "GET, HEAD"),
        ("OPTIONS", "/models", "GET, HEAD"),
        ("PUT", "/openapi.json", "GET, HEAD"),
        ("POST", "/", "GET, HEAD"),
    ):
        response = ask(api.app, method, url)
        assert allowed in check_problem(response, 405, "method_not_allowed")["detail"]
        assert response.headers["allow"] == allowed
    refused = ask(api.app, "HEAD", "/models/a/heatmap")
    assert (refused.status_code, refused.headers["allow"]) == (405, "POST")


def test_what_others_raise_in_the_app(api: Api) -> None:
    """The composition root may add routes of its own; an error with no code of ours is a defect."""
    add_routes(api.app)
    problem = check_problem(api.get("/teapot"), 500, "internal_error")
    assert "stout" not in problem["detail"]
    problem = check_problem(api.get("/number?value=many"), 422, "invalid_request")
    assert "integer" in problem["detail"]


def add_routes(app: FastAPI) -> None:
    @app.get("/teapot")
    async def teapot() -> Any:
        raise HTTPException(418, "short and stout")

    @app.get("/number")
    async def number(value: int) -> Any:
        return value
