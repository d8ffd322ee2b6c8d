"""SmoothGrad (Smilkov et al. 2017)."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from service.explain.mathematics import noisy
from service.explain.method import COSTLESS, GenParams, Method, Seed, register
from service.explain.trace import Trace


class SmoothGradParams(GenParams):
    n: int = Field(50, ge=1, le=1000, description="how many noisy variants of the picture are averaged")
    sigma: float = Field(
        0.15,
        ge=0,
        le=1,
        description="the noise's standard deviation, as a fraction of the range (maximum minus minimum) of the "
        "normalised picture",
        json_schema_extra=COSTLESS,
    )
    seed: Seed = Field(0, description="the noise depends on it alone")


@register
class SmoothGrad(Method):
    name = "smooth_grad"
    family = "pixel"
    channels = 3
    paper = "https://arxiv.org/abs/1706.03825"
    description = "The mean gradient of the class score, signed, over variants of the picture with normal noise added."
    cost = "n forward passes, n backward passes (n = 50 by default)"
    Params = SmoothGradParams
    alone = True

    def heatmap(self, trace: Trace, params: GenParams) -> Tensor:
        assert isinstance(params, SmoothGradParams)
        means = [_mean_gradient(trace, picture, params) for picture in range(len(trace.images))]
        return torch.stack(means).movedim(1, -1)


def _mean_gradient(trace: Trace, picture: int, params: SmoothGradParams) -> Tensor:
    """The paper's section 2 for one picture: the mean of dy/dx at x + noise, (3,H,W)."""
    image = trace.images[picture]

    def run(rows: slice) -> Tensor:
        return trace.at(noisy(image, params.sigma, params.seed, rows), picture).image_gradient.sum(dim=0)

    return torch.stack(trace.in_chunks(params.n, run)).sum(dim=0) / params.n
