"""Integrated Gradients (Sundararajan et al. 2017)."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from service.explain.mathematics import quotient
from service.explain.method import COSTLESS, GenParams, Method, register
from service.explain.trace import Trace

TRUNCATION = 4
"""Where the blur's kernel ends, in standard deviations."""


class IntegratedGradientsParams(GenParams):
    steps: int = Field(
        50, ge=1, le=1000, description="how many points of the path have their gradient taken (Gauss-Legendre)"
    )
    baseline: Literal["zero", "blur"] = Field(
        "zero",
        description="where the path begins: zero: at 0 in the normalised space, the mean color; blur: at the blurred "
        "picture",
    )
    blur_sigma: float = Field(
        10,
        ge=1,
        le=100,
        description="the standard deviation of the Gaussian blur, in pixels of the network's input; for baseline blur",
        json_schema_extra=COSTLESS,
    )


@register
class IntegratedGradients(Method):
    name = "integrated_gradients"
    family = "pixel"
    channels = 3
    paper = "https://arxiv.org/abs/1703.01365"
    description = (
        "The mean gradient of the class score on the straight path from a baseline to the picture, times their "
        "difference, signed; the values add up to the difference of the scores."
    )
    cost = "one forward and one backward pass per step (50 by default)"
    Params = IntegratedGradientsParams
    alone = True

    def heatmap(self, trace: Trace, params: GenParams) -> Tensor:
        assert isinstance(params, IntegratedGradientsParams)
        maps = [_integrated(trace, picture, params) for picture in range(len(trace.images))]
        return torch.stack(maps).movedim(1, -1)

    def completeness_error(self, trace: Trace, params: GenParams, values: Tensor) -> Tensor:
        """The paper's axiom: |sum of the map - (y(x) - y(baseline))| over the difference of the scores, (N,)."""
        assert isinstance(params, IntegratedGradientsParams)
        difference = trace.score - trace.at(torch.stack([_start(image, params) for image in trace.images])).score
        return quotient((values.flatten(1).sum(dim=1) - difference).abs(), difference.abs())


def _start(image: Tensor, params: IntegratedGradientsParams) -> Tensor:
    """Where the path to a picture (3,H,W) begins."""
    return blurred(image, params.blur_sigma) if params.baseline == "blur" else torch.zeros_like(image)


def _integrated(trace: Trace, picture: int, params: IntegratedGradientsParams) -> Tensor:
    """The paper's equation 1 for one picture, its integral by Gauss-Legendre quadrature, (3,H,W)."""
    image = trace.images[picture]
    start = _start(image, params)
    places, weights = np.polynomial.legendre.leggauss(params.steps)  # on -1 to 1, where the weights add up to 2
    points, shares = (
        torch.from_numpy(values)[:, None, None, None].to(image) for values in ((places + 1) / 2, weights / 2)
    )

    def run(rows: slice) -> Tensor:
        on_path = start + points[rows] * (image - start)
        return (shares[rows] * trace.at(on_path, picture).image_gradient).sum(dim=0)

    return (image - start) * torch.stack(trace.in_chunks(params.steps, run)).sum(dim=0)


def blurred(image: Tensor, sigma: float) -> Tensor:
    """A picture (3,H,W) under a Gaussian blur of so many pixels; beyond its edges it goes on as at them."""
    radius = int(TRUNCATION * sigma + 0.5)
    bell = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, device=image.device) / sigma) ** 2)
    kernel = (bell / bell.sum())[None, None, None]
    rows = F.conv2d(F.pad(image[:, None], (radius, radius, 0, 0), mode="replicate"), kernel)
    return F.conv2d(F.pad(rows, (0, 0, radius, radius), mode="replicate"), kernel.mT)[:, 0]
