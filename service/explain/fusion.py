"""A method's map over one layer or several, and over augmented pictures."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from service.explain.mathematics import upsample
from service.explain.method import CamParams, GenParams, Method
from service.explain.trace import Backward, Trace
from service.models.layers import Target

BRIGHTNESS = (0.9, 1.0, 1.1)


def heatmap_of(method: Method, backward: Backward, targets: Sequence[Target], params: GenParams) -> Tensor:
    """The method's raw map; of several layers their mean at the network's input, each by its own maximum first."""
    maps = [_smoothed(method, backward.trace(target), params) for target in targets or (None,)]
    return maps[0] if len(maps) == 1 else fused(maps, backward.of.images)


def fused(maps: Sequence[Tensor], images: Tensor) -> Tensor:
    """The mean of maps (N,h,w) of any resolution, or (N,H,W,3), at that of images (N,3,H,W).

    Each is divided by its maximum, the largest absolute value if it has three channels; without one it counts as 0.
    """
    return torch.stack([_by_its_maximum(one, images) for one in maps]).mean(dim=0)


def _by_its_maximum(raw: Tensor, images: Tensor) -> Tensor:
    fine = upsample(raw, like=images) if raw.ndim == 3 else raw
    largest = (fine if raw.ndim == 3 else fine.abs()).flatten(1).amax(dim=1)
    largest = largest.reshape(-1, *[1] * (fine.ndim - 1))
    return torch.where(largest > 0, fine / largest, 0)


def _smoothed(method: Method, trace: Trace, params: GenParams) -> Tensor:
    """The method's map, averaged over variants of the picture where `aug_smooth` says so."""
    if not (isinstance(params, CamParams) and params.aug_smooth):
        return method.heatmap(trace, params)
    maps = []
    for factor in BRIGHTNESS:
        bright = trace.images * factor
        maps.append(method.heatmap(trace.at(bright), params))
        maps.append(method.heatmap(trace.at(bright.flip(3)), params).flip(2))
    return torch.stack(maps).mean(dim=0)
