"""Grad-CAM (Selvaraju et al. 2017, HALCON's `grad_cam`)."""

from __future__ import annotations

from torch import Tensor

from service.explain import CamParams, LayerParams, Method, Trace, grad_cam, register


@register
class GradCam(Method):
    name = "grad_cam"
    family = "cam"
    channels = 1
    paper = "https://arxiv.org/abs/1610.02391"
    description = "Feature maps of the target layer, weighted by the mean gradient of the class score over each."
    cost = "one forward pass, one backward pass through what follows the target layer"
    Params = CamParams

    def heatmap(self, trace: Trace, params: LayerParams) -> Tensor:
        return grad_cam(trace)
