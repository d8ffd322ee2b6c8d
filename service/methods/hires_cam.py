"""HiResCAM (Draelos and Carin 2020)."""

from __future__ import annotations

from torch import Tensor

from service.explain.mathematics import modified
from service.explain.method import GradientCamParams, WeightedCam, WeightedCamParams, register
from service.explain.trace import Trace


@register
class HiResCam(WeightedCam):
    name = "hires_cam"
    paper = "https://arxiv.org/abs/2011.08891"
    description = "Each value of the target layer times its own gradient, so that no place borrows another's gradient."
    cost = "one forward pass, one backward pass through what follows the target layer"
    Params = GradientCamParams

    def weighted(self, trace: Trace, params: WeightedCamParams) -> Tensor:
        assert isinstance(params, GradientCamParams)
        return modified(trace.gradient, params.grad_modifier) * trace.activation

    def term_error(self, trace: Trace, params: WeightedCamParams) -> Tensor:
        """The sum over channels of |g A|."""
        return self.weighted(trace, params).abs().sum(dim=1)
