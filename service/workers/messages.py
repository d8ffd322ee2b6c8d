"""What crosses the border between the server and its workers, and nothing else: plain, frozen, picklable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pickle import PickleBuffer
from typing import Literal, SupportsIndex

from service.errors import ServiceError
from service.imaging.maps import Size
from service.imaging.render import Encoding, Format
from service.models.repository import Entry

ClassRef = int | str
SERVED_TYPE = "classification"
Priority = Literal["interactive", "batch"]
BEAT_S = 1.0
BATCH_DELAY_S = 10.0
"""A request that may wait has its turn as if it had come so much later: it is passed, but never for long."""
INCOMPLETE = 0.05
"""A completeness error over this is logged: more steps would be needed."""
EXIT_POISONED = 70
"""The exit code of a worker whose device is lost to it."""
State = Literal["loading", "ready", "failed", "unloaded"]


@dataclass(frozen=True)
class ExplainRequest:
    """What a client asks of one model; field names and meaning are those of `POST /models/{id}/heatmap`.

    A picture is the bytes of its file, or a `str` in base64 or a data URI, which the worker decodes.
    No methods: predictions alone. `target_classes` has one tuple per picture; an empty one is the most
    confident class. `as_base64`: heatmaps' `data` in base64.
    """

    model_id: str
    pictures: tuple[bytes | str, ...]
    target_classes: tuple[tuple[ClassRef, ...], ...]
    methods: tuple[str, ...] = ()
    gen_params: Mapping[str, object] = field(default_factory=dict)
    top_k: int = 5
    format: Format = "overlay"
    encoding: Encoding = "png"
    size: Size = "original"
    colormap: str = "jet"
    alpha: float = 0.5
    as_base64: bool = True
    priority: Priority = "interactive"


@dataclass(frozen=True)
class ClassScore:
    class_id: int
    class_name: str
    confidence: float


@dataclass(frozen=True)
class Heatmap:
    """One heatmap of the answer. `channels` is 1 or 3; `value_range` is of the raw map at the layer's resolution.

    `rounding_error` is in the raw map's unit, `completeness_error` a share; None where the method has none.
    """

    method: str
    channels: int
    class_id: int
    class_name: str
    confidence: float
    gen_params: Mapping[str, object]
    precision: str
    value_range: tuple[float, float]
    rounding_error: float | None
    completeness_error: float | None
    degenerate: str | None
    format: Format
    media_type: str
    width: int
    height: int
    data: bytes

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[type[Heatmap], tuple[object, ...]]:
        """Its data may be pickled beside it (PEP 574)."""
        beside = {"data": PickleBuffer(self.data)} if protocol.__index__() >= 5 else {}
        return Heatmap, (*(vars(self) | beside).values(),)


@dataclass(frozen=True)
class PictureResult:
    index: int
    width: int
    height: int
    classes: tuple[ClassScore, ...]
    heatmaps: tuple[Heatmap, ...]


@dataclass(frozen=True)
class Timings:
    """Seconds spent on each stage of a request."""

    queue: float = 0.0
    decode: float = 0.0
    compute: float = 0.0
    render: float = 0.0


@dataclass(frozen=True)
class Answer:
    model_id: str
    revision: str
    results: tuple[PictureResult, ...]
    timings: Timings

    @property
    def incomplete(self) -> float | None:
        """The largest completeness error of its heatmaps, if it is over the bound INCOMPLETE."""
        heatmaps = (heatmap for result in self.results for heatmap in result.heatmaps)
        return max((error for one in heatmaps if (error := one.completeness_error or 0.0) > INCOMPLETE), default=None)


@dataclass(frozen=True)
class LayerInfo:
    """One row of HALCON's network summary. `reason` says why the layer can't be a target, None where it can."""

    name: str
    type: str
    output_shape: tuple[int, ...]
    parameters: int
    target: bool
    reason: str | None
    default: bool
    recommended: bool
    relu: str | None


@dataclass(frozen=True)
class ModelInfo:
    """What `GET /models/{id}` tells, with the rows behind `/layers` and `/classes`."""

    id: str
    state: State
    reason: str | None = None
    revision: str | None = None
    type: str | None = None
    architecture: str | None = None
    device: str | None = None
    runtime: Literal["cpu", "gpu"] | None = None
    precision: str | None = None
    input: Mapping[str, object] | None = None
    num_classes: int | None = None
    default_layer: str | None = None
    recommended_layer: str | None = None
    compiled_layers: tuple[str, ...] = ()
    compiled_bytes: int = 0
    layers: tuple[LayerInfo, ...] = ()
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class MethodInfo:
    """What `GET /methods` tells of a method; `gen_params` is a JSON Schema. `alone`: it runs very often per picture."""

    name: str
    family: Literal["cam", "pixel", "perturbation"]
    channels: int
    paper: str
    description: str
    cost: str
    gen_params: Mapping[str, object]
    alone: bool = False


@dataclass(frozen=True)
class Job:
    """Parent to child: compute this. `deadline` is on `time.monotonic`'s clock, which processes of a machine share.

    `passable`: quick requests may pass it, because it takes long or is of the priority `batch`.
    """

    id: int
    request: ExplainRequest
    deadline: float
    passable: bool = False


@dataclass(frozen=True)
class Cancel:
    """Parent to child: nobody waits for this job any more."""

    id: int


@dataclass(frozen=True)
class Load:
    """Parent to child: read this model from the repository again; what serves it now goes on until the new one can."""

    entry: Entry


@dataclass(frozen=True)
class Unload:
    """Parent to child: let go of this model. No job for it comes afterwards."""

    model_id: str


@dataclass(frozen=True)
class Stop:
    """Parent to child: finish what runs and leave."""


@dataclass(frozen=True)
class Hello:
    """Child to parent, first: the device it serves, how many pictures it takes at a time, how many slots compute them,
    and the methods it knows."""

    device: str
    capacity: int
    slots: int
    methods: tuple[MethodInfo, ...]


@dataclass(frozen=True)
class Beat:
    """Child to parent, every BEAT_S seconds: it lives, and its longest step has taken `stalled_s` seconds."""

    stalled_s: float


@dataclass(frozen=True)
class Loading:
    """Child to parent: it begins to load this model, or has survived that (None)."""

    model_id: str | None


@dataclass(frozen=True)
class ModelChanged:
    """Child to parent: a model's state in this worker."""

    info: ModelInfo


@dataclass(frozen=True)
class Loaded:
    """Child to parent: a Load or Unload is done, or failed for this reason."""

    model_id: str
    reason: str | None = None


@dataclass(frozen=True)
class Done:
    """Child to parent: a job's outcome, and the seconds that the device worked for it."""

    id: int
    outcome: Answer | ServiceError
    spent: float = 0.0


@dataclass(frozen=True)
class Parked:
    """Child to parent: this job waits for its turn to decode and holds no picture until then; or its turn has come."""

    id: int
    parked: bool


ToChild = Job | Cancel | Load | Unload | Stop
ToParent = Hello | Beat | Loading | ModelChanged | Loaded | Parked | Done
