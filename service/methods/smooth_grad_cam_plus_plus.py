"""Smooth Grad-CAM++ (Omeiza et al. 2019)."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from service.explain.mathematics import channels_weighted, noisy, quotient
from service.explain.method import COSTLESS, Seed, WeightedCam, WeightedCamParams, register
from service.explain.trace import Trace


class SmoothGradCamPlusPlusParams(WeightedCamParams):
    n: int = Field(50, ge=1, le=1000, description="how many noisy pictures the gradients are averaged over")
    sigma: float = Field(
        0.15,
        ge=0,
        le=1,
        description="standard deviation of the noise, as a share of the range (largest minus smallest value) of each "
        "picture's normalised input",
        json_schema_extra=COSTLESS,
    )
    seed: Seed = Field(0, description="of the noise, which is the same for each picture")


@register
class SmoothGradCamPlusPlus(WeightedCam):
    name = "smooth_grad_cam_plus_plus"
    paper = "https://arxiv.org/abs/1908.01224"
    description = "Grad-CAM++ with the powers of the gradient averaged over noisy copies of the picture."
    cost = "n forward passes, n backward passes through what follows the target layer"
    Params = SmoothGradCamPlusPlusParams
    alone = True

    def weighted(self, trace: Trace, params: WeightedCamParams) -> Tensor:
        """w_k = sum alpha relu(D1), alpha = D2 / (2 D2 + S_k D3); D1 to D3 are mean powers of g, S_k is the clean sum.

        In float64: the cube of a gradient of 1e-15 is no float32.
        """
        assert isinstance(params, SmoothGradCamPlusPlusParams)
        first, second, third = torch.stack([_moments(trace, n, params) for n in range(len(trace.images))], dim=1)
        total = trace.activation.sum(dim=(2, 3), keepdim=True)
        alpha = quotient(second, 2 * second + total * third)
        weights = (alpha * first.clamp(min=0)).sum(dim=(2, 3)).to(total.dtype)
        return channels_weighted(trace.activation, weights)


def _moments(trace: Trace, picture: int, params: SmoothGradCamPlusPlusParams) -> Tensor:
    """The means of g, its square and its cube over the noisy copies of one picture, (3,C,h,w), float64."""
    image = trace.images[picture]

    def run(rows: slice) -> Tensor:
        gradient = trace.at(noisy(image, params.sigma, params.seed, rows), picture).gradient.double()
        return torch.stack([(gradient**power).sum(dim=0) for power in (1, 2, 3)])

    return torch.stack(trace.in_chunks(params.n, run)).sum(dim=0) / params.n
