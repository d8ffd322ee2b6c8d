"""A Python client that `openapi-python-client` generates from the committed document calls a server."""

from __future__ import annotations

import importlib
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from service.api.schemas import HeatmapFields
from tests.e2e.support import map_of, only, post, text_of
from tests.server import Server
from tests.told import OPENAPI

PACKAGE = "generated_heatmap_client"


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """The generated package's modules; a warning fails its generation."""
    folder = tmp_path_factory.mktemp("python")
    command = [sys.executable, "-m", "openapi_python_client", "generate", "--fail-on-warning", "--meta", "none"]
    command += ["--path", str(OPENAPI / "openapi.json"), "--config", str(OPENAPI / "python-client.yaml")]
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))  # it calls ruff
    run = subprocess.run(
        [*command, "--output-path", str(folder / PACKAGE)], env={**os.environ, "PATH": path}, capture_output=True
    )
    output = (run.stdout + run.stderr).decode()
    assert run.returncode == 0, output
    assert "warning" not in output.lower(), output
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        names = {
            "heatmap": "api.inference.create_heatmaps",
            "infer": "api.inference.infer_classes",
            "models": "api.catalogue.list_models",
            "readiness": "api.health.get_readiness",
        }
        modules = {name: importlib.import_module(f"{PACKAGE}.{module}") for name, module in names.items()}
        yield SimpleNamespace(**modules, **vars(importlib.import_module(f"{PACKAGE}.models")), types=types_module())


def types_module() -> Any:
    return importlib.import_module(f"{PACKAGE}.types")


@pytest.fixture(scope="module")
def calls(generated: SimpleNamespace, server: Server) -> Iterator[dict[str, Any]]:
    """The arguments of every call of the model `tiny`."""
    with importlib.import_module(f"{PACKAGE}.client").Client(base_url=server.url, timeout=120) as client:
        yield {"id": "tiny", "client": client}


def test_a_form_answers_as_json_does(generated: SimpleNamespace, calls: Any, server: Server, chelsea: bytes) -> None:
    file = generated.types.File(io.BytesIO(chelsea), file_name="cat.png")
    answer = generated.heatmap.sync(**calls, body=generated.HeatmapForm(image=file))
    assert isinstance(answer, generated.HeatmapResults)
    with server.client() as client:
        assert answer.results[0].heatmaps[0].to_dict() == only(client, chelsea)


def test_every_field_of_a_form_arrives(
    generated: SimpleNamespace, calls: Any, server: Server, chelsea: bytes, coffee: bytes
) -> None:
    files = [generated.types.File(io.BytesIO(one), file_name="picture") for one in (chelsea, coffee)]
    parameters = generated.HeatmapFormGenParams.from_dict({"scaling": "none"})
    form = generated.HeatmapForm(
        images=files,
        top_k=2,
        timeout_s=60.5,
        priority=generated.Priority.BATCH,
        result_format=generated.ResultFormat.RESULTS,
        method=["grad_cam", "layer_cam"],
        target_classes=[1, "ant"],
        gen_params=parameters,
        format_=generated.Format.HEATMAP,
        encoding=generated.Encoding.WEBP,
        size=generated.Size.MODEL,
        colormap=generated.Colormap.VIRIDIS,
        alpha=0.25,
    )
    assert set(form.to_dict()) == set(HeatmapFields.model_fields) | {"images"}
    answer = generated.heatmap.sync(**calls, body=form)
    with server.client() as client:
        response = post(
            client,
            (chelsea, coffee),
            top_k=2,
            method=["grad_cam", "layer_cam"],
            target_classes=[1, "ant"],
            gen_params={"scaling": "none"},
            format="heatmap",
            encoding="webp",
            size="model",
            colormap="viridis",
            alpha=0.25,
        )
    assert [result.to_dict() for result in answer.results] == response.json()["results"]


def test_json_and_a_bare_picture(generated: SimpleNamespace, calls: Any, chelsea: bytes) -> None:
    asked = generated.HeatmapRequest(images=[text_of(chelsea)], target_classes=["bee"])
    answer = generated.heatmap.sync(**calls, body=asked)
    assert [heatmap.class_id for heatmap in answer.results[0].heatmaps] == [1]
    bare = generated.types.File(io.BytesIO(chelsea))
    same = generated.heatmap.sync(**calls, body=bare, target_classes=["bee"])
    assert same.results[0].heatmaps[0].data == answer.results[0].heatmaps[0].data


def test_halcons_dictionary_is_a_type_of_its_own(
    generated: SimpleNamespace, calls: Any, server: Server, chelsea: bytes
) -> None:
    asked = generated.HeatmapRequest(images=[text_of(chelsea)], result_format=generated.ResultFormat.DL_RESULT)
    answer = generated.heatmap.sync(**calls, body=asked)
    assert isinstance(answer, generated.HeatmapDLResults)
    (result,) = answer.results
    assert len(result.classification_class_ids) == 5
    entry = result["heatmap_grad_cam"][f"heatmap_image_class_{result.classification_class_ids[0]}"]
    with server.client() as client:
        assert (map_of(entry.to_dict()) == map_of(only(client, chelsea, format="npy"))).all()


@pytest.mark.parametrize("kind", ["results", "dl_result"])
def test_classes(generated: SimpleNamespace, calls: Any, server: Server, chelsea: bytes, kind: str) -> None:
    asked = generated.InferRequest(images=[text_of(chelsea)], result_format=generated.ResultFormat(kind))
    answer = generated.infer.sync(**calls, body=asked)
    assert isinstance(answer, {"results": generated.InferResults, "dl_result": generated.InferDLResults}[kind])
    with server.client() as client:
        expected = post(client, chelsea, endpoint="infer", result_format=kind).json()["results"]
    assert [result.to_dict() for result in answer.results] == expected


def test_an_error_has_a_code_of_the_enumeration(generated: SimpleNamespace, calls: Any, chelsea: bytes) -> None:
    answer = generated.heatmap.sync(**calls, body=generated.HeatmapRequest(images=[text_of(chelsea)], method="grad_cm"))
    assert isinstance(answer, generated.Problem)
    assert (answer.status, answer.code) == (422, generated.ProblemCode.UNKNOWN_METHOD)
    assert [place.pointer for place in answer.errors] == ["/method"]
    missing = generated.heatmap.sync(**{**calls, "id": "nobody"}, body=generated.HeatmapRequest(images=["AA"]))
    assert missing.code is generated.ProblemCode.MODEL_NOT_FOUND


def test_what_there_is(generated: SimpleNamespace, calls: Any) -> None:
    listed = generated.models.sync(client=calls["client"])
    assert {model.id: model.state for model in listed.models}["broken"] is generated.ModelState.FAILED
    assert isinstance(generated.readiness.sync(client=calls["client"]), generated.Ready)
