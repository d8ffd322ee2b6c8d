"""Bodies whose shape makes them slow to read are refused before they are parsed; pictures are not hurt."""

from __future__ import annotations

import base64
import json

import pytest

from service.api.fields import MAX_JSON_ESCAPES, MAX_JSON_VALUES
from tests.api.support import Api, check_problem

PICTURE = base64.b64encode(bytes(range(256)) * 40_000).decode()
MANY = 30_000

SHAPES = {
    "numbers": "[" + "1," * 2 * MANY + "1]",
    "empty arrays": "[" + "[]," * MANY + "[]]",
    "nested": "[" + ("[" * 100 + "]" * 100 + ",") * (2 * MANY // 100) + "1]",
    "objects": "[" + '{"a":1},' * MANY + "1]",
    "members": "{" + ",".join(f'"{index}":1' for index in range(MANY)) + "}",
    "escapes": '"' + "\\n" * (MAX_JSON_ESCAPES + 1) + '"',
    "code points": '"' + "\\u0041" * (MAX_JSON_ESCAPES + 1) + '"',
}


@pytest.fixture(scope="module")
def api() -> Api:
    return Api()


@pytest.mark.parametrize("shape", SHAPES)
def test_many_small_values_are_refused_unparsed(api: Api, shape: str) -> None:
    body = f'{{"images": ["{PICTURE}"], "gen_params": {SHAPES[shape]}, "unfinished": '
    response = api.post(content=body, headers={"content-type": "application/json"})
    problem = check_problem(response, 422, "invalid_request")  # 400 would say that it was parsed
    assert str(MAX_JSON_VALUES) in problem["detail"] or str(MAX_JSON_ESCAPES) in problem["detail"]


def test_large_pictures_and_long_lists_are_taken(api: Api) -> None:
    names = [f"ant, bee: a [small] {{one}} {index}" for index in range(4096)]
    body = json.dumps({"images": [PICTURE], "target_classes": names}).replace("/", "\\/")  # as PHP writes it
    assert api.post(content=body, headers={"content-type": "application/json"}).status_code == 200
    assert api.work.pictures == (PICTURE,)


def test_the_bound_holds_for_the_json_in_forms_and_queries(api: Api) -> None:
    text = "{" + "," * (MAX_JSON_VALUES + 1)
    response = api.post(files={"image": b"picture"}, data={"gen_params": text})
    assert str(MAX_JSON_VALUES) in check_problem(response, 422, "invalid_request")["detail"]
