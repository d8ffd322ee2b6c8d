"""What OpenAPI tells of the endpoints that read their bodies by hand, and of problems.

Written for generators of clients: what has a name is a component, a form is one object, and a default is told in words,
for generated clients send a default that a schema states, and what is left out depends on the rest.
"""

from __future__ import annotations

import functools
import json
from typing import Any

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from service.api.negotiation import SINGLE
from service.api.problems import MEDIA_TYPE
from service.api.raised import FRAME
from service.api.responses import Problem
from service.api.schemas import AS_TEXT, HeatmapFields, InferFields
from service.errors import ServiceError

Schema = dict[str, Any]

REF = "#/components/schemas/{model}"
NAMES: dict[type[InferFields], str] = {HeatmapFields: "Heatmap", InferFields: "Infer"}
BINARY = {"type": "string", "format": "binary", "contentMediaType": "application/octet-stream"}
UPLOADS = [*(f"image/{kind}" for kind in ("jpeg", "png", "webp", "gif", "bmp", "tiff")), "application/octet-stream"]
"""The last one is what a client sends that does not look into its files."""
FILES = {
    "image": {**BINARY, "description": "A picture; JPEG, PNG, WebP, GIF, BMP, TIFF. This or `images` is needed."},
    "images": {"type": "array", "items": BINARY, "description": "Several pictures."},
}
BASE64_PICTURES = {
    "type": "array",
    "items": {"type": "string"},
    "minItems": 1,
    "description": "Pictures, each in base64 or as a data URI.",
}
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
UNTOUCHED = {"images": [], "timeout_s": 30}
"""What Swagger's page writes into fields of a form without a default; else it makes up a text."""
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
        if open_to_all:
            _make_keys_optional(document)
        schemas = document["components"]["schemas"]
        for kind, name in NAMES.items():
            schemas |= {f"{name}Form": _form(kind, name), f"{name}Request": _request(kind, name), **_choices(kind)}
        schemas |= models_json_schema([(Problem, "serialization")], ref_template=REF)[1]["$defs"]
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend the schema


def problems(*kinds: type[ServiceError]) -> dict[int | str, Schema]:
    """The `responses` of a route that may raise these errors, and those that the frame around every route raises."""
    titles: dict[int | str, list[str]] = {}
    for kind in dict.fromkeys((*kinds, *FRAME)):
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
    name = NAMES[kind]
    return {
        "parameters": [_query_parameter(*field) for field in _text_fields(kind).items()],
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {"schema": _ref(f"{name}Form")},
                "application/json": {"schema": _ref(f"{name}Request")},
                **{media_type: {"schema": BINARY} for media_type in UPLOADS},
            },
        },
    }


def _make_keys_optional(document: Schema) -> None:
    for path in document["paths"].values():
        for operation in path.values():
            rights = {right for scheme in operation.get("security", ()) for roles in scheme.values() for right in roles}
            if rights == {"predict"}:
                operation["security"].insert(0, {})


def _ref(name: str) -> Schema:
    return {"$ref": REF.format(model=name)}


def _fields(kind: type[InferFields]) -> dict[str, Schema]:
    """The fields as JSON has them: a choice refers to its component, a default is told in words."""
    properties = kind.model_json_schema()["properties"]
    return {name: _in_words(_named(name, schema)) for name, schema in properties.items()}


def _text_fields(kind: type[InferFields]) -> dict[str, Schema]:
    """The fields as forms and queries have them."""
    return {
        name: {**AS_TEXT[name], "description": schema["description"]} if name in AS_TEXT else schema
        for name, schema in _fields(kind).items()
    }


def _choices(kind: type[InferFields]) -> dict[str, Schema]:
    """The components of the fields that are one of several words."""
    properties = kind.model_json_schema()["properties"]
    return {
        _component(name): {"type": "string", "enum": schema["enum"], "title": _component(name)}
        for name, schema in properties.items()
        if "enum" in schema
    }


def _named(name: str, schema: Schema) -> Schema:
    if "enum" not in schema:
        return schema
    return {**_ref(_component(name)), **{key: schema[key] for key in ("description", "default")}}


def _component(name: str) -> str:
    return name.title().replace("_", "")


def _in_words(schema: Schema) -> Schema:
    described = {key: value for key, value in schema.items() if key not in ("default", "title")}
    if "Default: " in schema["description"]:
        return described
    default = schema["default"]
    text = default if isinstance(default, str) else json.dumps(default)
    return {**described, "description": f"{schema['description']} Default: `{text}`."}


def _form(kind: type[InferFields], name: str) -> Schema:
    examples = {key: field.default for key, field in kind.model_fields.items()} | UNTOUCHED
    fields: Schema = {**FILES, **_text_fields(kind)}
    properties = {
        key: {**schema, "examples": [examples[key]]} if key in examples else schema for key, schema in fields.items()
    }
    return {"type": "object", "title": f"{name}Form", "properties": properties, "additionalProperties": False}


def _request(kind: type[InferFields], name: str) -> Schema:
    """The schema of a JSON body: the pictures and the fields."""
    return {
        "type": "object",
        "title": f"{name}Request",
        "properties": {"images": BASE64_PICTURES, **_fields(kind)},
        "required": ["images"],
        "additionalProperties": False,
        "examples": [{"images": [PIXEL]}],  # else Swagger's page makes up a value for each field
    }


def _query_parameter(name: str, schema: Schema) -> Schema:
    description = schema["description"]
    bare = {key: value for key, value in schema.items() if key != "description"}
    if schema.get("type") == "object":  # Swagger's page sends a made-up object, and with a contentMediaType nothing
        bare = {"type": "string"}
        description += " Written as JSON."
    return {"name": name, "in": "query", "required": False, "description": description, "schema": bare}
