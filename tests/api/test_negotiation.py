"""Which media type answers: Accept beside the fields, as a table."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.api.negotiation import JSON, NPY, SINGLE, Choice, acceptable, choose, choose_json, top_k
from service.api.schemas import HeatmapFields
from service.errors import NotAcceptable

PNG, WEBP, JPEG = "image/png", "image/webp", "image/jpeg"
BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8"


def fields(**values: Any) -> HeatmapFields:
    return HeatmapFields.model_validate(values)


@pytest.mark.parametrize(
    ("accept", "first"),
    [
        (None, JSON),
        ("", JSON),
        ("*/*", JSON),
        ("application/*", JSON),
        ("Application/JSON; charset=utf-8", JSON),
        (BROWSER, JSON),
        (PNG, PNG),
        ("image/png;q=0.5, image/webp", WEBP),
        ("image/png, */*;q=0.1", PNG),
        ("image/*", PNG),
        ("image/*;q=0.5, image/jpeg", JPEG),
        ("image/*, image/png;q=0", WEBP),
        ("image/png;q=nan, image/webp;q=0.9", PNG),
        ("application/x-npy", NPY),
        ("*/*, application/json;q=0", PNG),
        ("text/html", None),
        ("*/*;q=0", None),
        ("image", None),
        (";;,,;q=1", None),
    ],
)
def test_the_most_wanted_offer(accept: str | None, first: str | None) -> None:
    assert next(iter(acceptable(accept, (JSON, *SINGLE))), None) == first


@given(st.text() | st.text(alphabet="imagepn/*;,q=01. "))
def test_reading_accept_never_fails(accept: str) -> None:
    assert set(acceptable(accept, (JSON, *SINGLE))) <= {JSON, *SINGLE}


@pytest.mark.parametrize(
    ("accept", "given_fields", "expected"),
    [
        (None, {}, Choice(JSON, "overlay", "png")),
        (None, {"format": "gray", "encoding": "webp"}, Choice(JSON, "gray", "webp")),
        (PNG, {}, Choice(PNG, "overlay", "png")),
        (WEBP, {}, Choice(WEBP, "overlay", "webp")),
        (JPEG, {"format": "heatmap"}, Choice(JPEG, "heatmap", "jpeg")),
        (PNG, {"format": "gray"}, Choice(PNG, "gray", "png")),
        (PNG, {"format": "gray16", "encoding": "webp"}, Choice(PNG, "gray16", "png")),
        (NPY, {}, Choice(NPY, "npy", "png")),
        (NPY, {"format": "npy"}, Choice(NPY, "npy", "png")),
        ("image/*", {"encoding": "webp"}, Choice(WEBP, "overlay", "webp")),
        ("image/png, application/x-npy", {"format": "npy"}, Choice(NPY, "npy", "png")),
        ("image/webp, application/json;q=0.1", {"format": "gray"}, Choice(JSON, "gray", "png")),
        (None, {"result_format": "dl_result"}, Choice(JSON, "npy", "png")),
        (None, {"result_format": "dl_result", "format": "overlay"}, Choice(JSON, "overlay", "png")),
    ],
)
def test_what_accept_and_fields_make_together(
    accept: str | None, given_fields: dict[str, Any], expected: Choice
) -> None:
    assert choose(accept, fields(**given_fields), 1) == expected


@pytest.mark.parametrize(
    ("accept", "given_fields", "heatmaps", "message"),
    [
        ("text/html", {}, 1, "takes none of"),
        (PNG, {}, 2, "asks for 2"),
        (NPY, {}, 3, "asks for 3"),
        (PNG, {"format": "npy"}, 1, "make application/x-npy"),
        ("image/*", {"format": "npy"}, 1, "make application/x-npy"),
        (NPY, {"format": "overlay"}, 1, "make image/png"),
        (WEBP, {"encoding": "png"}, 1, "make image/png"),
        (WEBP, {"format": "gray"}, 1, "make image/png"),
        (JPEG, {"format": "gray16"}, 1, "make image/png"),
        (PNG, {"result_format": "dl_result"}, 1, "application/json alone"),
    ],
)
def test_contradictions_are_told(accept: str, given_fields: dict[str, Any], heatmaps: int, message: str) -> None:
    with pytest.raises(NotAcceptable, match=message):
        choose(accept, fields(**given_fields), heatmaps)


def test_several_heatmaps_are_json_where_that_is_acceptable() -> None:
    assert choose("image/png, application/json;q=0.1", fields(), 2).media_type == JSON


def test_predictions_are_json_alone() -> None:
    choose_json("application/json;q=0.1, image/png")
    with pytest.raises(NotAcceptable, match="image/png"):
        choose_json("image/png")


@pytest.mark.parametrize(
    ("values", "expected"),
    [({}, 5), ({"top_k": 3}, 3), ({"result_format": "dl_result"}, 0), ({"result_format": "dl_result", "top_k": 5}, 5)],
)
def test_dl_result_lists_all_classes_unless_told(values: dict[str, Any], expected: int) -> None:
    assert top_k(fields(**values)) == expected


def test_only_the_first_ranges_of_a_long_accept_header_are_read() -> None:
    assert acceptable(
        ",".join(["text/html"] * 99 + ["image/png"] + ["*/*"] * 9000), ("application/json", "image/png")
    ) == ["image/png"]
