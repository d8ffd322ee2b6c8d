"""What answers look like, for OpenAPI and for the GET endpoints; `answers` builds the large ones by hand."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, RootModel

from service.errors import ServiceError
from service.imaging.render import Format
from service.workers.messages import State


class Wire(BaseModel):
    """Reads the messages' dataclasses; a key that no one announced is a defect."""

    model_config = ConfigDict(extra="forbid", from_attributes=True)


class ScoredClass(Wire):
    class_id: int
    class_name: str
    confidence: float | None = Field(description="The softmax or sigmoid probability; null where it is not finite.")


class HeatmapEntry(Wire):
    method: str
    class_id: int
    class_name: str
    confidence: float | None
    gen_params: dict[str, Any] = Field(description="The effective parameters, defaults and seed included.")
    precision: str
    value_range: tuple[float | None, float | None] = Field(
        description="Minimum and maximum of the raw map at the layer's resolution."
    )
    rounding_error: float | None = Field(
        description="How far rounding may have moved the raw map at its worst place; null: not estimated."
    )
    completeness_error: float | None = Field(
        description="By which share of the difference of the scores the values of `integrated_gradients` miss it."
    )
    degenerate: Literal["all_zero", "all_negative", "constant", "not_finite", "cancelled"] | None = Field(
        description="Why the map shows nothing. `cancelled`: the rounding error is over a tenth of its maximum."
    )
    format: Format
    media_type: str
    width: int
    height: int
    data: str = Field(description="The picture or array in base64.", json_schema_extra={"contentEncoding": "base64"})


class PictureEntry(Wire):
    index: int
    width: int
    height: int
    classes: list[ScoredClass]


class HeatmapPictureEntry(PictureEntry):
    heatmaps: list[HeatmapEntry] = Field(description="Methods outer, targets inner, in the order asked.")


class DLResult(Wire):
    """HALCON's DLResult dictionary."""

    classification_class_ids: list[int]
    classification_class_names: list[str]
    classification_confidences: list[float | None]


class HeatmapDLResult(DLResult):
    """HALCON's DLResult dictionary, with `heatmap_<method>` dictionaries beside the keys named here."""

    model_config = ConfigDict(extra="allow")

    __pydantic_extra__: dict[str, dict[str, HeatmapEntry]]


class Envelope(Wire):
    model_id: str
    revision: str
    request_id: str


class HeatmapResults(Envelope):
    result_format: Literal["results"]
    results: list[HeatmapPictureEntry]


class HeatmapDLResults(Envelope):
    result_format: Literal["dl_result"]
    results: list[HeatmapDLResult]


class InferResults(Envelope):
    result_format: Literal["results"]
    results: list[PictureEntry]


class InferDLResults(Envelope):
    result_format: Literal["dl_result"]
    results: list[DLResult]


class HeatmapAnswer(RootModel[HeatmapResults | HeatmapDLResults]):
    """`result_format` tells the two apart."""

    root: HeatmapResults | HeatmapDLResults = Field(discriminator="result_format")


class InferAnswer(RootModel[InferResults | InferDLResults]):
    """`result_format` tells the two apart."""

    root: InferResults | InferDLResults = Field(discriminator="result_format")


class Model(Wire):
    id: str
    revision: str | None
    state: State
    reason: str | None = Field(description="Why the model failed.")
    type: str | None
    architecture: str | None
    device: str | None
    runtime: Literal["cpu", "gpu"] | None
    precision: str | None
    input: dict[str, Any] | None = Field(description="The preprocessing, as in the model's specification.")
    num_classes: int | None
    default_layer: str | None
    recommended_layer: str | None
    compiled_layers: list[str] = Field(description="The layers whose forward pass runs compiled.")
    compiled_bytes: int = Field(description="What their packages take on disk; about three times that in memory.")


class ModelList(Wire):
    models: list[Model]


class Layer(Wire):
    name: str
    type: str
    output_shape: list[int]
    parameters: int
    target: bool = Field(description="Can it be a target layer? Else `reason` says why not.")
    reason: str | None
    default: bool
    recommended: bool
    relu: str | None = Field(description="The ReLU that is fused with the layer.")


class LayerList(Wire):
    layers: list[Layer]


class ClassLabel(Wire):
    class_id: int
    class_name: str


class ClassList(Wire):
    classes: list[ClassLabel]


class Method(Wire):
    name: str
    family: Literal["cam", "pixel", "perturbation"]
    channels: int = Field(description="1 or 3.")
    paper: str
    description: str
    cost: str = Field(description="Passes through the network per map.")
    gen_params: dict[str, Any] = Field(description="JSON Schema of the parameters.")


class MethodList(Wire):
    methods: list[Method]


class Alive(Wire):
    status: Literal["alive"]


class Ready(Wire):
    status: Literal["ready"]
    failed_models: dict[str, str | None] = Field(description="Models that could not be loaded, and why.")


class NotReady(Wire):
    status: Literal["not_ready"]
    reasons: list[str]
    failed_models: dict[str, str | None]


def _codes(kind: type[ServiceError]) -> dict[str, None]:
    """The codes of an error and of all that are derived from it."""
    return {kind.code: None} | {code: None for one in kind.__subclasses__() for code in _codes(one)}


CODES = tuple(_codes(ServiceError))


class ProblemPlace(Wire):
    pointer: str = Field(description="JSON pointer (RFC 6901) into the fields of the request.")
    detail: str


class Problem(Wire):
    """RFC 9457."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    code: str = Field(description="Stable name of the problem.", json_schema_extra={"enum": list(CODES)})
    request_id: str
    errors: list[ProblemPlace] = Field(default_factory=list, description="Where the input is to blame.")
