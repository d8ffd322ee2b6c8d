"""The OpenAPI document is whole, tells the three encodings, and describes what is really answered."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import httpx
import jsonschema
import pytest
from PIL import Image

from service.api.schemas import HeatmapFields, InferFields
from service.app import create_app
from service.errors import ServiceError
from service.settings import Settings
from tests.api.support import READY, Api, StandIn, check_problem
from tests.told import check_told

REF = "#/components/schemas/"
NO_ROUTES = {"malformed_request", "headers_timeout", "path_not_found", "method_not_allowed", "unavailable"}
"""Codes of answers to what asks for no operation, and of a class that is only derived from."""


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
    schema = {"$ref": f"{REF}{name}", "components": document["components"]}
    jsonschema.Draft202012Validator(schema).validate(instance)


def keywords(node: Any) -> Iterator[str]:
    """Every key of the document but the names of properties."""
    for key, child in node.items() if isinstance(node, dict) else ():
        yield key
        yield from keywords(list(child.values()) if key == "properties" else child)
    for child in node if isinstance(node, list) else ():
        yield from keywords(child)


def kinds(kind: type[ServiceError]) -> Iterator[type[ServiceError]]:
    yield kind
    for one in kind.__subclasses__():
        yield from kinds(one)


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict) and "$ref" in node:
        yield node["$ref"]
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from references(child)


def test_the_document_is_whole(document: Any) -> None:
    assert document["openapi"].startswith("3.1")
    components = document["components"]["schemas"]
    names = {reference.removeprefix(REF) for reference in references(document)}
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
            if status >= "400" and (name, status) != ("get /readyz", "503"):
                assert list(response["content"]) == ["application/problem+json"], name
                assert response["content"]["application/problem+json"] == {"schema": {"$ref": REF + "Problem"}}, name


def told_codes(operation: Any) -> set[str]:
    found = [re.findall(r"\(`(\w+)`\)", response["description"]) for response in operation["responses"].values()]
    return {code for codes in found for code in codes}


def test_every_error_is_one_of_the_enumeration_and_told_where_it_is_raised(document: Any) -> None:
    codes = document["components"]["schemas"]["Problem"]["properties"]["code"]["enum"]
    assert sorted(codes) == sorted({kind.code for kind in kinds(ServiceError)})
    told = {name: told_codes(operation) for name, operation in operations(document)}
    assert set(codes) - set().union(*told.values()) == NO_ROUTES
    for name, found in told.items():
        assert {"headers_too_large", "invalid_request", "internal_error"} <= found, name
        assert (
            {"key_missing", "key_wrong", "key_lacks_right", "too_many_connections", "host_not_allowed"} <= found
        ) == (name not in ("get /livez", "get /readyz")), name
    assert told["post /models/{id}/heatmap"] - told["post /models/{id}/infer"] == {
        "unknown_method",
        "unknown_layer",
        "unknown_class",
        "invalid_gen_params",
        "method_not_supported",
    }
    assert "421" in document["paths"]["/metrics"]["get"]["responses"]
    assert "421" not in document["paths"]["/livez"]["get"]["responses"]


@pytest.mark.parametrize("rows", ["layers", "classes"])
@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"state": "unloaded"}, "model_unloaded"),
        ({"state": "loading"}, "model_loading"),
        ({"state": "failed"}, "model_failed"),
        ({"type": "detection"}, "model_type_not_supported"),
    ],
)
def test_rows_of_a_model_that_has_none_tell_why_as_announced(
    document: Any, rows: str, changes: dict[str, Any], code: str
) -> None:
    response = Api(StandIn(dataclasses.replace(READY, **changes))).get(f"/models/resnet/{rows}")
    assert response.json()["code"] == code
    assert code in told_codes(document["paths"][f"/models/{{id}}/{rows}"]["get"])


def test_an_answer_that_is_not_told_is_noticed(api: Api) -> None:
    response = api.get("/models/nobody")
    check_told(response)
    response.status_code = 409
    with pytest.raises(AssertionError, match="getModel answers 409"):
        check_told(response)
    response = httpx.Response(404, json={"code": "worker_lost"}, request=response.request)
    response.headers["content-type"] = "application/problem+json"
    with pytest.raises(AssertionError, match="worker_lost"):
        check_told(response)


def test_what_linters_ask_of_the_document() -> None:
    document = create_app(Settings()).openapi()
    assert document["info"]["license"] == {"name": "Apache License 2.0", "identifier": "Apache-2.0"}
    assert [server["url"] for server in document["servers"]] == ["."]
    for name, operation in operations(document):
        assert (operation["security"] == []) == (name in ("get /livez", "get /readyz")), name


@pytest.mark.parametrize(("endpoint", "kind"), [("heatmap", HeatmapFields), ("infer", InferFields)])
def test_every_encoding_tells_every_field(document: Any, endpoint: str, kind: type[InferFields]) -> None:
    operation = document["paths"][f"/models/{{id}}/{endpoint}"]["post"]
    content = operation["requestBody"]["content"]
    fields = set(kind.model_fields)
    assert {parameter["name"] for parameter in operation["parameters"] if parameter["in"] == "query"} == fields
    assert content["multipart/form-data"] == {"schema": {"$ref": f"{REF}{endpoint.title()}Form"}}
    assert content["application/json"] == {"schema": {"$ref": f"{REF}{endpoint.title()}Request"}}
    schemas = document["components"]["schemas"]
    assert set(schemas[f"{endpoint.title()}Form"]["properties"]) == fields | {"image", "images"}
    assert set(schemas[f"{endpoint.title()}Request"]["properties"]) == fields | {"images"}
    assert set(content) - {"multipart/form-data", "application/json"} == {
        "image/jpeg",
        "image/png",
        "image/webp",
        "image/gif",
        "image/bmp",
        "image/tiff",
        "application/octet-stream",
    }


def test_forms_and_answers_suit_generators(document: Any) -> None:
    schemas = document["components"]["schemas"]
    assert "default" not in set(keywords(document))
    for name in ("HeatmapForm", "InferForm", "HeatmapRequest", "InferRequest"):
        assert schemas[name]["type"] == "object"
        assert not {"anyOf", "oneOf", "allOf"} & schemas[name].keys()
    for name in ("Heatmap", "Infer"):
        assert schemas[f"{name}Answer"]["discriminator"] == {
            "propertyName": "result_format",
            "mapping": {"results": f"{REF}{name}Results", "dl_result": f"{REF}{name}DLResults"},
        }
        results, dl_results = (schemas[f"{name}{kind}"]["properties"]["results"] for kind in ("Results", "DLResults"))
        assert results["items"] != dl_results["items"]
        assert not {"anyOf", "oneOf"} & (results.keys() | dl_results.keys())


def prefilled(schema: Any) -> str:
    """The text that Swagger's page (5.34) sends for a field of a form that nobody touched."""
    (value,) = schema["examples"]  # without it the page makes one up
    return ",".join(value) if isinstance(value, list) else value if isinstance(value, str) else json.dumps(value)


@pytest.mark.parametrize("endpoint", ["heatmap", "infer"])
def test_the_page_of_documentation_sends_a_form_that_is_served(document: Any, endpoint: str) -> None:
    operation = document["paths"][f"/models/{{id}}/{endpoint}"]["post"]
    for parameter in operation["parameters"]:  # the page sends none of these: they would be given twice
        sent = {"default", "example", "examples", "contentMediaType"} & parameter.get("schema", parameter).keys()
        assert not sent, parameter
        assert "content" not in parameter
        assert parameter["schema"].get("type") != "object"
    fields = document["components"]["schemas"][f"{endpoint.title()}Form"]["properties"]
    texts = {name: "" if name == "image" else prefilled(schema) for name, schema in fields.items()}
    for file in ("image", "images"):
        others = [(name, (None, text)) for name, text in texts.items() if name != file]
        api = Api()
        response = api.post(f"/models/resnet/{endpoint}", files=[*others, (file, ("cat.png", b"one"))])
        assert response.status_code == 200, response.text
        assert (api.work.pictures, api.work.top_k, api.work.target_classes) == ((b"one",), 5, ((),))
        assert api.dispatcher.timeouts[0] > 25


@pytest.mark.parametrize("endpoint", ["heatmap", "infer"])
def test_the_page_of_documentation_sends_json_that_is_served(api: Api, document: Any, endpoint: str) -> None:
    (example,) = document["components"]["schemas"][f"{endpoint.title()}Request"]["examples"]
    check(document, f"{endpoint.title()}Request", example)
    assert api.json(f"/models/resnet/{endpoint}", **example).status_code == 200
    (picture,) = example["images"]
    assert Image.open(io.BytesIO(base64.b64decode(picture, validate=True))).convert("RGB").size == (1, 1)


STATED = re.compile(r"Default: `([^`]+)`(?:; `dl_result`: `([^`]+)`|; `dl_result` and `Accept: [^`]+`: `([^`]+)`)?")


@pytest.mark.parametrize("result_format", ["results", "dl_result"])
def test_a_stated_default_answers_as_if_it_were_left_out(document: Any, result_format: str) -> None:
    fields = document["components"]["schemas"]["HeatmapForm"]["properties"]
    bare = Api()
    bare.raw(f"result_format={result_format}")
    for name in set(HeatmapFields.model_fields) - {"result_format", "timeout_s"}:
        stated = STATED.search(fields[name]["description"])
        assert stated, name
        always, *others = stated.groups()
        value = next(filter(None, others), always) if result_format == "dl_result" else always
        for form in (True, False):
            api = Api()
            if form:
                texts = {"result_format": result_format, name: value}
                response = api.post(data=texts, files={"image": ("cat", b"picture")})
            else:
                response = api.raw(f"result_format={result_format}&{name}={quote(value)}")
            assert response.status_code == 200, (name, value, response.text)
            assert api.work == bare.work, (name, value)
    assert fields["result_format"]["description"].endswith("Default: `results`.")
    assert fields["timeout_s"]["description"].endswith("Default: the server's setting.")


@pytest.mark.parametrize(
    ("accept", "stated"),
    [
        ("image/png", {"format": "overlay", "encoding": "png"}),
        ("image/webp", {"format": "overlay", "encoding": "webp"}),
        ("image/jpeg", {"format": "overlay", "encoding": "jpeg"}),
        ("application/x-npy", {"format": "npy"}),
    ],
)
def test_defaults_that_depend_on_accept(document: Any, accept: str, stated: dict[str, str]) -> None:
    fields = document["components"]["schemas"]["HeatmapForm"]["properties"]
    bare = Api()
    bare.raw(accept=accept)
    for name, value in stated.items():
        described = fields[name]["description"]
        assert f"`Accept: {accept}`: `{value}`" in described or f"Default: `{value}`" in described
        api = Api()
        assert api.raw(f"{name}={value}", accept=accept).status_code == 200
        assert api.work == bare.work


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
