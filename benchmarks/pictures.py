"""Pictures that nobody has seen before: crops of one photograph, each at a place, mirrored or not, and tinted."""

from __future__ import annotations

import io
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

PHOTO = Path(__file__).parent.parent / "tests" / "data" / "coffee.png"
ENLARGED = (660, 440)
SIZE = (500, 375)
"""Width and height of the JPEGs."""

Pixels = NDArray[np.uint8]


class Pictures:
    """Gives out pictures; none comes twice from one object, or from two with different `first` that lie apart."""

    def __init__(self, first: int = 0) -> None:
        self._next = first

    def jpegs(self, count: int) -> list[bytes]:
        """JPEGs of quality 90."""
        indices = range(self._next, self._next + count)
        self._next += count
        with ThreadPoolExecutor(os.cpu_count()) as executor:
            return list(executor.map(_jpeg, indices))

    def fitted(self, count: int, side: int) -> Pixels:
        """Pictures as the network sees them, uint8 (N,side,side,3)."""
        indices = range(self._next, self._next + count)
        self._next += count
        return np.stack([_picture(index, (side, side)) for index in indices])


def _jpeg(index: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(_picture(index, SIZE)).save(file, "JPEG", quality=90)
    return file.getvalue()


def _picture(index: int, size: tuple[int, int]) -> Pixels:
    """Crop number `index` of the photograph: some ten thousand places, and then the same again less bright."""
    photo = _photo()
    columns, rows = photo.shape[1] - size[0], photo.shape[0] - size[1]
    # Neighbours in number shall not be neighbours in the photograph: 7919 is a prime and divides no number of places.
    rest, place = divmod(index, columns * rows * 2)
    place = place * 7919 % (columns * rows * 2)
    place, mirrored = divmod(place, 2)
    y, x = divmod(place, columns)
    crop = photo[y : y + size[1], x : x + size[0]]
    crop = crop[:, ::-1] if mirrored else crop
    return np.ascontiguousarray(crop if not rest else crop - crop // 64 * np.uint8(rest))


@cache
def _photo() -> Pixels:
    with Image.open(PHOTO) as photo:
        return np.asarray(photo.convert("RGB").resize(ENLARGED, Image.Resampling.BICUBIC))
