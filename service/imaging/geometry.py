"""Where the network's input lies in the picture, and the picture resized to it; maps are laid back by render."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

FitMode = Literal["crop", "stretch", "letterbox"]
Interpolation = Literal["bilinear", "bicubic"]

_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
# Pillow holds some 32 bytes of weights for each pixel of a side that it shrinks; no camera's picture has such a side.
_LONG_SIDE = 2**16


@dataclass(frozen=True)
class Fit:
    """How a picture becomes the network's input; the fields are those of `[input]` in model.toml.

    `size` is (height, width), neither above `resize` where `fit` is crop; `mean` (0..1) colours letterbox's bars.
    """

    size: tuple[int, int]
    fit: FitMode
    resize: int
    interpolation: Interpolation
    mean: tuple[float, float, float]


@dataclass(frozen=True)
class Geometry:
    """Where the network's input lies in the upright picture of `width` x `height` pixels.

    `box` is (left, top, right, bottom) in the picture's pixels, pixel 0 from 0 to 1; a letterbox reaches
    beyond the picture. `size` is (height, width) of the network's input.
    """

    width: int
    height: int
    box: tuple[float, float, float, float]
    size: tuple[int, int]


def place(width: int, height: int, fit: Fit) -> Geometry:
    """The place of the network's input in an upright picture of `width` x `height` pixels."""
    rows, columns = fit.size
    box = (0.0, 0.0, float(width), float(height))
    if fit.fit == "crop":
        box = _crop_box(width, height, fit)
    elif fit.fit == "letterbox":
        x, y, inner_width, inner_height = _inner(width, height, fit.size)
        across, down = width / inner_width, height / inner_height
        box = (-x * across, -y * down, (columns - x) * across, (rows - y) * down)
    return Geometry(width, height, box, fit.size)


def fit_picture(image: Image.Image, fit: Fit) -> NDArray[np.uint8]:
    """An upright RGB image as the network sees it before `mean` and `std`: uint8 (height, width, 3).

    The definition is PIL's antialiased resize; crop is torchvision's Resize and CenterCrop, without the
    whole resized picture ever in memory.
    """
    rows, columns = fit.size
    if fit.fit == "crop":
        return np.array(_crop(image, fit))
    if fit.fit == "stretch":
        return np.array(_resize_whole(image, columns, rows, fit))
    x, y, inner_width, inner_height = _inner(image.width, image.height, fit.size)
    red, green, blue = (min(255, max(0, round(255 * value))) for value in fit.mean)
    canvas = Image.new("RGB", (columns, rows), (red, green, blue))
    canvas.paste(_resize_whole(image, inner_width, inner_height, fit), (x, y))
    return np.array(canvas)


def _crop_box(width: int, height: int, fit: Fit) -> tuple[float, float, float, float]:
    """torchvision's Resize(resize) and CenterCrop(size), in the picture's pixels."""
    short = min(width, height)
    # The shorter side becomes exactly `resize`, the longer one is rounded down, as torchvision does.
    resized_width, resized_height = int(fit.resize * width / short), int(fit.resize * height / short)
    rows, columns = fit.size
    left, top = round((resized_width - columns) / 2.0), round((resized_height - rows) / 2.0)
    return (
        left * width / resized_width,
        top * height / resized_height,
        (left + columns) * width / resized_width,
        (top + rows) * height / resized_height,
    )


def _inner(width: int, height: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """(x, y, width, height) of the picture inside a letterbox of `size` (height, width)."""
    rows, columns = size
    scale = min(columns / width, rows / height)
    inner_width, inner_height = max(1, round(width * scale)), max(1, round(height * scale))
    return (columns - inner_width) // 2, (rows - inner_height) // 2, inner_width, inner_height


def _resize_whole(image: Image.Image, width: int, height: int, fit: Fit) -> Image.Image:
    gap = 3.0 if max(image.size) > _LONG_SIDE else None
    return image.resize((width, height), _RESAMPLING[fit.interpolation], reducing_gap=gap)


def _crop(image: Image.Image, fit: Fit) -> Image.Image:
    """The crop in two passes, horizontal first as in a resize of the whole; with a box Pillow may turn them round."""
    rows, columns = fit.size
    resampling = _RESAMPLING[fit.interpolation]
    left, top, right, bottom = _crop_box(image.width, image.height, fit)
    x, end_x = _reach(left, right, columns, image.width)
    y, end_y = _reach(top, bottom, rows, image.height)
    # Pillow holds a box in 32-bit floats, too coarse far out in a very long picture.
    part = image.crop((x, y, end_x, end_y))
    strip = part.resize((columns, part.height), resampling, (left - x, 0, right - x, part.height))
    return strip.resize((columns, rows), resampling, (0, top - y, columns, bottom - y))


def _reach(start: float, stop: float, pixels: int, side: int) -> tuple[int, int]:
    """The pixels of a side that resizing `start`..`stop` to `pixels` reads: bicubic two more of the coarser grid."""
    margin = 1 + 2 * max(1.0, (stop - start) / pixels)
    return max(0, math.floor(start - margin)), min(side, math.ceil(stop + margin))
