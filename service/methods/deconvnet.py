"""The gradient of a deconvolution network (Zeiler and Fergus 2014)."""

from __future__ import annotations

from torch import Tensor

from service.explain.method import GenParams, Method, register
from service.explain.trace import Trace
from service.models.program import Rule


@register
class Deconvnet(Method):
    name = "deconvnet"
    family = "pixel"
    channels = 3
    paper = "https://arxiv.org/abs/1311.2901"
    description = (
        "The gradient of the class score at the picture, signed, where a ReLU passes positive gradients whatever its "
        "input was; other activation functions pass positive gradients times their own derivative."
    )
    cost = "one forward pass, one backward pass"
    Params = GenParams

    def rule(self, params: GenParams) -> Rule | None:
        return "deconv"

    def heatmap(self, trace: Trace, params: GenParams) -> Tensor:
        """dy/dx under the rule relu(g) of the paper's section 2.1, (N,H,W,3)."""
        return trace.image_gradient_under("deconv").movedim(1, -1)
