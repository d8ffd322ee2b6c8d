"""XGrad-CAM (Fu et al. 2020)."""

from __future__ import annotations

from torch import Tensor

from service.explain.mathematics import channels_weighted, modified, quotient
from service.explain.method import GradientCamParams, WeightedCam, WeightedCamParams, register
from service.explain.trace import Trace


@register
class XGradCam(WeightedCam):
    name = "xgrad_cam"
    paper = "https://arxiv.org/abs/2008.02312"
    description = (
        "Feature maps of the target layer, weighted by the mean of their gradient, where the activation is strong most."
    )
    cost = "one forward pass, one backward pass through what follows the target layer"
    Params = GradientCamParams

    def weighted(self, trace: Trace, params: WeightedCamParams) -> Tensor:
        """w_k = sum(g A) / S_k, 0 where S_k is 0."""
        assert isinstance(params, GradientCamParams)
        activation, gradient = trace.activation, modified(trace.gradient, params.grad_modifier)
        weights = quotient((gradient * activation).sum(dim=(2, 3)), activation.sum(dim=(2, 3)))
        return channels_weighted(activation, weights)

    def term_error(self, trace: Trace, params: WeightedCamParams) -> Tensor:
        """The sum of |A_k| d_k, d_k = (sum |g A| + |w_k| sum |A|) / |S_k|: what the two sums of w_k round."""
        assert isinstance(params, GradientCamParams)
        activation, gradient = trace.activation, modified(trace.gradient, params.grad_modifier)
        total, magnitude = activation.sum(dim=(2, 3)), activation.abs().sum(dim=(2, 3))
        weights = quotient((gradient * activation).sum(dim=(2, 3)), total)
        rounded = (gradient * activation).abs().sum(dim=(2, 3)) + weights.abs() * magnitude
        return channels_weighted(activation.abs(), quotient(rounded, total.abs())).sum(dim=1)
