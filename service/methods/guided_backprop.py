"""Guided backpropagation (Springenberg et al. 2015)."""

from __future__ import annotations

from torch import Tensor

from service.explain.method import GenParams, Method, register
from service.explain.trace import Trace
from service.models.program import Rule


@register
class GuidedBackprop(Method):
    name = "guided_backprop"
    family = "pixel"
    channels = 3
    paper = "https://arxiv.org/abs/1412.6806"
    description = (
        "The gradient of the class score at the picture, signed, where a ReLU passes positive gradients of positive "
        "inputs alone; other activation functions pass positive gradients times their own derivative."
    )
    cost = "one forward pass, one backward pass"
    Params = GenParams

    def rule(self, params: GenParams) -> Rule | None:
        return "guided"

    def heatmap(self, trace: Trace, params: GenParams) -> Tensor:
        """dy/dx under the rule relu(g) 1[x>0] of the paper's section 3.4, (N,H,W,3)."""
        return trace.image_gradient_under("guided").movedim(1, -1)
