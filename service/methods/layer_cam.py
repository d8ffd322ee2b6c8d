"""Layer-CAM (Jiang et al. 2021)."""

from __future__ import annotations

from torch import Tensor

from service.explain.mathematics import modified
from service.explain.method import GradientCamParams, WeightedCam, WeightedCamParams, register
from service.explain.trace import Trace


@register
class LayerCam(WeightedCam):
    name = "layer_cam"
    paper = "https://doi.org/10.1109/TIP.2021.3089943"
    description = (
        "Each value of the target layer times its own gradient where that is positive; good at shallow layers."
    )
    cost = "one forward pass, one backward pass through what follows the target layer"
    Params = GradientCamParams

    def weighted(self, trace: Trace, params: WeightedCamParams) -> Tensor:
        assert isinstance(params, GradientCamParams)
        return modified(trace.gradient, params.grad_modifier).clamp(min=0) * trace.activation
