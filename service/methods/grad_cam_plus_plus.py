"""Grad-CAM++ (Chattopadhay et al. 2018)."""

from __future__ import annotations

from torch import Tensor

from service.explain.mathematics import channels_weighted, quotient
from service.explain.method import WeightedCam, WeightedCamParams, register
from service.explain.trace import Trace


@register
class GradCamPlusPlus(WeightedCam):
    name = "grad_cam_plus_plus"
    paper = "https://arxiv.org/abs/1710.11063"
    description = (
        "Grad-CAM whose positive gradients are weighed place by place, which finds several objects of a class."
    )
    cost = "one forward pass, one backward pass through what follows the target layer"

    def weighted(self, trace: Trace, params: WeightedCamParams) -> Tensor:
        """w_k = sum relu(g) / (2 + S_k g): eq. 19 of the paper for y = exp(score), whose powers of exp cancel."""
        activation, gradient = trace.activation, trace.gradient
        total = activation.sum(dim=(2, 3), keepdim=True)
        weights = quotient(gradient.clamp(min=0), 2 + total * gradient).sum(dim=(2, 3))
        return channels_weighted(activation, weights)

    def term_error(self, trace: Trace, params: WeightedCamParams) -> Tensor:
        """The sum of |A_k| d_k, d_k = sum relu(g) (2 + |g| sum |A|) / (2 + S_k g)^2: what the denominators round."""
        activation, gradient = trace.activation, trace.gradient
        denominator = 2 + activation.sum(dim=(2, 3), keepdim=True) * gradient
        rounded = 2 + activation.abs().sum(dim=(2, 3), keepdim=True) * gradient.abs()
        errors = quotient(gradient.clamp(min=0) * rounded, denominator.square()).sum(dim=(2, 3))
        return channels_weighted(activation.abs(), errors).sum(dim=1)
