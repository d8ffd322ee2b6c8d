"""What a heatmap method is: its parameters, what it says of itself, and its map over a trace."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, ClassVar, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.config import JsonDict
from torch import Tensor

from service.explain.mathematics import GradModifier, principal_component, summed
from service.explain.trace import Trace
from service.imaging.maps import Scaling
from service.models.layers import Target
from service.models.program import Program, Rule

Family = Literal["cam", "pixel", "perturbation"]

MAX_LAYERS = 16


def _as_bool(value: object) -> object:
    """HALCON writes booleans as strings."""
    return {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value


def _listed(value: object) -> object:
    return tuple(dict.fromkeys(value)) if isinstance(value, list) else (value,) if isinstance(value, str) else value


Flag = Annotated[bool, BeforeValidator(_as_bool, json_schema_input_type=bool | Literal["true", "false"])]
Name = Annotated[str, Field(min_length=1)]
LayerList = Annotated[list[Name], Field(min_length=1, max_length=MAX_LAYERS)]
Layers = Annotated[
    Annotated[tuple[str, ...], Field(min_length=1, max_length=MAX_LAYERS)],
    BeforeValidator(_listed, json_schema_input_type=Name | LayerList),
]
COSTLESS: JsonDict = {"x-changes-cost": False}
"""In the schema of a parameter: whatever its value is, the method takes equally long."""
Seed = Annotated[int, Field(ge=0, lt=2**63, json_schema_extra=COSTLESS)]


class GenParams(BaseModel):
    """The parameters of a method."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ScaledParams(GenParams):
    """The parameters of a one-channel method that reads no layer."""

    scaling: Scaling = Field(
        "scale_after_relu",
        description="how the map is scaled after it was upsampled (HALCON: scaling)",
        json_schema_extra=COSTLESS,
    )


class LayerParams(GenParams):
    """The parameters of a method that reads a target layer and paints its own three channels."""

    target_conv_layer: Layers | None = Field(
        None,
        description="the target layer by its module path, several of them, whose maps are averaged, or 'recommended'; "
        "default: the deepest convolution (HALCON: target_conv_layer)",
    )


class CamParams(LayerParams, ScaledParams):
    """The parameters of every method of the family `cam`."""

    use_conv_only: Flag = Field(
        True,
        description="true: the convolution with its batch norm folded in; false: the ReLU fused with it "
        "(HALCON: use_conv_only)",
    )
    aug_smooth: Flag = Field(
        False,
        description="average over six variants of the picture: as it is and mirrored, each with the network's input "
        "times 0.9, 1 and 1.1",
    )


class WeightedCamParams(CamParams):
    """The parameters of a method that weighs each value of the activation."""

    eigen_smooth: Flag = Field(
        False,
        description="the first principal component of the weighted activations instead of their sum over channels",
    )


class GradientCamParams(WeightedCamParams):
    """The parameters of a method whose weights are made of the gradient."""

    grad_modifier: GradModifier | None = Field(
        None, description="what is done to the gradient before anything else (keras-vis: grad_modifier)"
    )


class Method(ABC):
    """A heatmap method. A subclass is registered with `@register` in the file that defines it."""

    name: ClassVar[str]
    family: ClassVar[Family]
    channels: ClassVar[Literal[1, 3]] = 1
    paper: ClassVar[str]
    description: ClassVar[str]
    cost: ClassVar[str]
    Params: ClassVar[type[GenParams]]
    alone: ClassVar[bool] = False
    """Whether it runs so often per picture that a batch of several would gain nothing."""

    def refusal(self, program: Program, target: Target | None) -> str | None:  # noqa: ARG002
        """Why the method can't serve this network at this target; None where it can."""
        return None

    def rule(self, params: GenParams) -> Rule | None:  # noqa: ARG002
        """By which rule activation functions pass the gradients that it reads; None for the gradient itself."""
        return None

    def rounding_error(self, trace: Trace, params: GenParams) -> Tensor | None:  # noqa: ARG002
        """An estimate of the error (N,) by which rounding moved the map at its worst place; None: there is none."""
        return None

    def completeness_error(self, trace: Trace, params: GenParams, values: Tensor) -> Tensor | None:  # noqa: ARG002
        """By which share (N,) of it the map misses the difference of scores that it should add up to, if it should."""
        return None

    @abstractmethod
    def heatmap(self, trace: Trace, params: GenParams) -> Tensor:
        """The raw float32 map: (N,h,w) with one channel, signed (N,H,W,3) with three. Never scaled or clipped."""


class WeightedCam(Method):
    """A method of the family `cam` whose map is a sum over the channels of weighted activations."""

    family = "cam"
    Params = WeightedCamParams

    @abstractmethod
    def weighted(self, trace: Trace, params: WeightedCamParams) -> Tensor:
        """The activation of the target layer, each value with its weight, (N,C,h,w)."""

    def term_error(self, trace: Trace, params: WeightedCamParams) -> Tensor | None:  # noqa: ARG002
        """The magnitudes (N,h,w) that are rounded at each place; None where the method declares none."""
        return None

    def rounding_error(self, trace: Trace, params: GenParams) -> Tensor | None:
        assert isinstance(params, WeightedCamParams)
        if params.eigen_smooth or params.aug_smooth or (magnitudes := self.term_error(trace, params)) is None:
            return None
        return trace.eps * magnitudes.flatten(1).amax(dim=1)

    def heatmap(self, trace: Trace, params: GenParams) -> Tensor:
        assert isinstance(params, WeightedCamParams)
        weighted = self.weighted(trace, params)
        plain = summed(weighted)
        return principal_component(weighted, like=plain) if params.eigen_smooth else plain


REGISTRY: dict[str, Method] = {}

M = TypeVar("M", bound=type[Method])


def register(kind: M) -> M:
    """Class decorator: make the method available under its name."""
    REGISTRY[kind.name] = kind()
    return kind
