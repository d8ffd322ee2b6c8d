"""RISE (Petsiuk, Das and Saenko 2018)."""

from __future__ import annotations

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from service.explain.method import COSTLESS, GenParams, Method, ScaledParams, Seed, register
from service.explain.trace import Trace


class RiseParams(ScaledParams):
    n: int = Field(4000, ge=1, le=20_000, description="how many random masks the picture is seen through")
    grid: int = Field(7, ge=1, le=64, description="cells of a mask along each side of the picture")
    p: float = Field(
        0.5, gt=0, le=1, description="the probability that a cell is shown, 0 to 1", json_schema_extra=COSTLESS
    )
    seed: Seed = Field(0, description="which random masks")


@register
class Rise(Method):
    name = "rise"
    family = "perturbation"
    paper = "https://arxiv.org/abs/1806.07421"
    description = "Random masks over the picture, averaged with the class confidence that each leaves as its weight."
    cost = "one forward pass per mask: 4000 with the defaults"
    Params = RiseParams
    alone = True

    def heatmap(self, trace: Trace, params: GenParams) -> Tensor:
        """sum f(x M) M / (N p), f the class confidence (eq. 6 of the paper)."""
        assert isinstance(params, RiseParams)
        return torch.stack([_of(trace, picture, params) for picture in range(len(trace.images))])


def _of(trace: Trace, picture: int, params: RiseParams) -> Tensor:
    """The map of one picture, (H,W)."""
    image = trace.images[picture]

    def run(numbers: slice) -> Tensor:
        shown = masks(numbers, params, image)
        confidence = trace.at(image * shown[:, None], picture).confidence
        return torch.einsum("m,mhw->hw", confidence, shown)

    return torch.stack(trace.in_chunks(params.n, run)).sum(dim=0) / (params.n * params.p)


def masks(numbers: slice, params: RiseParams, like: Tensor) -> Tensor:
    """The masks of these numbers for a picture (3,H,W), 0 to 1, (M,H,W).

    Each is a random grid, upsampled to one cell more than the picture has, of which a random part is taken (section
    3.2 of the paper). A mask depends on the seed and its number alone.
    """
    sides = like.shape[1:]
    cells = [-(-side // params.grid) for side in sides]
    rngs = [np.random.default_rng((params.seed, number)) for number in range(numbers.start, numbers.stop)]
    grids = np.stack([rng.random((params.grid, params.grid)) < params.p for rng in rngs])
    shifts = [[int(rng.integers(cell, endpoint=True)) for cell in cells] for rng in rngs]
    coarse = torch.from_numpy(grids).to(like.device, like.dtype)
    size = [(params.grid + 1) * cell for cell in cells]
    fine = F.interpolate(coarse[:, None], size, mode="bilinear", align_corners=False)[:, 0]
    height, width = sides
    parts = zip(fine, shifts, strict=True)
    return torch.stack([one[top : top + height, left : left + width] for one, (top, left) in parts])
