"""Occlusion (Zeiler and Fergus 2014)."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from service.explain.method import GenParams, Method, ScaledParams, register
from service.explain.trace import Trace


class OcclusionParams(ScaledParams):
    window: int = Field(15, ge=1, le=1024, description="side of the occluding square in pixels of the network's input")
    stride: int = Field(8, ge=1, le=1024, description="step between two windows in pixels, at most the window's side")


@register
class Occlusion(Method):
    name = "occlusion"
    family = "perturbation"
    paper = "https://arxiv.org/abs/1311.2901"
    description = "How much the class score falls where a window of the mean colour hides the picture."
    cost = "one forward pass per window: 784 for a network of 224 x 224 with the defaults"
    Params = OcclusionParams
    alone = True

    def heatmap(self, trace: Trace, params: GenParams) -> Tensor:
        """At each pixel the mean of y(x) - y(occluded) over the windows that cover it (section 4.2 of the paper)."""
        assert isinstance(params, OcclusionParams)
        rows, columns = (inside(side, params.window, params.stride, trace.images) for side in trace.images.shape[2:])
        coverage = torch.outer(rows.sum(dim=0), columns.sum(dim=0))
        falls = torch.stack([_falls(trace, picture, rows, columns) for picture in range(len(trace.images))])
        return rows.T @ falls @ columns / coverage


def inside(side: int, window: int, stride: int, like: Tensor) -> Tensor:
    """Which of a side's pixels each window covers, 0 or 1, (windows,side).

    The last window is moved in, a window larger than the picture is clipped to it, and no pixel is left out.
    """
    window = min(window, side)
    last = side - window
    starts = torch.tensor([*range(0, last, min(stride, window)), last], device=like.device)[:, None]
    pixels = torch.arange(side, device=like.device)
    return ((starts <= pixels) & (pixels < starts + window)).to(like.dtype)


def _falls(trace: Trace, picture: int, rows: Tensor, columns: Tensor) -> Tensor:
    """y(x) - y(occluded) for each window, (len(rows),len(columns))."""
    image = trace.images[picture]
    # The whole picture goes the way of the occluded ones: what that way rounds is not taken for a fall.
    whole = trace.at(image[None], picture).score

    def run(windows: slice) -> Tensor:
        numbers = torch.arange(windows.start, windows.stop, device=image.device)
        down, across = rows[numbers // len(columns)], columns[numbers % len(columns)]
        shown = 1 - down[:, None, :, None] * across[:, None, None, :]
        return whole - trace.at(image * shown, picture).score

    return torch.cat(trace.in_chunks(len(rows) * len(columns), run)).reshape(len(rows), len(columns))
