"""What a heatmap method is, and the trace that it reads: activations, gradients and scores, computed once and shared.

A method holds mathematics alone; the loop over pictures, the resizing, the scaling and the colours live elsewhere.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, ClassVar, Literal, TypeVar

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from torch import Tensor, fx
from torch.nn import functional as F

from service.imaging.maps import Scaling
from service.models.layers import Target
from service.models.program import Program, as_tuple, gradients_of

Family = Literal["cam", "pixel", "perturbation"]


class Pass:
    """One run of a batch through a network, shared by all methods, layers and classes that are asked of it.

    The network is cut at its targets: what lies before them ran without a graph, and a gradient costs the tail alone.
    """

    def __init__(
        self, program: Program, images: Tensor, targets: Sequence[Target] = (), values: Sequence[Tensor] | None = None
    ) -> None:
        """`images` is (N,3,H,W), normalised; `values` are the cut's roots and crossings where they are known."""
        self.program = program
        self.images = images
        self.targets = targets
        split = program.split(*(target.node for target in targets))
        if values is None:
            with torch.no_grad():
                values = as_tuple(split.head(images))
        roots = [value.detach().requires_grad_() for value in values[: len(split.roots)]]
        with torch.enable_grad():
            self.scores, *later = as_tuple(split.tail(*roots, *values[len(roots) :]))
        self.at: dict[fx.Node, Tensor] = dict(zip((*split.roots, *split.later), (*roots, *later), strict=True))
        self.logits = self.scores.detach()

    def backward(self, classes: Tensor) -> Backward:
        """The pass seen from one class per picture; `classes` is (N,), int64."""
        return Backward(self, classes)

    @cached_property
    def guided(self) -> tuple[Tensor, Tensor]:
        """The images, and their scores through the network rewritten for guided backpropagation."""
        inputs = self.images.detach().requires_grad_()
        with torch.enable_grad():
            return inputs, self.program.guided()(inputs)


class Backward:
    """The backward passes of one class per picture, each run when it is first asked for and shared by all targets.

    The gradient is that of the sum of the pictures' logits: in eval mode pictures don't mix.
    """

    def __init__(self, of: Pass, classes: Tensor) -> None:
        self._pass = of
        self._classes = classes

    def trace(self, target: Target) -> Trace:
        """What a method reads at one of the pass's targets."""
        return Trace(self._pass, self, target)

    @cached_property
    def at_targets(self) -> dict[fx.Node, Tensor]:
        """dy/dA at the node of each target."""
        at = self._pass.at
        return dict(zip(at, gradients_of(self._total(self._pass.scores), list(at.values())), strict=True))

    @cached_property
    def guided(self) -> Tensor:
        """The guided-backpropagation gradient at the images, (N,3,H,W)."""
        inputs, scores = self._pass.guided
        return gradients_of(self._total(scores), [inputs])[0]

    def _total(self, scores: Tensor) -> Tensor:
        return scores.gather(1, self._classes[:, None]).sum()


class Trace:
    """What a pass shows of one class per picture at one target. Nothing is computed before it is read."""

    def __init__(self, of: Pass, backward: Backward, target: Target) -> None:
        self._pass = of
        self._backward = backward
        self._target = target

    @property
    def images(self) -> Tensor:
        """The network's input, (N,3,H,W), normalised."""
        return self._pass.images

    @property
    def activation(self) -> Tensor:
        """A: the activation of the target layer, (N,C,h,w)."""
        return self._target.grid.fold(self._pass.at[self._target.node].detach())

    @property
    def gradient(self) -> Tensor:
        """g = dy/dA: the gradient of the target logit at the target layer, (N,C,h,w)."""
        return self._target.grid.fold(self._backward.at_targets[self._target.node])

    @property
    def guided_gradient(self) -> Tensor:
        """The guided-backpropagation gradient of the target logit at the images, (N,3,H,W)."""
        return self._backward.guided


def grad_cam(trace: Trace) -> Tensor:
    """Grad-CAM before its ReLU (Selvaraju et al. 2017, eq. 1 and 2): sum_k mean(g_k) A_k, (N,h,w)."""
    weights = trace.gradient.mean(dim=(2, 3), keepdim=True)
    return (weights * trace.activation).sum(dim=1)


def upsample(maps: Tensor, like: Tensor) -> Tensor:
    """One-channel maps (N,h,w) at the resolution of images (N,C,H,W): bilinear, corners not aligned."""
    size = like.shape[-2:]
    return F.interpolate(maps[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


def _as_bool(value: object) -> object:
    """HALCON writes booleans as strings."""
    return {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value


def _only(value: object) -> object:
    """Answers name their layers in a list; a list of one is that layer."""
    if isinstance(value, list) and len(value) != 1:
        raise ValueError(f"one layer is served at a time, not {len(value)}")
    return value[0] if isinstance(value, list) else value


Flag = Annotated[bool, BeforeValidator(_as_bool, json_schema_input_type=bool | Literal["true", "false"])]
Name = Annotated[str, Field(min_length=1)]
Layer = Annotated[
    str, BeforeValidator(_only, json_schema_input_type=Name | Annotated[list[Name], Field(min_length=1, max_length=1)])
]


class LayerParams(BaseModel):
    """The parameters of a method that reads a target layer and paints its own three channels."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    target_conv_layer: Layer | None = Field(
        None,
        description="the target layer by its module path, or 'recommended'; default: the deepest convolution "
        "(HALCON: target_conv_layer)",
    )


class CamParams(LayerParams):
    """The parameters of every method of the family `cam`."""

    use_conv_only: Flag = Field(
        True,
        description="true: the convolution with its batch norm folded in; false: the ReLU fused with it "
        "(HALCON: use_conv_only)",
    )
    scaling: Scaling = Field(
        "scale_after_relu",
        description="how the map is scaled after it was upsampled (HALCON: scaling)",
    )


class Method(ABC):
    """A heatmap method. A subclass is registered with `@register` in the file that defines it."""

    name: ClassVar[str]
    family: ClassVar[Family]
    channels: ClassVar[Literal[1, 3]]
    paper: ClassVar[str]
    description: ClassVar[str]
    cost: ClassVar[str]
    Params: ClassVar[type[LayerParams]]

    @abstractmethod
    def heatmap(self, trace: Trace, params: LayerParams) -> Tensor:
        """The raw float32 map: (N,h,w) with one channel, signed (N,H,W,3) with three. Never scaled or clipped."""


REGISTRY: dict[str, Method] = {}

M = TypeVar("M", bound=type[Method])


def register(kind: M) -> M:
    """Class decorator: make the method available under its name."""
    REGISTRY[kind.name] = kind()
    return kind
