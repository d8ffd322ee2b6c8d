"""The OpenAPI document is whole, tells the three encodings, and describes what is really answered."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from service.api.schemas import HeatmapFields, InferFields
from tests.api.support import Api, check_problem


@pytest.fixture(scope="module")
def api() -> Api:
    return Api()


@pytest.fixture(scope="module")
def document(api: Api) -> Any:
    return api.get("/openapi.json").json()


def operations(document: Any) -> Iterator[tuple[str, Any]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield f"{method} {path}", operation


def schemas(node: Any) -> Iterator[Any]:
    """Every value of a key `schema` in the document."""
    if isinstance(node, dict):
        yield from (value for key, value in node.items() if key == "schema")
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from schemas(child)


def check(document: Any, name: str, instance: Any) -> None:
    schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
    jsonschema.Draft202012Validator(schema).validate(instance)


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict) and "$ref" in node:
        yield node["$ref"]
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from references(child)


def test_the_document_is_whole(document: Any) -> None:
    assert document["openapi"].startswith("3.1")
    components = document["components"]["schemas"]
    names = {reference.removeprefix("#/components/schemas/") for reference in references(document)}
    assert names <= set(components)
    assert "HTTPValidationError" not in components
    for schema in (*components.values(), *schemas(document["paths"])):
        jsonschema.Draft202012Validator.check_schema(schema)


def test_operations_suit_a_generated_client(document: Any) -> None:
    ids = [operation["operationId"] for _, operation in operations(document)]
    assert len(set(ids)) == len(ids) == 12
    for name, operation in operations(document):
        assert operation["summary"], name
        assert len(operation["tags"]) == 1, name
        in_path = [parameter["name"] for parameter in operation.get("parameters", []) if parameter["in"] == "path"]
        assert in_path == (["id"] if "{id}" in name else []), name


def test_errors_are_problems(document: Any) -> None:
    for name, operation in operations(document):
        for status, response in operation["responses"].items():
            if status >= "400" and "readyz" not in name:
                assert list(response["content"]) == ["application/problem+json"], name
    statuses = document["paths"]["/models/{id}/heatmap"]["post"]["responses"]
    assert set(statuses) == {
        "200",
        "400",
        "401",
        "403",
        "404",
        "406",
        "408",
        "413",
        "415",
        "421",
        "422",
        "429",
        "431",
        "500",
        "503",
        "504",
        "507",
    }
    assert "421" in document["paths"]["/metrics"]["get"]["responses"]
    assert "421" not in document["paths"]["/livez"]["get"]["responses"]


@pytest.mark.parametrize(("endpoint", "kind"), [("heatmap", HeatmapFields), ("infer", InferFields)])
def test_every_encoding_tells_every_field(document: Any, endpoint: str, kind: type[InferFields]) -> None:
    operation = document["paths"][f"/models/{{id}}/{endpoint}"]["post"]
    content = operation["requestBody"]["content"]
    fields = set(kind.model_fields)
    assert {parameter["name"] for parameter in operation["parameters"] if parameter["in"] == "query"} == fields
    assert set(content["multipart/form-data"]["schema"]["properties"]) == fields | {"image", "images"}
    name = content["application/json"]["schema"]["$ref"].rpartition("/")[2]
    assert set(document["components"]["schemas"][name]["properties"]) == fields | {"images"}
    assert {"image/*", "application/octet-stream"} < set(content)


def prefilled(schema: Any) -> str:
    """The text that Swagger's page (5.35) sends for a field of a form that nobody touched."""
    value = schema.get("examples", [schema.get("default", "")])[0]
    return ",".join(value) if isinstance(value, list) else value if isinstance(value, str) else json.dumps(value)


@pytest.mark.parametrize("endpoint", ["heatmap", "infer"])
def test_the_page_of_documentation_sends_a_form_that_is_served(document: Any, endpoint: str) -> None:
    operation = document["paths"][f"/models/{{id}}/{endpoint}"]["post"]
    for parameter in operation["parameters"]:  # the page sends none of these: they would be given twice
        sent = {"default", "example", "examples", "contentMediaType"} & parameter.get("schema", parameter).keys()
        assert not sent, parameter
        assert "content" not in parameter
        assert parameter["schema"].get("type") != "object"
    fields = operation["requestBody"]["content"]["multipart/form-data"]["schema"]["properties"]
    for without in ("image", "images"):
        texts = [(name, (None, prefilled(schema))) for name, schema in fields.items() if name != without]
        texts = [(name, (None, "") if name in ("image", "images") else text) for name, text in texts]
        api = Api()
        response = api.post(f"/models/resnet/{endpoint}", files=[*texts, (without, ("cat.png", b"one"))])
        assert response.status_code == 200, response.text
        assert (api.work.pictures, api.work.top_k, api.work.target_classes) == ((b"one",), 5, ((),))
        assert api.dispatcher.timeouts[0] > 25


def test_defaults_of_the_query_are_told_in_words(document: Any) -> None:
    parameters = document["paths"]["/models/{id}/heatmap"]["post"]["parameters"]
    told = {one["name"]: one["description"].partition("Default: ")[2] for one in parameters if one["in"] == "query"}
    assert told.pop("timeout_s") == ""
    assert told.pop("gen_params") == "`{}`. Written as JSON."
    assert (told["top_k"], told["method"], told["alpha"], told["format"]) == (
        "`5`.",
        '`["grad_cam"]`.',
        "`0.5`.",
        "`overlay`.",
    )
    assert all(told.values())


def test_single_heatmaps_are_told(document: Any) -> None:
    response = document["paths"]["/models/{id}/heatmap"]["post"]["responses"]["200"]
    types = {"application/json", "image/png", "image/webp", "image/jpeg", "application/x-npy"}
    assert set(response["content"]) == types
    assert set(response["headers"]) == {"X-Class-Id", "X-Class-Name", "X-Confidence"}


def test_requests_and_answers_suit_the_document(api: Api, document: Any) -> None:
    body = {"images": ["AA"], "method": ["a", "b"], "target_classes": [[1, "x"]], "gen_params": {"scaling": "none"}}
    check(document, "HeatmapRequest", body)
    with pytest.raises(jsonschema.ValidationError):
        check(document, "HeatmapRequest", {**body, "metod": "a"})
    check(document, "HeatmapAnswer", api.json(**body).json())
    check(document, "HeatmapAnswer", api.json(result_format="dl_result").json())
    check(document, "InferAnswer", api.json("/models/resnet/infer").json())
    check(document, "ModelList", api.get("/models").json())
    check(document, "Problem", dict(check_problem(api.raw("top_k=x"), 422, "invalid_request")))
