"""Eigen-CAM (Muhammad and Yeasin 2020)."""

from __future__ import annotations

from torch import Tensor

from service.explain.mathematics import principal_component, summed
from service.explain.method import CamParams, GenParams, Method, register
from service.explain.trace import Trace


@register
class EigenCam(Method):
    name = "eigen_cam"
    family = "cam"
    paper = "https://arxiv.org/abs/2008.00299"
    description = "The first principal component of the target layer's activation: what it sees, whatever the class."
    cost = "one forward pass and a small eigenvalue problem"
    Params = CamParams

    def heatmap(self, trace: Trace, params: GenParams) -> Tensor:
        """Its sign, which the decomposition leaves open, is that of the activation's sum over channels."""
        return principal_component(trace.activation, like=summed(trace.activation))
