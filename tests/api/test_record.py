"""The line of each request: every field as the request had it, every outcome, and nothing that is nobody's business."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.responses import StreamingResponse
from starlette.types import Message

from service.api.negotiation import JSON
from service.errors import DeadlineExceeded, OutOfDeviceMemory, QueueFull, UndecodablePicture, WorkerLost
from service.keys import make_key
from service.logs import Json, Text
from service.workers.messages import Answer, ExplainRequest
from tests.api.support import Api, StandIn, ask, heatmap, make_app
from tests.api.test_body import scope_of
from tests.api.test_disconnect import Endless

STAGES = {"queue_ms": 1.0, "decode_ms": 2.0, "compute_ms": 3.0, "render_ms": 4.0}


@pytest.fixture(autouse=True)
def _everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "service")


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """The fields of all requests that were logged, without those that say nothing."""
    records = [record for record in caplog.records if record.getMessage() == "request"]
    return [{name: value for name, value in vars(record)["fields"].items() if value is not None} for record in records]


def last(caplog: pytest.LogCaptureFixture) -> dict[str, Any]:
    return lines(caplog)[-1]


def test_an_answered_request(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    key, line = make_key("ann", "predict")
    (tmp_path / "keys").write_text(line)
    response = Api(api_keys_file=tmp_path / "keys").raw(
        "method=grad_cam&method=guided_grad_cam&target_classes=secret", **{"x-api-key": key, "x-request-id": "abc"}
    )
    assert response.status_code == 200
    (fields,) = lines(caplog)
    assert fields.pop("total_ms") > 0
    assert fields == {
        "request_id": "abc",
        "method": "POST",
        "path": "/models/resnet/heatmap",
        "model": "resnet",
        "methods": ["grad_cam", "guided_grad_cam"],
        "pictures": 1,
        "status": 200,
        "key": "ann",
        **STAGES,
        "outcome": "answered",
    }
    for formatter in (Text("server"), Json("server")):
        whole = "\n".join(formatter.format(record) for record in caplog.records)
        assert not any(part in whole for part in (key, line.split()[2], "secret", "picture\n", "target_classes"))


@pytest.mark.parametrize(
    ("failure", "status", "outcome"),
    [
        (UndecodablePicture("no such"), 422, "refused"),
        (QueueFull("full"), 429, "refused"),
        (RuntimeError("a defect"), 500, "failed"),
        (WorkerLost("died"), 503, "failed"),
        (OutOfDeviceMemory("too large"), 507, "failed"),
        (DeadlineExceeded("late"), 504, "timed_out"),
    ],
)
def test_outcomes(caplog: pytest.LogCaptureFixture, failure: Exception, status: int, outcome: str) -> None:
    api = Api()
    api.dispatcher.failure = failure
    code = api.json("/models/resnet/infer", images=["AA", "AA"]).json()["code"]
    fields = last(caplog)
    assert (fields["status"], fields["code"], fields["outcome"], fields["pictures"]) == (status, code, outcome, 2)
    assert not {"compute_ms", "methods", "key"} & fields.keys()


def test_what_is_refused_earlier_says_less(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(make_key("ann", "admin")[1])
    api = Api(api_keys_file=tmp_path / "keys")
    for method, url, status, code, model in (
        ("POST", "/models/resnet/heatmap", 401, "key_missing", "resnet"),
        ("GET", "/nowhere?a=b", 404, "path_not_found", None),
        ("DELETE", "/models", 405, "method_not_allowed", None),
        ("HEAD", "/models/nobody", 401, "key_missing", "nobody"),
    ):
        ask(api.app, method, url)
        fields = last(caplog)
        assert (fields["method"], fields["path"], fields["status"], fields["code"]) == (
            method,
            url[:22].partition("?")[0],
            status,
            code,
        )
        assert (fields["outcome"], fields.get("model")) == ("refused", model)


def test_a_client_that_left(caplog: pytest.LogCaptureFixture) -> None:
    dispatcher = Endless()
    messages = iter([{"type": "http.request", "body": b"abc", "more_body": False}])

    async def receive() -> Message:
        for message in messages:
            return message
        await dispatcher.began.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        raise AssertionError(message)

    asyncio.run(make_app(dispatcher)(scope_of("image/png"), receive, send))
    fields = last(caplog)
    assert (fields["outcome"], fields["model"], fields["pictures"]) == ("cancelled", "resnet", 1)
    assert "status" not in fields


def test_half_an_answer_is_a_failure(caplog: pytest.LogCaptureFixture) -> None:
    api = Api()
    add_broken_route(api.app)
    with pytest.raises(RuntimeError, match="in the middle"):
        api.get("/broken")
    fields = last(caplog)
    assert (fields["status"], fields["outcome"]) == (200, "failed")


def add_broken_route(app: FastAPI) -> None:
    @app.get("/broken")
    async def broken() -> StreamingResponse:
        async def chunks() -> Any:
            yield b"half"
            raise RuntimeError("in the middle")

        return StreamingResponse(chunks())


class Incomplete(StandIn):
    """Answers with maps that have these completeness errors, request by request."""

    def __init__(self, *errors: tuple[float | None, ...]) -> None:
        super().__init__()
        self.errors = iter(errors)

    async def explain(self, request: ExplainRequest, size_bytes: int, timeout_s: float) -> Answer:
        maps = tuple(heatmap(completeness_error=error) for error in next(self.errors))
        answer = await super().explain(request, size_bytes, timeout_s)
        return replace(answer, results=tuple(replace(result, heatmaps=maps) for result in answer.results))


def test_a_request_is_a_warning_for_incomplete_maps_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    api = Api(Incomplete((0.049, None), (0.01, 0.051, 0.4, None), (None,), ()))
    for name in ("good", "bad", "none", "without"):
        api.post(content=b"picture", headers={"content-type": "image/png", "accept": JSON, "x-request-id": name})
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING", "INFO", "INFO"]
    assert [(fields["request_id"], fields.get("completeness_error")) for fields in lines(caplog)] == [
        ("good", None),
        ("bad", 0.4),
        ("none", None),
        ("without", None),
    ]
    caplog.clear()
    Api(Incomplete((0.051,))).raw()
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_probes_are_logged_at_debug_and_preflights_as_requests(caplog: pytest.LogCaptureFixture) -> None:
    api = Api(cors_origins="https://page.test")
    ask(api.app, "OPTIONS", "/models", headers={"Origin": "https://page.test", "Access-Control-Request-Method": "GET"})
    assert (last(caplog)["method"], last(caplog)["outcome"]) == ("OPTIONS", "answered")
    caplog.clear()
    for path in ("/livez", "/readyz", "/metrics"):
        api.get(path)
    assert [record.levelno for record in caplog.records] == [logging.DEBUG] * 3
    caplog.set_level(logging.INFO, "service")
    caplog.clear()
    api.get("/livez")
    assert not caplog.records
    api.get("/models")
    assert [record.levelno for record in caplog.records] == [logging.INFO]


@pytest.mark.parametrize("formatter", [Text("server"), Json("server")], ids=["text", "json"])
def test_no_client_writes_a_line_of_its_own(caplog: pytest.LogCaptureFixture, formatter: logging.Formatter) -> None:
    api = Api()
    evil = "%0A2026-11-21T20:15:52.123Z%20INFO%20%1B%5B31m%E2%80%A8%22%20key=root%FF"
    api.get(f"/models/{evil}/layers", headers={"x-request-id": "a b", "x-forwarded-for": "1\t2"})
    api.raw("method=" + evil)
    ask(api.app, "E" * 5000, "/" + "x" * 60_000)
    for record in caplog.records:
        line = formatter.format(record)
        assert line.isprintable()
        assert len(line) < 2000
        assert " key=" not in line.replace('\\" key=', "")
    assert len(lines(caplog)) == 3
