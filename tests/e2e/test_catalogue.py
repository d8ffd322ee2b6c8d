"""What there is, told over HTTP by a running server, against what can be counted by hand and the committed OpenAPI."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import jsonschema
import pytest

from tests.e2e.support import post
from tests.server import Server

COMMITTED = Path(__file__).parents[2] / "openapi" / "openapi.json"
INPUT = {
    "size": [32, 32],
    "fit": "stretch",
    "resize": 256,
    "interpolation": "bilinear",
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
}


@pytest.fixture(scope="module")
def document() -> Any:
    return json.loads(COMMITTED.read_text())


def test_the_committed_openapi_document_is_the_servers(client: httpx.Client, document: Any) -> None:
    response = client.get("/openapi.json")
    assert response.status_code == 200
    assert response.json() == document


@pytest.mark.parametrize(
    ("path", "schema"),
    [
        ("/models", "ModelList"),
        ("/models/tiny", "Model"),
        ("/models/broken", "Model"),
        ("/models/efficientnet_lite0/layers", "LayerList"),
        ("/models/tiny/layers", "LayerList"),
        ("/models/tiny/classes?query=cat", "ClassList"),
        ("/methods", "MethodList"),
        ("/livez", "Alive"),
        ("/readyz", "Ready"),
        ("/models/broken/layers", "Problem"),
        ("/modles", "Problem"),
    ],
)
def test_answers_suit_the_document(client: httpx.Client, document: Any, path: str, schema: str) -> None:
    check(document, schema, client.get(path).json())


@pytest.mark.parametrize(
    ("endpoint", "fields", "schema"),
    [
        ("heatmap", {"method": ["grad_cam", "guided_grad_cam"], "target_classes": [1]}, "HeatmapAnswer"),
        ("heatmap", {"result_format": "dl_result"}, "HeatmapAnswer"),
        ("infer", {}, "InferAnswer"),
        ("infer", {"result_format": "dl_result"}, "InferAnswer"),
        ("heatmap", {"method": "gradcam"}, "Problem"),
    ],
)
def test_heatmaps_suit_the_document(
    client: httpx.Client, document: Any, chelsea: bytes, endpoint: str, fields: dict[str, Any], schema: str
) -> None:
    check(document, schema, post(client, chelsea, endpoint=endpoint, **fields).json())


def check(document: Any, name: str, instance: Any) -> None:
    schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
    jsonschema.Draft202012Validator(schema).validate(instance)


def test_models(client: httpx.Client) -> None:
    models = {model["id"]: model for model in client.get("/models").json()["models"]}
    states = {name: model["state"] for name, model in models.items()}
    assert states == {"broken": "failed", "detector": "failed", "efficientnet_lite0": "ready", "tiny": "ready"}
    for name, model in models.items():
        assert client.get(f"/models/{name}").json() == model
    real = models["efficientnet_lite0"]
    assert (real["num_classes"], real["default_layer"], real["architecture"].partition(":")[0]) == (
        1000,
        "conv_head",
        "timm",
    )
    assert real["input"] == {
        "size": [224, 224],
        "fit": "crop",
        "resize": 256,
        "interpolation": "bicubic",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
    }


def test_a_model_is_told_in_full(client: httpx.Client) -> None:
    model = client.get("/models/tiny").json()
    revision = model.pop("revision")
    assert model == {
        "id": "tiny",
        "state": "ready",
        "reason": None,
        "type": "classification",
        "architecture": "python:net:build",
        "device": "cpu",
        "runtime": "cpu",
        "precision": "fp32",
        "input": INPUT,
        "num_classes": 5,
        "default_layer": "2",
        "recommended_layer": "3",
        "compiled_layers": [],
        "compiled_bytes": 0,
    }
    assert revision.startswith("sha256:")
    assert len(revision) == len("sha256:") + 64


def test_the_revision_is_the_one_that_answers(client: httpx.Client, chelsea: bytes) -> None:
    answer = post(client, chelsea, endpoint="infer").json()
    assert answer["revision"] == client.get("/models/tiny").json()["revision"]
    assert answer["model_id"] == "tiny"


def test_a_model_that_cannot_be_loaded_says_why_and_the_others_serve(client: httpx.Client, chelsea: bytes) -> None:
    broken = client.get("/models/broken").json()
    assert (broken["state"], broken["type"]) == ("failed", "classification")
    assert "labels.txt" in broken["reason"]
    assert "2 names" in broken["reason"]
    assert "5 classes" in broken["reason"]
    detector = client.get("/models/detector").json()
    assert detector["type"] == "detection"
    assert "'detection'" in detector["reason"]
    ready = client.get("/readyz")
    assert ready.status_code == 200
    assert ready.json()["failed_models"] == {"broken": broken["reason"], "detector": detector["reason"]}
    assert post(client, chelsea, endpoint="infer").status_code == 200


# name, type, output_shape, parameters, can it be a target, default, recommended, relu: 32 x 32 halved by the stride,
# 8 filters of 3 x 3 over 3 channels and a bias each, 6 over 8 channels, 5 classes of 6 x 16 x 16 values and a bias
LAYERS = [
    ("0", "Conv2d", [8, 16, 16], 8 * (3 * 9 + 1), True, False, False, "1"),
    ("1", "ReLU", [8, 16, 16], 0, True, False, False, None),
    ("2", "Conv2d", [6, 16, 16], 6 * (8 * 9 + 1), True, True, False, "3"),
    ("3", "ReLU", [6, 16, 16], 0, True, False, True, None),
    ("4", "Flatten", [6 * 16 * 16], 0, False, False, False, None),
    ("5", "Linear", [5], 5 * (6 * 16 * 16 + 1), False, False, False, None),
]


def test_layers_are_halcons_summary(client: httpx.Client) -> None:
    layers = client.get("/models/tiny/layers").json()["layers"]
    keys = ("name", "type", "output_shape", "parameters", "target", "default", "recommended", "relu")
    assert [tuple(layer[key] for key in keys) for layer in layers] == LAYERS
    for layer in layers:
        assert set(layer) == {*keys, "reason"}
        assert (layer["reason"] is None) == layer["target"]
        assert layer["target"] or "2 dimensions" in layer["reason"]


def test_layers_of_the_real_model(client: httpx.Client) -> None:
    layers = client.get("/models/efficientnet_lite0/layers").json()["layers"]
    head = next(layer for layer in layers if layer["name"] == "conv_head")
    assert head["output_shape"] == [1280, 7, 7]
    assert head["parameters"] == 320 * 1280
    assert [layer["name"] for layer in layers if layer["default"]] == ["conv_head"]
    model = client.get("/models/efficientnet_lite0").json()
    assert [layer["name"] for layer in layers if layer["recommended"]] == [model["recommended_layer"]]
    # the count of the paper's authors; rows without a dot hold all others
    assert sum(layer["parameters"] for layer in layers if "." not in layer["name"]) == 4_652_008


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer[0])
def test_what_the_summary_calls_a_target_is_one(client: httpx.Client, chelsea: bytes, layer: Any) -> None:
    name, target = layer[0], layer[4]
    response = post(client, chelsea, gen_params={"target_conv_layer": name}, size="model")
    assert response.status_code == (200 if target else 422), response.text
    assert target or response.json()["code"] == "unknown_layer"


@pytest.mark.parametrize(
    ("model", "query", "expected"),
    [
        ("tiny", "", {0: "ant", 1: "bee", 2: "cat", 3: "dog", 4: "cat"}),
        ("tiny", "CAT", {2: "cat", 4: "cat"}),
        ("tiny", "3", {3: "dog"}),
        ("tiny", "elk", {}),
        ("efficientnet_lite0", "egyptian CAT", {285: "Egyptian cat"}),
        ("efficientnet_lite0", "tabby", {281: "tabby"}),
        ("efficientnet_lite0", "espresso", {550: "espresso maker", 967: "espresso"}),
    ],
)
def test_classes(client: httpx.Client, model: str, query: str, expected: dict[int, str]) -> None:
    classes = client.get(f"/models/{model}/classes", params={"query": query}).json()["classes"]
    assert {entry["class_id"]: entry["class_name"] for entry in classes} == expected


# Methods


@pytest.fixture(scope="module")
def methods(client: httpx.Client) -> dict[str, Any]:
    return {method["name"]: method for method in client.get("/methods").json()["methods"]}


def test_methods(methods: dict[str, Any]) -> None:
    assert {"grad_cam", "guided_grad_cam"} <= set(methods)
    assert (methods["grad_cam"]["family"], methods["grad_cam"]["channels"]) == ("cam", 1)
    assert (methods["guided_grad_cam"]["family"], methods["guided_grad_cam"]["channels"]) == ("pixel", 3)
    for method in methods.values():
        assert method["paper"].startswith("https://")
        assert method["description"]
        assert method["cost"]
        jsonschema.Draft202012Validator.check_schema(method["gen_params"])


CORRECT: list[tuple[str, dict[str, Any]]] = [
    ("grad_cam", {}),
    ("grad_cam", {"target_conv_layer": "0", "use_conv_only": False, "scaling": "none"}),
    ("grad_cam", {"target_conv_layer": "recommended", "scaling": "scale_before_relu"}),
    ("grad_cam", {"use_conv_only": "true"}),
    ("grad_cam", {"use_conv_only": "false"}),
    ("grad_cam", {"target_conv_layer": ["2"]}),
    ("guided_grad_cam", {"target_conv_layer": "2"}),
]
WRONG: list[Any] = [
    ("grad_cam", {"scaling": "scale"}),
    ("grad_cam", {"scaling": None}),
    ("grad_cam", {"scalling": "none"}),
    ("grad_cam", {"use_conv_only": "yes"}),
    ("grad_cam", {"use_conv_only": 1}),
    ("grad_cam", {"target_conv_layer": 2}),
    ("grad_cam", {"target_conv_layer": []}),
    ("grad_cam", {"target_conv_layer": ""}),
    ("guided_grad_cam", {"scaling": "none"}),
    ("guided_grad_cam", {"use_conv_only": True}),
]


@pytest.mark.parametrize(("method", "params"), CORRECT)
def test_correct_parameters_pass_schema_and_service(
    client: httpx.Client, methods: dict[str, Any], chelsea: bytes, method: str, params: dict[str, Any]
) -> None:
    jsonschema.Draft202012Validator(methods[method]["gen_params"]).validate(params)
    response = post(client, chelsea, method=method, gen_params=params, size="model")
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(("method", "params"), WRONG)
def test_wrong_parameters_fail_schema_and_service(
    client: httpx.Client, methods: dict[str, Any], chelsea: bytes, method: str, params: dict[str, Any]
) -> None:
    assert not jsonschema.Draft202012Validator(methods[method]["gen_params"]).is_valid(params)
    response = post(client, chelsea, method=method, gen_params=params, size="model")
    assert response.status_code == 422, response.text
    (key,) = params
    assert response.json()["errors"][0]["pointer"] == f"/gen_params/{key}"


# Health


def test_probes(client: httpx.Client) -> None:
    for path in ("/livez", "/readyz"):
        response = client.get(path)
        assert response.status_code == 200
        assert response.headers["content-type"] == "application/json"
        assert response.headers["X-Request-ID"]
        assert response.headers["Server-Timing"].startswith("total;dur=")


@pytest.mark.parametrize(("path", "status"), [("/livez", 200), ("/models", 200), ("/models/tyni", 404), ("/", 307)])
def test_head_is_the_head_of_get_and_no_byte_more(server: Server, path: str, status: int) -> None:
    url = urlsplit(server.url)
    with server.client() as client, socket.create_connection((url.hostname, url.port), timeout=60) as connection:
        length = client.get(path, headers={"X-Request-ID": "same"}).headers["content-length"]
        connection.sendall(
            f"HEAD {path} HTTP/1.1\r\nHost: localhost\r\nX-Request-ID: same\r\nConnection: close\r\n\r\n".encode()
        )
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    head, body = answer.split(b"\r\n\r\n")
    assert body == b""
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert b"\r\ncontent-length: %s\r\n" % length.encode() in head


def test_interactive_documentation_is_there(client: httpx.Client) -> None:
    assert client.get("/", follow_redirects=True).url.path == "/docs"
    response = client.get("/docs")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/html")
