"""Saliency (Simonyan et al. 2013)."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from service.explain.mathematics import BackpropModifier, GradModifier, modified, rule_of
from service.explain.method import GenParams, Method, ScaledParams, register
from service.explain.trace import Trace
from service.models.program import Rule


class SaliencyParams(ScaledParams):
    grad_modifier: GradModifier | None = Field(
        "absolute",
        description="what is done to the gradient before its maximum over the channels is taken "
        "(keras-vis: grad_modifier)",
    )
    backprop_modifier: BackpropModifier | None = Field(
        None, description="how activation functions pass gradients; rectified is deconv (keras-vis: backprop_modifier)"
    )


@register
class Saliency(Method):
    name = "saliency"
    family = "pixel"
    paper = "https://arxiv.org/abs/1312.6034"
    description = "The largest absolute gradient of the class score over the color channels of each pixel."
    cost = "one forward pass, one backward pass"
    Params = SaliencyParams

    def rule(self, params: GenParams) -> Rule | None:
        assert isinstance(params, SaliencyParams)
        return rule_of(params.backprop_modifier)

    def heatmap(self, trace: Trace, params: GenParams) -> Tensor:
        """The paper's section 3.1: max_c |dy/dx_c|, (N,H,W)."""
        assert isinstance(params, SaliencyParams)
        gradient = trace.image_gradient_under(self.rule(params))
        return modified(gradient, params.grad_modifier).amax(dim=1)
