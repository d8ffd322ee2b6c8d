"""Grad-CAM (Selvaraju et al. 2017, HALCON's `grad_cam`)."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from service.explain.mathematics import BackpropModifier, channels_weighted, modified, rule_of
from service.explain.method import GenParams, GradientCamParams, WeightedCam, WeightedCamParams, register
from service.explain.trace import Trace
from service.models.program import Rule


class GradCamParams(GradientCamParams):
    backprop_modifier: BackpropModifier | None = Field(
        None, description="how activation functions pass gradients; rectified is deconv (keras-vis: backprop_modifier)"
    )


@register
class GradCam(WeightedCam):
    name = "grad_cam"
    paper = "https://arxiv.org/abs/1610.02391"
    description = "Feature maps of the target layer, weighted by the mean gradient of the class score over each."
    cost = "one forward pass, one backward pass through what follows the target layer"
    Params = GradCamParams

    def rule(self, params: GenParams) -> Rule | None:
        assert isinstance(params, GradCamParams)
        return rule_of(params.backprop_modifier)

    def weighted(self, trace: Trace, params: WeightedCamParams) -> Tensor:
        assert isinstance(params, GradCamParams)
        gradient = trace.gradient_under(self.rule(params))
        return channels_weighted(trace.activation, modified(gradient, params.grad_modifier).mean(dim=(2, 3)))
