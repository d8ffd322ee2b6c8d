"""SS-CAM (Wang et al. 2020): Score-CAM, smoothed over noise."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from service.explain.mathematics import masking_scores, noise, weighted_by_scores
from service.explain.method import COSTLESS, CamParams, GenParams, Method, Seed, register
from service.explain.trace import Trace


class SsCamParams(CamParams):
    n: int = Field(35, ge=1, le=200, description="how many noises a score is averaged over")
    sigma: float = Field(
        2.0,
        ge=0,
        le=1000,
        description="standard deviation of the noise, in the units of what it is added to: of the target layer's "
        "activation, or of the network's normalised input",
        json_schema_extra=COSTLESS,
    )
    noise_on: Literal["activation", "input"] = Field(
        "activation",
        description="where the noise is added: to the feature maps before masks are made of them, or to the picture "
        "after it was masked",
    )
    seed: Seed = Field(0, description="of the noise")


@register
class SsCam(Method):
    name = "ss_cam"
    family = "cam"
    paper = "https://arxiv.org/abs/2006.14255"
    description = "Score-CAM, whose scores are means over noise on the feature maps or on the masked picture."
    cost = "n forward passes for each channel of the target layer"
    Params = SsCamParams
    alone = True

    def heatmap(self, trace: Trace, params: GenParams) -> Tensor:
        assert isinstance(params, SsCamParams)
        scores = [self._scores(trace, params, number) for number in range(params.n)]
        return weighted_by_scores(trace, torch.stack(scores).mean(dim=0))

    def _scores(self, trace: Trace, params: SsCamParams, number: int) -> Tensor:
        """The scores (N,C) under one noise, the same for every picture, and for every channel if it is on the input."""
        activation = trace.activation
        if params.noise_on == "activation":
            return masking_scores(trace, activation + params.sigma * noise(activation[0], params.seed, number))
        added = params.sigma * noise(trace.images[0], params.seed, number)
        return masking_scores(trace, activation, lambda image, masks: image * masks + added)
