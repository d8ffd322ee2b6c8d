"""The fields of a request: names, constraints, descriptions. How they are encoded on the wire is not said here."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainValidator,
    Tag,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError

from service.errors import nearest
from service.imaging.colormaps import COLORMAPS
from service.imaging.maps import Size
from service.imaging.render import Encoding, Format
from service.workers.messages import ClassRef, Priority

MAX_ID = 2**31 - 1
MAX_NAME = 512
MAX_TARGETS = 4096
MAX_PARAMS = 10_000
MAX_METHODS = 64

CLASS_SCHEMA = {
    "anyOf": [
        {"type": "integer", "minimum": 0, "maximum": MAX_ID},
        {"type": "string", "minLength": 1, "maxLength": MAX_NAME},
    ]
}
FLAT_SCHEMA = {"type": "array", "items": CLASS_SCHEMA, "maxItems": MAX_TARGETS}
METHOD_SCHEMA = {"type": "string", "minLength": 1, "maxLength": MAX_NAME}
METHODS_SCHEMA = {
    "type": "array",
    "items": METHOD_SCHEMA,
    "minItems": 1,
    "maxItems": MAX_METHODS,
    "uniqueItems": True,
}
AS_TEXT = {"method": METHODS_SCHEMA, "target_classes": FLAT_SCHEMA}
"""How forms and queries have the fields that JSON has in several types: a list is the field repeated."""


def _class_ref(value: object) -> ClassRef:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_ID:
        return value
    if isinstance(value, str) and 0 < len(value) <= MAX_NAME:
        return value
    raise PydanticCustomError("class_ref", "A class is an id (an integer from 0) or a name (a string)")


def _shape(value: object) -> str:
    return "nested" if isinstance(value, list) and any(isinstance(item, list) for item in value) else "flat"


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _distinct(names: list[str]) -> list[str]:
    if len(set(names)) < len(names):
        raise PydanticCustomError("distinct", "Each method may be asked for once")
    return names


def _known_colormap(name: str) -> str:
    if name not in COLORMAPS:
        hint = nearest(name[:MAX_NAME], COLORMAPS)
        raise PydanticCustomError(
            "colormap",
            "There is no such colormap; known are {known}.{hint}",
            {"known": ", ".join(COLORMAPS), "hint": hint},
        )
    return name


def _bounded(value: object) -> object:
    if isinstance(value, list) and sum(len(i) if isinstance(i, list) else 1 for i in value) > MAX_TARGETS:
        raise PydanticCustomError("too_many", f"One request may name at most {MAX_TARGETS} target classes")
    return value


def _finite(params: dict[str, object]) -> dict[str, object]:
    """JSON has no infinity, but 1e999 reads as one."""
    values: list[object] = [params]
    for value in values:
        if isinstance(value, float) and not math.isfinite(value):
            raise PydanticCustomError("finite", "Every number must be finite")
        if isinstance(value, dict | list):
            values += value.values() if isinstance(value, dict) else value
        if len(values) > MAX_PARAMS:
            raise PydanticCustomError("too_many", f"There may be at most {MAX_PARAMS} values")
    return params


WireClass = Annotated[ClassRef, PlainValidator(_class_ref), WithJsonSchema(CLASS_SCHEMA)]
Targets = Annotated[
    Annotated[list[WireClass], Tag("flat")] | Annotated[list[list[WireClass]], Tag("nested")],
    Discriminator(_shape),
    BeforeValidator(_bounded),
    WithJsonSchema({"anyOf": [FLAT_SCHEMA, {"type": "array", "items": FLAT_SCHEMA}]}),
]
Methods = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=MAX_NAME)]],
    Field(min_length=1, max_length=MAX_METHODS),
    BeforeValidator(_as_list),
    AfterValidator(_distinct),
    WithJsonSchema({"anyOf": [METHOD_SCHEMA, METHODS_SCHEMA]}),
]


class InferFields(BaseModel):
    """The fields of `POST /models/{id}/infer`."""

    model_config = ConfigDict(extra="forbid", frozen=True, title="InferFields")

    top_k: int = Field(
        5,
        ge=0,
        le=MAX_ID,
        description="How many classes the answer lists; 0 lists all. Default: `5`; `dl_result`: `0`.",
    )
    timeout_s: Annotated[
        Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)] | None,
        WithJsonSchema({"type": "number", "exclusiveMinimum": 0, "maximum": 3600}),
    ] = Field(None, description="The deadline of the whole request in seconds. Default: the server's setting.")
    priority: Priority = Field(
        "interactive", description="`batch`: it may wait, and is passed by others, though never for long."
    )
    result_format: Literal["results", "dl_result"] = Field(
        "results", description="`dl_result`: each entry of `results` is HALCON's DLResult dictionary."
    )


class HeatmapFields(InferFields):
    """The fields of `POST /models/{id}/heatmap`."""

    model_config = ConfigDict(title="HeatmapFields")

    method: Methods = Field(
        ["grad_cam"],
        description="A name from `GET /methods`, or several, computed in one pass where they can share it.",
    )
    target_classes: Targets = Field(
        [],
        description="Empty: the most confident class of each picture; a list of classes: one heatmap per entry for "
        "every picture; a list of such lists: one list per picture. A number is an id, a string a name; in forms and "
        "queries digits alone are an id, and a list of lists is one JSON array.",
    )
    gen_params: Annotated[dict[str, object], AfterValidator(_finite)] = Field(
        {},
        description="The methods' parameters, described by `GET /methods`. A key must suit every method asked for; an "
        "object under a method's name is for that method alone.",
    )
    format: Format = Field(
        "overlay",
        description="`overlay`: colours over the picture; `heatmap`: colours alone; `gray`: 8-bit; `gray16`: 16-bit "
        "PNG; `npy`: float32 array. Default: `overlay`; `dl_result` and `Accept: application/x-npy`: `npy`.",
    )
    encoding: Encoding = Field(
        "png",
        description="The file format of `overlay` and `heatmap`. Default: `png`; `Accept: image/webp`: `webp`; "
        "`Accept: image/jpeg`: `jpeg`.",
    )
    size: Size = Field("original", description="The picture's own pixels, or the network's input.")
    colormap: Annotated[
        str, AfterValidator(_known_colormap), WithJsonSchema({"type": "string", "enum": list(COLORMAPS)})
    ] = Field("jet", description="The colours of `overlay` and `heatmap`.")
    alpha: float = Field(
        0.5, ge=0, le=1, allow_inf_nan=False, description="`overlay` is alpha x colours + (1 - alpha) x picture."
    )
