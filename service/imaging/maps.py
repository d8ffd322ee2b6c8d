"""The arithmetic between a method's raw map and a picture of it: resampling, HALCON's scaling, what to display."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from service.imaging.geometry import Geometry

Size = Literal["original", "model"]
Scaling = Literal["scale_after_relu", "scale_before_relu", "none"]
Degeneracy = Literal["all_zero", "all_negative", "constant", "not_finite", "cancelled"]
CANCELLED = 0.1
Floats = NDArray[np.float32]


def resample(raw: Floats, geometry: Geometry, size: Size) -> tuple[Floats, tuple[slice, slice]]:
    """A raw map (h, w) or (h, w, 3) in one bilinear step on the answered pixels, and the (rows, columns) it covers.

    It samples as torch's `interpolate(mode="bilinear", align_corners=False)` does: the network's input in the size
    `model`, the picture through the geometry in `original`, 0 at pixels whose centre the network never saw. A value
    that is not finite makes the pixels it touches NaN and leaves the others alone.
    """
    down, across = _axes(geometry, size)
    (weights_down, rows), (weights_across, columns) = _axis(raw.shape[0], *down), _axis(raw.shape[1], *across)
    answer = np.zeros((down[0], across[0], *raw.shape[2:]), np.float32)
    finite = np.isfinite(raw)
    answer[rows, columns] = _product(weights_down, np.where(finite, raw, np.float32(0)), weights_across)
    if not finite.all():
        touched = _product(weights_down, (~finite).astype(np.float32), weights_across) > 0
        answer[rows, columns][touched] = np.nan
    return answer, (rows, columns)


def scale(values: Floats, scaling: Scaling) -> Floats:
    """HALCON's `scaling` of a one-channel map of finite values at the answered size, float32 of the same shape.

    `scale_after_relu`: negatives to 0, then by the maximum; `scale_before_relu`: by the maximum absolute value, then
    negatives to 0; `none`: as it is.
    """
    if scaling == "none":
        return values
    relu = np.maximum(values, np.float32(0))
    return _divide(relu, relu if scaling == "scale_after_relu" else np.abs(values))


def degeneracy(raw: Floats, rounding_error: float | None = None) -> Degeneracy | None:
    """Why a raw map (h, w) or (h, w, 3) shows nothing, or None; `all_negative` is of one-channel maps only.

    `cancelled`: the summands cancelled, so that the rounding error is above a tenth of the largest absolute value.
    """
    if not np.isfinite(raw).all():
        return "not_finite"
    lowest, highest = raw.min(), raw.max()
    if lowest == 0 and highest == 0:
        return "all_zero"
    if rounding_error is not None and not rounding_error <= CANCELLED * max(-lowest, highest):
        return "cancelled"
    if raw.ndim == 2 and highest <= 0:
        return "all_negative"
    return "constant" if lowest == highest else None


def displayed(values: Floats, scaling: Scaling | None) -> Floats:
    """What a picture shows of a finite map after `scaling`: float32 (H, W) in [0, 1].

    Clipped; divided by the maximum where `scaling` is `none`; of a three-channel map, which has no scaling, the
    largest absolute value of the channels over its maximum.
    """
    if values.ndim == 3:
        values = np.abs(values).max(axis=2)
    if scaling in (None, "none"):
        values = scale(values, "scale_after_relu")
    return np.clip(values, 0, 1)


def _divide(values: Floats, of: Floats) -> Floats:
    """`values`, in place, over the maximum of `of`, all 0 where that is 0; division, as 1/1e-42 is no float32."""
    maximum = of.max()
    return values if maximum == 0 else np.divide(values, maximum, out=values)


def _axes(geometry: Geometry, size: Size) -> tuple[tuple[int, float, float], tuple[int, float, float]]:
    """Vertically and horizontally: the number of answered pixels, and where among them the map begins and ends."""
    if size == "model":
        rows, columns = geometry.size
        return (rows, 0.0, float(rows)), (columns, 0.0, float(columns))
    left, top, right, bottom = geometry.box
    return (geometry.height, top, bottom), (geometry.width, left, right)


def _axis(cells: int, pixels: int, start: float, stop: float) -> tuple[Floats, slice]:
    """Weights (covered pixels, cells) with two numbers a row, and the covered pixels.

    At least one is covered: a crop of a very long picture can lie between two centres.
    """
    first = min(max(0, math.ceil(start - 0.5)), pixels - 1)
    last = max(first + 1, min(pixels, math.ceil(stop - 0.5)))
    centres = np.arange(first, last) + 0.5
    places = np.clip((centres - start) / (stop - start) * cells - 0.5, 0, cells - 1)
    lower = np.minimum(places.astype(np.intp), max(cells - 2, 0))
    shares = (places - lower).astype(np.float32)
    weights = np.zeros((len(centres), cells), np.float32)
    each = np.arange(len(centres))
    weights[each, np.minimum(lower + 1, cells - 1)] = shares
    weights[each, lower] = 1 - shares
    return weights, slice(first, last)


def _product(down: Floats, raw: Floats, across: Floats) -> Floats:
    """Dense products: on 4000 x 3000 pixels 16 ms for a 7 x 7 map, where gathering two neighbours takes 40 ms."""
    product: Floats = np.einsum("yh,hw...,xw->yx...", down, raw, across, optimize=True)
    return product
