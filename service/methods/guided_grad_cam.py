"""Guided Grad-CAM (Selvaraju et al. 2017, HALCON's `guided_grad_cam`)."""

from __future__ import annotations

from torch import Tensor

from service.explain.mathematics import grad_cam, upsample
from service.explain.method import GenParams, LayerParams, Method, register
from service.explain.trace import Trace
from service.models.program import Rule


@register
class GuidedGradCam(Method):
    name = "guided_grad_cam"
    family = "pixel"
    channels = 3
    paper = "https://arxiv.org/abs/1610.02391"
    description = "The positive part of Grad-CAM times the guided-backpropagation gradient at the picture, signed."
    cost = "two forward passes, one full backward pass, one through what follows the target layer"
    Params = LayerParams

    def rule(self, params: GenParams) -> Rule | None:
        return "guided"

    def heatmap(self, trace: Trace, params: GenParams) -> Tensor:
        coarse = upsample(grad_cam(trace).clamp(min=0), like=trace.images)
        return (coarse[:, None] * trace.image_gradient_under("guided")).movedim(1, -1)
