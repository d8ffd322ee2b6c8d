"""Input times gradient (Shrikumar et al. 2016)."""

from __future__ import annotations

from torch import Tensor

from service.explain.method import GenParams, Method, register
from service.explain.trace import Trace


@register
class InputXGradient(Method):
    name = "input_x_gradient"
    family = "pixel"
    channels = 3
    paper = "https://arxiv.org/abs/1605.01713"
    description = "The normalised picture times the gradient of the class score at it, signed."
    cost = "one forward pass, one backward pass"
    Params = GenParams

    def heatmap(self, trace: Trace, params: GenParams) -> Tensor:
        """x dy/dx, (N,H,W,3)."""
        return (trace.images * trace.image_gradient).movedim(1, -1)
