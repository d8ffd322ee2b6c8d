"""HiResCAM (Draelos and Carin 2020)."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from service.explain.mathematics import GradModifier, modified
from service.explain.method import WeightedCam, WeightedCamParams, register
from service.explain.trace import Trace


class HiResCamParams(WeightedCamParams):
    grad_modifier: GradModifier | None = Field(
        None, description="what is done to the gradient before anything else (keras-vis: grad_modifier)"
    )


@register
class HiResCam(WeightedCam):
    name = "hires_cam"
    paper = "https://arxiv.org/abs/2011.08891"
    description = "Each value of the target layer times its own gradient, so that no place borrows another's gradient."
    cost = "one forward pass, one backward pass through what follows the target layer"
    Params = HiResCamParams

    def weighted(self, trace: Trace, params: WeightedCamParams) -> Tensor:
        assert isinstance(params, HiResCamParams)
        return modified(trace.gradient, params.grad_modifier) * trace.activation
