"""An error shows at most 200 characters of any one value that a client sent, wherever it stood in the request."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import pytest

from service.errors import MAX_ECHO
from tests.e2e.support import text_of
from tests.server import Server

LONG = 60_000
HEATMAP = "/models/tiny/heatmap"
FILLERS = ("q", "\u00e4", "~", "'", "\x01", "\U000e0001")
"""What stands alone, and what becomes longer when it is quoted, escaped or percent-encoded."""


def strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for item in value.items() for text in strings(list(item))]
    if isinstance(value, list):
        return [text for item in value for text in strings(item)]
    return [value] if isinstance(value, str) else []


def requests(word: str, picture: bytes) -> dict[str, dict[str, Any]]:
    """A request per place, each with the word there; the first characters tell ours from theirs."""
    images = [text_of(picture)]

    def fields(**given: Any) -> dict[str, Any]:
        return {"url": HEATMAP, "json": {"images": images, **given}}

    def form(given: dict[str, Any], **more: Any) -> dict[str, Any]:
        return {"url": HEATMAP, "files": {"image": picture}, "data": given, **more}

    nested: Any = word
    for _ in range(8):
        nested = [nested] * 4
    return {
        "field name": fields(**{word: 1}),
        "many field names": fields(**{f"{index}{word[:50_000]}": 1 for index in range(20)}),
        "many classes": fields(target_classes=[[word]] * 20),
        **{
            f"field {name}": fields(**{name: word})
            for name in ("method", "target_classes", "gen_params", "top_k", "format", "encoding", "size", "colormap")
        },
        **{
            f"field {name}": fields(**{name: word})
            for name in ("alpha", "timeout_s", "priority", "result_format", "images")
        },
        "method in a list": fields(method=["grad_cam", word]),
        "short method": fields(method=word[:500]),
        "class": fields(target_classes=[word]),
        "short class": fields(target_classes=[word[:500]]),
        "class of a class": fields(target_classes=[[word], [{word: word}]]),
        "nested": fields(top_k=nested if len(word) < 1000 else [[word]]),
        "layer": fields(gen_params={"target_conv_layer": word}),
        "layers": fields(gen_params={"target_conv_layer": ["0", word]}),
        "parameter name": fields(gen_params={word: 1}),
        "parameter value": fields(gen_params={"scaling": word}),
        "parameter object": fields(gen_params={"grad_cam": word}),
        "parameter of a method": fields(gen_params={"grad_cam": {word: word}}),
        "flag": fields(gen_params={"use_conv_only": word}),
        "picture": fields(images=[word]),
        "part name": {"url": HEATMAP, "files": {word: picture}},
        "form field name": form({word: "1"}),
        "form field": form({"top_k": word}),
        "form object": form({"gen_params": word}),
        "form object name": form({"gen_params": json.dumps({word: 1})}),
    }


def ascii_requests(word: str, picture: bytes) -> dict[str, dict[str, Any]]:
    """Places that take only what heads take."""

    def raw(url: str = HEATMAP, method: str = "POST", **headers: str) -> dict[str, Any]:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        return {"method": method, "url": url, "content": picture, "headers": {"content-type": "image/png", **sent}}

    return {
        "path": raw(f"/{word}"),
        "model": raw(f"/models/{word}/heatmap"),
        "model to load": raw(f"/models/{word}/load"),
        "model to get": raw(f"/models/{word}", "GET"),
        "path of a verb": raw(f"/models/{word}", "PUT"),
        "query name": raw(f"{HEATMAP}?{word}=1"),
        "query value": raw(f"{HEATMAP}?top_k={word}"),
        "query of the catalogue": raw(f"/models?{word}=1", "GET"),
        "query of classes": raw(f"/models/tiny/classes?{word}", "GET"),
        "escaped query": raw(f"{HEATMAP}?" + "%7E" * (len(word) // 3)),
        "escaped path": raw("/" + "%C3%A4" * (len(word) // 6)),
        "media type": raw(content_type=word),
        "form without a boundary": raw(content_type=f"multipart/form-data; {word}"),
        "boundary": raw(content_type=f"multipart/form-data; boundary={word}"),
        "coding": raw(content_encoding=word),
        "verb": raw("/models", word),
        "accept": raw(accept=word),
        "accept of classes": raw("/models/tiny/infer", accept=word),
        "accept of the single heatmap": raw(f"{HEATMAP}?format=npy", accept=f"image/{word}"),
        "request id": raw("/nowhere", x_request_id=word),
        "key": raw("/models/tiny/load", x_api_key=word),
        "bearer": raw("/models/tiny/load", authorization=f"Bearer {word}"),
    }


def check(place: str, filler: str, response: httpx.Response) -> None:
    assert 400 <= response.status_code < 500, (place, response.text[:500])
    for text in strings(response.json()):
        for shown in {filler, repr(filler)[1:-1], "%C3%A4", "%7E", "~0"}:
            runs = re.findall(f"(?:{re.escape(shown)})+", text)
            assert max(map(len, runs), default=0) <= MAX_ECHO, (place, text[:500])
        assert len(text) < 2000, (place, text[:500])


@pytest.mark.parametrize("filler", FILLERS)
def test_an_error_shows_little_of_what_was_sent_in_a_body(server: Server, chelsea: bytes, filler: str) -> None:
    with server.client() as client:
        for place, request in requests(filler * LONG, chelsea).items():
            check(place, filler, client.post(**request))


def test_an_error_shows_little_of_what_was_sent_in_a_head(server: Server, chelsea: bytes) -> None:
    with server.client() as client:
        for place, request in ascii_requests("q" * LONG, chelsea).items():
            check(place, "q", client.request(**{"method": "POST", **request}))
    assert max(map(len, server.log.read_text().splitlines())) < 2000


def test_no_path_leads_elsewhere_by_a_slash(server: Server) -> None:
    with server.client() as client:
        paths = client.get("/openapi.json").json()["paths"]
        for path in (*paths, "/docs", "/openapi.json"):
            for verb in ("GET", "POST", "HEAD"):
                answer = client.request(
                    verb, path.replace("{id}", "tiny") + "/", headers={"host": "elsewhere.localhost"}
                )
                assert answer.status_code == 404, (verb, path)
        root = client.get("/", headers={"host": "elsewhere.localhost"})
        assert root.headers["location"] == "docs"
