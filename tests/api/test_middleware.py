"""What frames every answer: the request's id and the stages' times."""

from __future__ import annotations

import re

import pytest

from service.api.middleware import server_timing
from service.workers.messages import Timings
from tests.api.support import Api, ask

PREFLIGHT = {"Origin": "https://page.test", "Access-Control-Request-Method": "POST"}
STAGES = ["queue", "decode", "compute", "render", "total"]


@pytest.mark.parametrize("request_id", ["a", "A-b_c.9", "x" * 128])
def test_a_sane_request_id_is_echoed(request_id: str) -> None:
    response = Api().raw(**{"x-request-id": request_id})
    assert response.headers["x-request-id"] == response.json()["request_id"] == request_id


@pytest.mark.parametrize("request_id", ["", "x" * 129, "a b", "a\tb", "é".encode("latin-1")])
def test_any_other_is_made_anew(request_id: str | bytes) -> None:
    response = Api().get(
        "/livez", headers=[(b"x-request-id", request_id if isinstance(request_id, bytes) else request_id.encode())]
    )
    assert re.fullmatch("[0-9a-f]{32}", response.headers["x-request-id"])


def test_times_are_in_milliseconds() -> None:
    timings = Timings(queue=0.0015, decode=0.002, compute=1, render=0)
    assert (
        server_timing(timings, 1.5)
        == "queue;dur=1.500, decode;dur=2.000, compute;dur=1000.000, render;dur=0.000, total;dur=1500.000"
    )


def test_no_answer_is_taken_for_what_it_does_not_say_it_is() -> None:
    api = Api(cors_origins="https://page.test")
    answers = [api.raw(), api.raw(accept="image/png"), api.raw("top_k=x"), api.get("/nowhere"), api.get("/docs")]
    api.dispatcher.failure = RuntimeError("a defect")
    answers += [api.raw(), ask(api.app, "OPTIONS", "/models", headers=PREFLIGHT)]
    assert [answer.status_code for answer in answers] == [200, 200, 422, 404, 200, 500, 200]
    for answer in answers:
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-request-id"]


def test_a_page_of_a_listed_origin_may_read_a_defect_too() -> None:
    for origins, expected in (("https://page.test", "https://page.test"), ("https://other.test", None), ("", None)):
        api = Api(cors_origins=origins)
        api.dispatcher.failure = RuntimeError("a defect")
        response = api.raw(origin="https://page.test")
        assert response.status_code == 500
        assert response.headers.get("access-control-allow-origin") == expected


HEADS = ["/livez", "/models", "/models/resnet/classes?query=a", "/models/resnt", "/metrics", "/docs", "/", "/nowhere"]


@pytest.mark.parametrize("url", [*HEADS, "/openapi.json"])
def test_head_is_answered_as_get_without_the_body(url: str) -> None:
    api = Api()
    got, head = (ask(api.app, verb, url, headers={"x-request-id": "same"}) for verb in ("GET", "HEAD"))
    assert (head.status_code, head.content) == (got.status_code, b"")
    for headers in (got.headers, head.headers):
        del headers["server-timing"]
    if url != "/metrics":  # which changes
        assert head.headers == got.headers
    assert int(head.headers["content-length"]) > (-1 if url == "/" else 10)


def test_every_answer_tells_its_times() -> None:
    api = Api()
    for response in (api.raw(), api.raw(accept="image/png"), api.json("/models/resnet/infer")):
        assert re.findall(r"(\w+);dur=\d+\.\d{3}", response.headers["server-timing"]) == STAGES
    for response in (api.get("/livez"), api.get("/nowhere"), api.raw("top_k=x")):
        assert re.fullmatch(r"total;dur=\d+\.\d{3}", response.headers["server-timing"])
