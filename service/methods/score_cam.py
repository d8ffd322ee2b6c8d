"""Score-CAM (Wang et al. 2020)."""

from __future__ import annotations

from torch import Tensor

from service.explain.mathematics import masking_scores, weighted_by_scores
from service.explain.method import CamParams, GenParams, Method, register
from service.explain.trace import Trace


@register
class ScoreCam(Method):
    name = "score_cam"
    family = "cam"
    paper = "https://arxiv.org/abs/1910.01279"
    description = "Feature maps of the target layer, each weighted by the confidence left when it masks the picture."
    cost = "one forward pass for each channel of the target layer that is not constant"
    Params = CamParams
    alone = True

    def heatmap(self, trace: Trace, params: GenParams) -> Tensor:
        return weighted_by_scores(trace, masking_scores(trace, trace.activation))
