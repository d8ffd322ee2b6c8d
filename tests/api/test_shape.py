"""Bodies whose shape makes them slow to read are refused before they are parsed; pictures are not hurt."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator

import pytest

from service.api import fields
from service.api.fields import MAX_JSON_ESCAPES, MAX_JSON_VALUES, MAX_JSON_WIDE_BYTES, Shape
from service.api.middleware import MAX_QUERY_FIELDS
from service.api.multipart import MAX_OPTIONS, read_form
from service.errors import InvalidRequest
from tests.api.support import Api, check_problem

PICTURE = base64.b64encode(bytes(range(256)) * 40_000).decode()
MANY = 30_000
LONG = "A" * MAX_JSON_WIDE_BYTES
QUOTED = ("A" * 1022 + '\\"') * (MAX_JSON_WIDE_BYTES // 1000)

SHAPES = {
    "numbers": "[" + "1," * 2 * MANY + "1]",
    "empty arrays": "[" + "[]," * MANY + "[]]",
    "nested": "[" + ("[" * 100 + "]" * 100 + ",") * (2 * MANY // 100) + "1]",
    "objects": "[" + '{"a":1},' * MANY + "1]",
    "empty texts": "[" + '"" ' * 2 * MANY + "1]",
    "members": "{" + ",".join(f'"{index}":1' for index in range(MANY)) + "}",
    "escapes": '"' + "\\n" * (MAX_JSON_ESCAPES + 1) + '"',
    "code points": '"' + "\\u0041" * (MAX_JSON_ESCAPES + 1) + '"',
    "one wide character": f'"{LONG}\U0001f600"',
    "one wide code point": f'"\\ud83d\\ude00{LONG}"',
    "a wide character before escaped quotation marks": f'"\u00e4{QUOTED}"',
    "many wide texts": json.dumps(["\u00e4" * 512] * (MAX_JSON_WIDE_BYTES // 1024 + 1), ensure_ascii=False),
}


@pytest.fixture(scope="module")
def api() -> Api:
    return Api()


@pytest.mark.parametrize("shape", SHAPES)
def test_many_small_values_are_refused_unparsed(api: Api, shape: str) -> None:
    body = f'{{"images": ["{PICTURE}"], "gen_params": {SHAPES[shape]}, "unfinished": '
    response = api.post(content=body, headers={"content-type": "application/json"})
    problem = check_problem(response, 422, "invalid_request")  # 400 would say that it was parsed
    assert any(str(limit) in problem["detail"] for limit in (MAX_JSON_VALUES, MAX_JSON_ESCAPES, MAX_JSON_WIDE_BYTES))


def test_large_pictures_and_long_lists_are_taken(api: Api) -> None:
    names = [f"ant, bee: a [small] {{one}} \u00e4\u732b {index}" for index in range(4096)]
    body = json.dumps({"images": [PICTURE], "target_classes": names}).replace("/", "\\/")  # as PHP writes it
    assert api.post(content=body, headers={"content-type": "application/json"}).status_code == 200
    assert api.work.pictures == (PICTURE,)


@pytest.mark.parametrize(
    "text", ['"\\ud83d\\ude00' + "A" * 99 + '"', '"' + "A" * 99 + '\u00e4"', '"\u00e4\\"' + "A" * 99 + '"']
)
def test_wide_texts_are_counted_however_they_are_cut(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(fields, "MAX_JSON_WIDE_BYTES", 100)
    data = f'"{"A" * 200}", {text}, "{"A" * 200}"'.encode()
    for size in range(1, len(data)):
        with pytest.raises(InvalidRequest, match="100 bytes of texts that are not ASCII"):
            add_pieces(data, size)


def add_pieces(data: bytes, size: int) -> None:
    shape = Shape()
    for start in range(0, len(data), size):
        shape.add(data[start : start + size])


def test_the_bound_holds_for_the_json_in_forms_and_queries(api: Api) -> None:
    text = "{" + "," * (MAX_JSON_VALUES + 1)
    response = api.post(files={"image": b"picture"}, data={"gen_params": text})
    assert str(MAX_JSON_VALUES) in check_problem(response, 422, "invalid_request")["detail"]


def test_a_query_of_very_many_fields_is_refused_unparsed(api: Api) -> None:
    for url in ("/models/resnet/heatmap", "/models"):
        response = api.post(f"{url}?" + "a&" * MAX_QUERY_FIELDS, content=b"p", headers={"content-type": "image/png"})
        assert str(MAX_QUERY_FIELDS) in check_problem(response, 422, "invalid_request")["detail"]
    response = api.raw("target_classes=1&" * 3000)
    assert response.status_code == 200


def test_headers_of_very_many_parameters_are_refused_unparsed(api: Api) -> None:
    media_type = "multipart/form-data; boundary=b" + ";" * MAX_OPTIONS
    part = b'--b\r\nContent-Disposition: form-data; name="image"; filename="%s"\r\n\r\np\r\n--b--'
    for headers, body, said in (
        ({"content-type": media_type}, part % b"f", f"more than {MAX_OPTIONS} parameters"),
        ({"content-type": "multipart/form-data; boundary=b"}, part % (b";" * 5000), "header length"),
    ):
        problem = check_problem(api.post(content=body, headers=headers), 400, "malformed_body")
        assert said in problem["detail"]
    few = api.post(content=part % (b";" * MAX_OPTIONS), headers={"content-type": media_type[:-1]})
    assert few.status_code == 200


def test_a_form_that_arrives_at_once_lets_others_have_their_turns() -> None:
    """Counted in turns, not in seconds."""
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def at_once() -> AsyncIterator[bytes]:
        head = b'--b\r\nContent-Disposition: form-data; name="image"; filename="f"\r\n\r\n'
        yield head + b"\r\n--" * 100_000 + b"\r\n--b--"

    async def read() -> None:
        counter = asyncio.ensure_future(count())
        _, pictures = await read_form("multipart/form-data; boundary=b", at_once(), 1, 1)
        counter.cancel()
        assert len(pictures[0]) == 400_000

    asyncio.run(read())
    assert turns > 400_000 // (32 * 1024) - 2
