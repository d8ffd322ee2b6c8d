"""The envelope, HALCON's dictionary, the single heatmap; data is spliced in and equals what json would have written."""

from __future__ import annotations

import base64
import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from service.api.answers import ChunkedResponse, json_answer, single_answer, splice
from service.api.responses import HeatmapAnswer, HeatmapDLResult, InferAnswer
from service.workers.messages import Answer, ClassScore, Heatmap, PictureResult, Timings
from tests.api.support import DATA, NAMES, Api, heatmap

ENTRY_KEYS = [
    "method",
    "class_id",
    "class_name",
    "confidence",
    "gen_params",
    "precision",
    "value_range",
    "rounding_error",
    "completeness_error",
    "degenerate",
    "format",
    "media_type",
    "width",
    "height",
    "data",
]


def answer_of(*maps: Heatmap, scores: tuple[ClassScore, ...] = (ClassScore(1, "bee", 0.5),)) -> Answer:
    return Answer("m", "sha256:00", (PictureResult(0, 4, 3, scores, maps),), Timings())


def document_of(answer: Answer, result_format: Any = "results") -> Any:
    response = json_answer(answer, result_format, "request")
    assert isinstance(response, ChunkedResponse)
    body = b"".join(response.chunks)
    assert response.headers["content-length"] == str(len(body))
    return json.loads(body)


def test_the_envelope_is_the_contracts() -> None:
    document = Api().json(target_classes=[0, 1]).json()
    assert list(document) == ["model_id", "revision", "request_id", "result_format", "results"]
    (result,) = document["results"]
    assert list(result) == ["index", "width", "height", "classes", "heatmaps"]
    assert list(result["classes"][0]) == ["class_id", "class_name", "confidence"]
    assert [list(entry) for entry in result["heatmaps"]] == [ENTRY_KEYS, ENTRY_KEYS]
    assert result["heatmaps"][1] == {
        "method": "grad_cam",
        "class_id": 1,
        "class_name": NAMES[1],
        "confidence": 0.25,
        "gen_params": {"target_conv_layer": ["conv"], "use_conv_only": True},
        "precision": "fp32",
        "value_range": [-0.5, 3.0],
        "rounding_error": None,
        "completeness_error": None,
        "degenerate": None,
        "format": "overlay",
        "media_type": "image/png",
        "width": 4,
        "height": 3,
        "data": base64.b64encode(DATA).decode(),
    }
    HeatmapAnswer.model_validate(document)


def test_predictions_have_no_heatmaps() -> None:
    api = Api()
    document = api.json("/models/resnet/infer", top_k=2).json()
    assert list(document["results"][0]) == ["index", "width", "height", "classes"]
    assert (api.work.methods, api.work.target_classes, api.work.top_k) == ((), ((),), 2)
    InferAnswer.model_validate(document)


def test_dl_result_is_halcons_dictionary() -> None:
    api = Api()
    response = api.json(result_format="dl_result", method=["grad_cam", "guided_grad_cam"], target_classes=[1, 0, 1])
    (result,) = response.json()["results"]
    assert result["classification_class_ids"] == [1, 0, 2]
    assert result["classification_class_names"] == [NAMES[1], NAMES[0], NAMES[2]]
    assert result["classification_confidences"] == [0.5, 0.25, 0.125]
    assert list(result["heatmap_grad_cam"]) == ["heatmap_image_class_1", "heatmap_image_class_0"]
    assert list(result["heatmap_guided_grad_cam"]) == ["guided_grad_cam_image_class_1", "guided_grad_cam_image_class_0"]
    assert len(result) == 5
    assert list(result["heatmap_grad_cam"]["heatmap_image_class_0"]) == ENTRY_KEYS
    assert (api.work.format, api.work.top_k) == ("npy", 0)
    HeatmapDLResult.model_validate(result)


def test_dl_result_keeps_the_first_of_two_with_one_key() -> None:
    result = document_of(
        answer_of(heatmap(data=b"first"), heatmap(data=b"second"), heatmap(class_id=2, data=b"third")), "dl_result"
    )
    maps = result["results"][0]["heatmap_grad_cam"]
    assert [entry["data"] for entry in maps.values()] == ["first", "third"]


def test_numbers_that_are_not_finite_are_null() -> None:
    nan, inf = float("nan"), float("inf")
    odd = heatmap(confidence=nan, value_range=(-inf, nan), gen_params={"a": {"b": (inf, 1.0)}}, degenerate="not_finite")
    result = document_of(answer_of(odd, scores=(ClassScore(1, "bee", nan),)))["results"][0]
    assert result["classes"][0]["confidence"] is None
    (entry,) = result["heatmaps"]
    assert (entry["confidence"], entry["value_range"], entry["gen_params"]) == (
        None,
        [None, None],
        {"a": {"b": [None, 1]}},
    )


@given(st.lists(st.tuples(st.text(), st.binary(max_size=30)), min_size=1, max_size=5))
def test_splicing_equals_writing_it_whole(named: list[tuple[str, bytes]]) -> None:
    maps = [heatmap(class_name=name, data=base64.b64encode(data)) for name, data in named]
    entries = document_of(answer_of(*maps))["results"][0]["heatmaps"]
    expected = [{**vars(one), "data": one.data.decode()} for one in maps]
    for entry in expected:
        del entry["channels"]
    assert entries == json.loads(json.dumps(expected))


def test_data_is_not_copied() -> None:
    data = base64.b64encode(DATA)
    response = json_answer(answer_of(heatmap(data=data)), "results", "request")
    assert isinstance(response, ChunkedResponse)
    assert any(chunk is data for chunk in response.chunks)
    assert splice(b'{"a":"T","b":"T"}', "T", [b"1", b"2"]) == [b'{"a":"', b"1", b'","b":"', b"2", b'"}']


def test_the_single_heatmap_itself() -> None:
    api = Api()
    response = api.raw("target_classes=1", accept="image/webp")
    assert (response.content, response.headers["content-type"]) == (DATA, "image/webp")
    assert response.headers["x-class-id"] == "1"
    assert response.headers["x-class-name"] == "hostile%20%22name%22%0D%0AX-Evil%3A%201"
    assert response.headers["x-confidence"] == "0.25"
    assert "x-evil" not in response.headers
    assert (api.work.as_base64, api.work.encoding) == (False, "webp")
    assert api.raw(accept="application/x-npy").headers["content-type"] == "application/x-npy"


def test_a_confidence_that_is_no_number_is_null_in_the_header() -> None:
    response = single_answer(answer_of(heatmap(confidence=float("nan"), class_name="\ud800", as_base64=False)))
    assert (response.headers["x-confidence"], response.headers["x-class-name"]) == ("null", "%3F")


def test_several_heatmaps_are_refused_before_any_work() -> None:
    api = Api()
    assert api.raw("target_classes=1&target_classes=2", accept="image/png").status_code == 406
    assert api.dispatcher.asked == []
