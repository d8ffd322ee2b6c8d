"""IS-CAM (Naidu et al. 2020): Score-CAM, its masks integrated from the zero image."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from service.explain.mathematics import masking_scores, weighted_by_scores
from service.explain.method import CamParams, GenParams, Method, register
from service.explain.trace import Trace


class IsCamParams(CamParams):
    n: int = Field(10, ge=1, le=100, description="steps from the zero image to the masked picture; 1 is score_cam")


@register
class IsCam(Method):
    name = "is_cam"
    family = "cam"
    paper = "https://arxiv.org/abs/2010.03023"
    description = "Score-CAM, whose scores are means over masks that grow from nothing to full strength."
    cost = "n forward passes for each channel of the target layer that is not constant"
    Params = IsCamParams
    alone = True

    def heatmap(self, trace: Trace, params: GenParams) -> Tensor:
        assert isinstance(params, IsCamParams)
        scores = [self._scores(trace, step / params.n) for step in range(1, params.n + 1)]
        return weighted_by_scores(trace, torch.stack(scores).mean(dim=0))

    def _scores(self, trace: Trace, strength: float) -> Tensor:
        return masking_scores(trace, trace.activation, lambda image, masks: image * (strength * masks))
