"""Eigen-Grad-CAM: Eigen-CAM (Muhammad and Yeasin 2020) of activations times their gradients."""

from __future__ import annotations

from torch import Tensor

from service.explain.mathematics import grad_cam, principal_component
from service.explain.method import CamParams, GenParams, Method, register
from service.explain.trace import Trace


@register
class EigenGradCam(Method):
    name = "eigen_grad_cam"
    family = "cam"
    paper = "https://arxiv.org/abs/2008.00299"
    description = (
        "The first principal component of the target layer's activation times the gradient of the class score."
    )
    cost = "one forward pass, one backward pass through what follows the target layer, a small eigenvalue problem"
    Params = CamParams

    def heatmap(self, trace: Trace, params: GenParams) -> Tensor:
        """Its sign, which the decomposition leaves open, is that of the Grad-CAM map."""
        return principal_component(trace.gradient * trace.activation, like=grad_cam(trace))
