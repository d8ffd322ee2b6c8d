"""What OpenAPI tells of the endpoints that read their bodies by hand, and of problems."""

from __future__ import annotations

import functools
import json
from typing import Any

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from service.api.middleware import PROBES
from service.api.negotiation import SINGLE
from service.api.problems import MEDIA_TYPE
from service.api.responses import Problem
from service.api.schemas import HeatmapFields, InferFields
from service.errors import HeadersTooLarge, HostNotAllowed, ServiceError

Schema = dict[str, Any]

REF = "#/components/schemas/{model}"
REQUESTS: dict[type[InferFields], str] = {HeatmapFields: "HeatmapRequest", InferFields: "InferRequest"}
BINARY = {"type": "string", "format": "binary", "contentMediaType": "application/octet-stream"}
PICTURES = {
    "type": "array",
    "items": BINARY,
    "minItems": 1,
    "default": [],  # else Swagger's page sends the text "string"
    "description": "Pictures; JPEG, PNG, WebP, GIF, BMP, TIFF.",
}
BASE64_PICTURES = {
    "type": "array",
    "items": {"type": "string"},
    "minItems": 1,
    "description": "Pictures, each in base64 or as a data URI.",
}
SINGLE_HEADERS = {
    "X-Class-Id": ("integer", "Of a single heatmap: the class it explains."),
    "X-Class-Name": ("string", "Of a single heatmap: its class's name, percent-encoded UTF-8."),
    "X-Confidence": ("number", "Of a single heatmap: its class's confidence."),
}


def install(app: FastAPI, open_to_all: bool) -> None:
    """Add the schemas that routes refer to by name, and that no route of FastAPI's own returns.

    `open_to_all`: the routes that need the right to predict work without a key, too.
    """
    generate = app.openapi

    @functools.cache
    def openapi() -> Schema:
        document = generate()
        _drop_fastapis_422(document)
        if open_to_all:
            _make_keys_optional(document)
        _tell_of_every_operation(document, HeadersTooLarge)
        _tell_of_every_operation(document, HostNotAllowed, but=PROBES)
        schemas = document["components"]["schemas"]
        schemas |= {name: _with_images(kind, name) for kind, name in REQUESTS.items()}
        schemas |= models_json_schema([(Problem, "serialization")], ref_template=REF)[1]["$defs"]
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend the schema


def problems(*kinds: type[ServiceError]) -> dict[int | str, Schema]:
    """The `responses` of a route that may raise these errors."""
    titles: dict[int | str, list[str]] = {}
    for kind in kinds:
        titles.setdefault(kind.status, []).append(f"{kind.title} (`{kind.code}`)")
    return {
        status: {"description": "; ".join(found), "content": {MEDIA_TYPE: {"schema": _ref("Problem")}}}
        for status, found in sorted(titles.items(), key=lambda item: str(item[0]))
    }


def single_heatmap() -> Schema:
    """The 200 response's other media types: the single heatmap itself."""
    return {
        "description": "The answer, as Accept and `result_format` ask for it.",
        "content": {media_type: {"schema": BINARY} for media_type in SINGLE},
        "headers": {
            name: {"description": description, "schema": {"type": kind}}
            for name, (kind, description) in SINGLE_HEADERS.items()
        },
    }


def request_body(kind: type[InferFields]) -> Schema:
    """The three encodings of a request with these fields, and the fields as query parameters."""
    properties = kind.model_json_schema()["properties"]
    return {
        "parameters": [_query_parameter(name, schema) for name, schema in properties.items()],
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "properties": {"image": BINARY, "images": PICTURES, **properties},
                        "additionalProperties": False,
                        "anyOf": [{"required": ["image"]}, {"required": ["images"]}],
                    }
                },
                "application/json": {"schema": _ref(REQUESTS[kind])},
                "image/*": {"schema": BINARY},
                "application/octet-stream": {"schema": BINARY},
            },
        },
    }


def _drop_fastapis_422(document: Schema) -> None:
    """FastAPI assumes an error of its own for every route with parameters; here texts are never refused by it."""
    for path in document["paths"].values():
        for operation in path.values():
            if "application/json" in operation["responses"].get("422", {}).get("content", {}):
                del operation["responses"]["422"]
    for name in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(name, None)


def _make_keys_optional(document: Schema) -> None:
    for path in document["paths"].values():
        for operation in path.values():
            rights = {right for scheme in operation.get("security", ()) for roles in scheme.values() for right in roles}
            if rights == {"predict"}:
                operation["security"].insert(0, {})


def _tell_of_every_operation(document: Schema, kind: type[ServiceError], but: tuple[str, ...] = ()) -> None:
    """Add an error that comes before any route is asked, `but` of some paths."""
    for path in document["paths"].keys() - but:
        for operation in document["paths"][path].values():
            operation["responses"] |= {str(status): response for status, response in problems(kind).items()}


def _ref(name: str) -> Schema:
    return {"$ref": REF.format(model=name)}


def _with_images(kind: type[InferFields], name: str) -> Schema:
    """The schema of a JSON body: the pictures and the fields."""
    schema = kind.model_json_schema()
    properties = {"images": BASE64_PICTURES, **schema["properties"]}
    return {**schema, "title": name, "properties": properties, "required": ["images"]}


def _query_parameter(name: str, schema: Schema) -> Schema:
    """The default is told in words: one of the schema's would be sent by Swagger's page, beside the one in the body."""
    description = schema["description"]
    default = schema.get("default")
    if default is not None:
        description += f" Default: `{default if isinstance(default, str) else json.dumps(default)}`."
    bare = {key: value for key, value in schema.items() if key not in ("default", "examples", "description")}
    if schema.get("type") == "object":  # the page sends a made-up object, and with a contentMediaType nothing at all
        bare = {"type": "string"}
        description += " Written as JSON."
    return {"name": name, "in": "query", "required": False, "description": description, "schema": bare}
