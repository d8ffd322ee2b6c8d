"""The three request encodings, and what each refuses."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import service.methods  # noqa: F401  (registers the methods)
from service.api.fields import PARAMETERS
from service.explain.method import REGISTRY
from tests.api.support import Api, check_problem, pointers

FILE = ("image", ("cat.png", b"one", "text/html"))
OTHER = ("images", ("dog.png", b"two", "image/png"))


@pytest.fixture
def api() -> Api:
    return Api(max_pictures=3)


def form(api: Api, *parts: tuple[str, Any], query: str = "") -> Any:
    return api.post(f"/models/resnet/heatmap?{query}", files=list(parts))


def text(name: str, value: str) -> tuple[str, tuple[None, str]]:
    return name, (None, value)


def test_a_form_brings_files_and_fields(api: Api) -> None:
    parts = [
        FILE,
        OTHER,
        text("method", "grad_cam"),
        text("method", "score_cam"),
        text("gen_params", '{"scaling": "none"}'),
    ]
    parts += [text("target_classes", "282"), text("target_classes", "tabby"), text("alpha", "0.25"), text("top_k", "")]
    assert form(api, *parts).status_code == 200
    assert api.work.pictures == (b"one", b"two")
    assert api.work.methods == ("grad_cam", "score_cam")
    assert api.work.target_classes == ((282, "tabby"), (282, "tabby"))
    assert api.work.gen_params == {"scaling": "none"}
    assert (api.work.alpha, api.work.top_k) == (0.25, 5)


def test_a_form_takes_lists_as_json_and_fields_from_the_query(api: Api) -> None:
    targets = text("target_classes", '[[1], ["2", 2]]')
    assert form(api, FILE, OTHER, targets, text("method", '["a", "b"]'), query="top_k=2").status_code == 200
    assert api.work.target_classes == ((1,), ("2", 2))
    assert (api.work.methods, api.work.top_k) == (("a", "b"), 2)


def test_json_brings_pictures_as_text(api: Api) -> None:
    fields = {"target_classes": [1, "1"], "method": "a", "timeout_s": 2, "colormap": "jet"}
    assert api.json(images=["data:image/png;base64,AAAA", "AAAA"], **fields).status_code == 200
    assert api.work.pictures == ("data:image/png;base64,AAAA", "AAAA")
    assert api.work.target_classes == ((1, "1"), (1, "1"))


@pytest.mark.parametrize("media_type", ["image/png", "IMAGE/x-odd; a=b", "application/octet-stream"])
def test_the_body_is_the_picture(api: Api, media_type: str) -> None:
    response = api.raw(
        "target_classes=7&target_classes=cat&method=a&size=model&top_k=0", **{"content-type": media_type}
    )
    assert response.status_code == 200
    assert api.work.pictures == (b"picture",)
    assert api.work.target_classes == ((7, "cat"),)
    assert (api.work.size, api.work.top_k, api.dispatcher.sizes) == ("model", 0, [7])


@pytest.mark.parametrize("digits", ["²", "9" * 5000, "-1", "1.5", "0x10"])
def test_only_digits_are_an_id(api: Api, digits: str) -> None:
    response = api.post(params={"target_classes": digits}, content=b"p", headers={"content-type": "image/png"})
    if response.status_code == 200:
        assert api.work.target_classes == ((digits,),)
    else:
        check_problem(response, 422, "invalid_request")


@pytest.mark.parametrize(
    ("media_type", "message"),
    [("application/x-www-form-urlencoded", "'application/x-www"), ("text/plain", "accepted are"), ("", "no Content")],
)
def test_other_media_types_are_415(api: Api, media_type: str, message: str) -> None:
    problem = check_problem(api.raw(**{"content-type": media_type}), 415, "unsupported_media_type")
    assert message in problem["detail"]
    assert "multipart/form-data" in problem["detail"]


def test_content_codings_are_415(api: Api) -> None:
    problem = check_problem(api.raw(**{"content-encoding": "gzip"}), 415, "unsupported_media_type")
    assert "gzip" in problem["detail"]
    assert api.raw(**{"content-encoding": "identity"}).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[" * 10_000,
        b'{"alpha": NaN}',
        b'{"alpha": Infinity}',
        b"\xff",
        b'{"a": "\xff"}',
        b'{"a": "\\ud800"}',
    ],
)
def test_malformed_json_is_400(api: Api, body: bytes) -> None:
    response = api.post(content=body, headers={"content-type": "application/json"})
    check_problem(response, 400, "malformed_body")


@pytest.mark.parametrize("body", ["[]", "3", "null", '"text"'])
def test_json_that_is_no_object_is_422(api: Api, body: str) -> None:
    response = api.post(content=body, headers={"content-type": "application/json"})
    check_problem(response, 422, "invalid_request")


BOUNDARY = {"content-type": "multipart/form-data; boundary=x"}
NO_FILE = b'--x\r\nContent-Disposition: form-data; name="image"; filename=""\r\n\r\n\r\n--x--\r\n'
PART = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\nabc\r\n'


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        (BOUNDARY, b""),
        (BOUNDARY, b"garbage"),
        (BOUNDARY, PART),
        (BOUNDARY, PART + b"--x"),
        (BOUNDARY, b"--x\r\nContent-Disposition: form-data\r\n\r\nabc\r\n--x--\r\n"),
        ({"content-type": "multipart/form-data"}, PART + b"--x--"),
        ({"content-type": "multipart/form-data; boundary="}, PART + b"--x--"),
        (BOUNDARY, PART.replace(b'"image"', b'"\xff"') + b"--x--"),
        (BOUNDARY, PART + b'--x\r\nContent-Disposition: form-data; name="method"\r\n\r\n\xff\r\n--x--'),
    ],
)
def test_malformed_multipart_is_400(api: Api, headers: dict[str, str], body: bytes) -> None:
    check_problem(api.post(content=body, headers=headers), 400, "malformed_body")


@pytest.mark.parametrize("filename", [b"caf\xc3\xa9.png", b"caf\xe9.png", b'a;b=\\"c%22.png', b"C:\\cat.png"])
@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_a_picture_may_have_any_filename_and_come_in_any_pieces(api: Api, filename: bytes, size: int) -> None:
    picture = bytes(range(256)) + b"\r\n--\r\n--y\r\n-x\n--x--\r--x\r\n--" * 3
    disposition = b'Content-Disposition: form-data; name="image"; filename="%s"' % filename
    body = b"--x\r\n%s\r\n\r\n%s\r\n--x--\r\n" % (disposition, picture)

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), size):
            yield body[start : start + size]

    assert api.post(content=pieces(), headers=BOUNDARY).status_code == 200
    assert api.work.pictures == (picture,)


def test_the_parameters_that_are_known_are_those_of_grad_cam() -> None:
    assert PARAMETERS.keys() == REGISTRY["grad_cam"].Params.model_fields.keys()
    REGISTRY["grad_cam"].Params.model_validate(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_parameter_that_is_sent_as_a_field_belongs_to_gen_params(api: Api, name: str) -> None:
    value = json.dumps({name: PARAMETERS[name]})
    for response in (api.raw(f"{name}=1"), api.json(**{name: 1}), form(api, FILE, text(name, "1"))):
        problem = check_problem(response, 422, "invalid_request")
        assert pointers(problem) == [f"/{name}"]
        assert f"There is no such field. It is a member of the field gen_params, such as {value}. " in problem["detail"]
    assert form(api, FILE, text("gen_params", value)).status_code == 200
    infer = api.post("/models/resnet/infer", params={name: "1"}, content=b"p", headers={"content-type": "image/png"})
    assert "gen_params" not in check_problem(infer, 422, "invalid_request")["detail"]


def test_unknown_fields_name_the_nearest(api: Api) -> None:
    for response in (api.raw("metod=a"), api.json(metod="a"), form(api, FILE, text("metod", "a")), api.raw("metod=")):
        problem = check_problem(response, 422, "invalid_request")
        assert pointers(problem) == ["/metod"]
        assert "'method'" in problem["detail"]
    problem = check_problem(api.json(image="x"), 422, "invalid_request")
    assert "'images'" in problem["detail"]


def test_a_field_may_come_once(api: Api) -> None:
    twice = (
        form(api, FILE, text("top_k", "1"), query="top_k=1"),
        api.raw("top_k=1&top_k=2"),
        api.post("/models/resnet/heatmap?top_k=1", json={"images": ["AA"], "top_k": 1}),
    )
    for response in twice:
        assert pointers(check_problem(response, 422, "invalid_request")) == ["/top_k"]


@pytest.mark.parametrize(
    ("fields", "pointer"),
    [
        ({"images": [7]}, "/images/0"),
        ({"images": ["AA", None]}, "/images/1"),
        ({"images": "AA"}, "/images"),
        ({"images": []}, "/images"),
        ({"top_k": "5"}, "/top_k"),
        ({"top_k": True}, "/top_k"),
        ({"top_k": -1}, "/top_k"),
        ({"timeout_s": 0}, "/timeout_s"),
        ({"timeout_s": 3601}, "/timeout_s"),
        ({"alpha": 1.5}, "/alpha"),
        ({"alpha": None}, "/alpha"),
        ({"method": []}, "/method"),
        ({"method": ["a", "a"]}, "/method"),
        ({"method": ["a", 1]}, "/method/1"),
        ({"method": [""]}, "/method/0"),
        ({"target_classes": "cat"}, "/target_classes"),
        ({"target_classes": [1, True]}, "/target_classes/1"),
        ({"target_classes": [[1, -1]]}, "/target_classes/0/1"),
        ({"target_classes": [[1], 2]}, "/target_classes/1"),
        ({"target_classes": [[1], [2]]}, "/target_classes"),
        ({"target_classes": [[1] * 2000] * 3}, "/target_classes"),
        ({"gen_params": []}, "/gen_params"),
        ({"gen_params": {"a": [[0] * 5000] * 3}}, "/gen_params"),
        ({"format": "pdf"}, "/format"),
        ({"encoding": "gif"}, "/encoding"),
        ({"size": "huge"}, "/size"),
        ({"colormap": "virids"}, "/colormap"),
        ({"result_format": "xml"}, "/result_format"),
    ],
)
def test_wrong_values_are_422_and_pointed_at(api: Api, fields: dict[str, Any], pointer: str) -> None:
    assert pointers(check_problem(api.json(**fields), 422, "invalid_request")) == [pointer]


def test_infinity_by_the_back_door_is_422(api: Api) -> None:
    body = '{"images": ["AA"], "gen_params": {"a": [1e999]}}'
    response = api.post(content=body, headers={"content-type": "application/json"})
    assert pointers(check_problem(response, 422, "invalid_request")) == ["/gen_params"]


@pytest.mark.parametrize(
    "query",
    [
        "alpha=nan",
        "timeout_s=inf",
        "top_k=many",
        "top_k=1_0",
        "top_k=%D9%A3",
        "alpha=0.%D9%A3",
        "gen_params={",
        "method=[1",
        "target_classes=[{",
    ],
)
def test_wrong_text_is_422_and_pointed_at(api: Api, query: str) -> None:
    assert pointers(check_problem(api.raw(query), 422, "invalid_request")) == ["/" + query.partition("=")[0]]


def test_colormaps_name_the_nearest(api: Api) -> None:
    assert "'viridis'" in check_problem(api.json(colormap="virids"), 422, "invalid_request")["detail"]


def test_lists_per_picture_must_suit_the_pictures(api: Api) -> None:
    assert api.json(images=["AA", "BB"], target_classes=[[1], []]).status_code == 200
    assert api.work.target_classes == ((1,), ())
    problem = check_problem(api.json(target_classes=[[1], [2]]), 422, "invalid_request")
    assert "2 lists for 1 pictures" in problem["detail"]


def test_a_request_without_a_picture_says_so(api: Api) -> None:
    for response in (
        api.raw(content=b""),
        api.post(),
        form(api, text("top_k", "1")),
        form(api, text("image", ""), text("images", "")),
        api.post(content=NO_FILE, headers=BOUNDARY),
    ):
        assert "no picture" in check_problem(response, 422, "invalid_request")["detail"]


def test_an_empty_file_is_an_undecodable_picture(api: Api) -> None:
    for response in (form(api, FILE, ("image", ("empty.png", b""))), api.json(images=["AA", ""])):
        assert pointers(check_problem(response, 422, "undecodable_picture")) == ["/images/1"]


def test_an_empty_text_for_a_picture_is_none(api: Api) -> None:
    for name in ("image", "images"):
        assert form(api, text(name, ""), FILE, text("images", "")).status_code == 200
        assert api.work.pictures == (b"one",)


def test_parts_must_be_what_they_are_named(api: Api) -> None:
    assert "filename" in check_problem(form(api, text("image", "data")), 422, "invalid_request")["detail"]
    problem = check_problem(form(api, FILE, ("method", ("m.txt", b"grad_cam"))), 422, "invalid_request")
    assert pointers(problem) == ["/method"]


def test_more_pictures_than_the_limit_are_413(api: Api) -> None:
    for response in (form(api, *[FILE] * 4), api.json(images=["AA"] * 4)):
        assert "at most 3" in check_problem(response, 413, "too_many_pictures")["detail"]
    assert form(api, *[FILE] * 3).status_code == 200


def test_a_thousand_parts_are_413(api: Api) -> None:
    problem = check_problem(form(api, FILE, *[text("target_classes", "1")] * 1000), 413, "body_too_large")
    assert "JSON array" in problem["detail"]
    check_problem(form(api, FILE, text("method", "a" * 70_000)), 413, "body_too_large")


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_json_nests_two_hundred_deep_everywhere(api: Api, opening: str) -> None:
    closing = "]" if opening == "[" else "}"
    for depth, deep in ((190, False), (210, True)):
        params = '{"a": ' + opening * (depth - 2) + "1" + closing * (depth - 2) + "}"
        whole = f'{{"images": ["AA"], "gen_params": {params}}}'
        for response in (
            api.post(content=whole, headers={"content-type": "application/json"}),
            form(api, FILE, text("gen_params", params)),
            api.post(params={"gen_params": params}, content=b"p", headers={"content-type": "image/png"}),
        ):
            assert response.status_code in ((400, 422) if deep else (200,)), response.text
            assert not deep or "200 levels" in response.json()["detail"]


def test_more_json_values_than_the_limit_are_told(api: Api) -> None:
    response = api.post(content="[" + "0," * 100_001 + "0]", headers={"content-type": "application/json"})
    assert "50000 commas" in check_problem(response, 422, "invalid_request")["detail"]


def test_parts_over_the_limit_are_413() -> None:
    api = Api(max_parts=3)
    assert form(api, FILE, OTHER, text("top_k", "1")).status_code == 200
    problem = check_problem(form(api, FILE, OTHER, text("top_k", "1"), text("alpha", "1")), 413, "body_too_large")
    assert "3 parts" in problem["detail"]


def test_many_mistakes_are_told_in_part(api: Api) -> None:
    response = api.json(**{f"field{i}": i for i in range(5000)})
    assert len(check_problem(response, 422, "invalid_request")["errors"]) == 10
    assert len(response.content) < 5000
    response = api.json(**{"n" * 1_000_000: 1})
    check_problem(response, 422, "invalid_request")
    assert len(response.content) < 5000


ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda more: st.lists(more) | st.dictionaries(st.text(), more),
    max_leaves=8,
)
NAMES = st.sampled_from(
    ["images", "method", "target_classes", "gen_params", "top_k", "format", "alpha", "timeout_s", "x"]
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.dictionaries(NAMES, ODD) | ODD)
def test_no_json_is_a_defect(api: Api, body: object) -> None:
    response = api.post(content=json.dumps(body), headers={"content-type": "application/json"})
    assert response.status_code in (200, 400, 413, 422), response.text


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tail=st.binary(max_size=60), head=st.sampled_from([b"", PART, PART + b"--x--\r\n"]))
def test_no_form_is_a_defect(api: Api, head: bytes, tail: bytes) -> None:
    assert api.post(content=head + tail, headers=BOUNDARY).status_code in (200, 400, 413, 422)
