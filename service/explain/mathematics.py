"""Mathematics that methods share."""

from __future__ import annotations

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

    Rows are the places and columns, which are centred, the channels (Muhammad and Yeasin 2020). The smaller of both
    Gram matrices is decomposed, in float64.
    """
    rows = values.flatten(2).mT.double()
    rows = rows - rows.mean(dim=1, keepdim=True)
    places, channels = rows.shape[1:]
    if places <= channels:
        spectrum, vectors = torch.linalg.eigh(rows @ rows.mT)
        projected = vectors[:, :, -1] * spectrum[:, -1:].clamp(min=0).sqrt()
    else:
        _, vectors = torch.linalg.eigh(rows.mT @ rows)
        projected = (rows @ vectors[:, :, -1:])[:, :, 0]
    sign = torch.where((projected * like.flatten(1)).sum(dim=1, keepdim=True) < 0, -1, 1)
    component: Tensor = projected * sign
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
