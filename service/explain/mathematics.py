"""Mathematics that methods share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from service.explain.trace import Trace
from service.models.program import Rule

GradModifier = Literal["absolute", "negate", "relu", "invert", "small_values"]
BackpropModifier = Literal["guided", "deconv", "rectified"]


def grad_cam(trace: Trace) -> Tensor:
    """Grad-CAM before its ReLU (Selvaraju et al. 2017, eq. 1 and 2): sum_k mean(g_k) A_k, (N,h,w)."""
    return channels_weighted(trace.activation, trace.gradient.mean(dim=(2, 3))).sum(dim=1)


def channels_weighted(activation: Tensor, weights: Tensor) -> Tensor:
    """Activations (N,C,h,w), each channel times its weight (N,C)."""
    return activation * weights[:, :, None, None]


def summed(weighted: Tensor) -> Tensor:
    """The sum (N,h,w) over the channels of (N,C,h,w), 0 where it is but the rounding of summands that cancel.

    They do behind a layer norm, whose channels add up to 0, and so do g A before one.
    """
    total, rounding = weighted.sum(dim=1), torch.finfo(weighted.dtype).eps * weighted.abs().sum(dim=1)
    return torch.where(total.abs() <= rounding, 0, total)


def upsample(maps: Tensor, like: Tensor) -> Tensor:
    """One-channel maps (N,h,w) at the resolution of images (N,C,H,W): bilinear, corners not aligned."""
    fine: Tensor = F.interpolate(maps[:, None], size=like.shape[-2:], mode="bilinear", align_corners=False)
    return fine.squeeze(1)


def quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient, 0 where the denominator is 0; no epsilon, which could be larger than a gradient."""
    zero = denominator == 0
    return torch.where(zero, 0, numerator / torch.where(zero, 1, denominator))


def minmax(maps: Tensor) -> Tensor:
    """Each map (N,h,w) from its minimum at 0 to its maximum at 1; 0 where it is constant."""
    lowest, highest = maps.amin(dim=(1, 2), keepdim=True), maps.amax(dim=(1, 2), keepdim=True)
    return quotient(maps - lowest, highest - lowest)


def principal_component(values: Tensor, like: Tensor) -> Tensor:
    """Values (N,C,h,w) projected on their first principal component, (N,h,w), with the sign that fits `like` (N,h,w).

    Where that is 0, the largest value is positive. Rows are the places and columns, which are centred, the channels
    (Muhammad and Yeasin 2020). The smaller of both Gram matrices is decomposed, in float64. NaN where a picture's
    values are not finite.
    """
    finite = values.isfinite().flatten(1).all(dim=1)[:, None, None]
    rows = torch.where(finite, values.flatten(2).mT.double(), 0)  # the decomposition would raise for the whole batch
    rows = rows - rows.mean(dim=1, keepdim=True)
    places, channels = rows.shape[1:]
    if places <= channels:
        spectrum, vectors = torch.linalg.eigh(rows @ rows.mT)
        projected = vectors[:, :, -1] * spectrum[:, -1:].clamp(min=0).sqrt()
    else:
        _, vectors = torch.linalg.eigh(rows.mT @ rows)
        projected = (rows @ vectors[:, :, -1:])[:, :, 0]
    fits = (projected * like.flatten(1)).sum(dim=1, keepdim=True)
    largest = projected.gather(1, projected.abs().argmax(dim=1, keepdim=True))
    sign = torch.where(torch.where(fits == 0, largest, fits) < 0, -1, 1)
    component: Tensor = torch.where(finite[:, 0], projected * sign, torch.nan)
    return component.reshape(like.shape).to(values.dtype)


def modified(gradient: Tensor, modifier: GradModifier | None) -> Tensor:
    """A gradient under one of keras-vis' `grad_modifier`s; None leaves it as it is."""
    match modifier:
        case "absolute":
            return gradient.abs()
        case "negate":
            return -gradient
        case "relu":
            return gradient.clamp(min=0)
        case "invert":
            return quotient(torch.ones_like(gradient), gradient)
        case "small_values":
            return quotient(torch.ones_like(gradient), gradient).abs()
        case None:
            return gradient


def rule_of(modifier: BackpropModifier | None) -> Rule | None:
    """The rule behind one of keras-vis' `backprop_modifier`s, two of which are one."""
    return "deconv" if modifier == "rectified" else modifier


def noise(like: Tensor, seed: int, number: int = 0) -> Tensor:
    """Standard normal noise in the shape of one picture's value, the same on every device and for every picture.

    `number` counts those of one seed.
    """
    drawn = np.random.default_rng((seed, number)).standard_normal(like.shape, np.float32)
    return torch.from_numpy(drawn).to(like.device)


def noisy(image: Tensor, sigma: float, seed: int, rows: slice) -> Tensor:
    """A picture (3,H,W) under the noises of these numbers, (M,3,H,W); `sigma` is a share of its range."""
    drawn = torch.stack([noise(image, seed, number) for number in range(rows.start, rows.stop)])
    return image + sigma * (image.max() - image.min()) * drawn


def masking_scores(trace: Trace, maps: Tensor, masked: Callable[[Tensor, Tensor], Tensor] = torch.mul) -> Tensor:
    """The channel-wise increase of confidence of Score-CAM (Wang et al. 2020), (N,C): what each map keeps as a mask.

    Each of the feature maps (N,C,h,w) is upsampled and scaled to 0..1; its score is the confidence in the picture so
    masked, less that in the one of which a mask of zeros leaves nothing. `masked` makes images (M,3,H,W) of a picture
    (3,H,W) and masks (M,1,H,W).
    """
    pairs = zip(trace.images, maps, strict=True)
    return torch.stack([_masking_scores(trace, picture, *pair, masked) for picture, pair in enumerate(pairs)])


def _masking_scores(
    trace: Trace, picture: int, image: Tensor, maps: Tensor, masked: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """The scores of one picture, (C,)."""
    # The mask of a constant map is 0. It needs no pass, and upsampled its roundings would be stretched to a mask.
    varying = (maps.amin(dim=(1, 2)) < maps.amax(dim=(1, 2))).nonzero()[:, 0]

    def run(rows: slice) -> Tensor:
        masks = minmax(upsample(maps[varying[rows]], like=trace.images))
        return trace.at(masked(image, masks[:, None]), picture).confidence

    nothing = trace.at(masked(image, torch.zeros_like(image[None, :1])), picture).confidence
    scores = torch.zeros_like(maps[:, 0, 0])
    scores[varying] = torch.cat([nothing, *trace.in_chunks(len(varying), run)])[1:] - nothing
    return scores


def weighted_by_scores(trace: Trace, scores: Tensor) -> Tensor:
    """Score-CAM's map (Wang et al. 2020, algorithm 1), (N,h,w): sum_k w_k A_k, w the softmax of the scores (N,C)."""
    return channels_weighted(trace.activation, scores.softmax(dim=1)).sum(dim=1)
