"""Pixels as a PNG file, deflated by ISA-L; reading PNG is Pillow's work."""

from __future__ import annotations

import struct

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOUR_TYPES = {1: 0, 3: 2, 4: 6}  # gray, RGB, RGBA
_LEFT = 1


def encode_png(pixels: NDArray[np.uint8] | NDArray[np.uint16]) -> bytes:
    """Gray (H, W), uint8 or uint16, RGB (H, W, 3) or RGBA (H, W, 4) as a PNG file.

    On a 451 x 300 overlay: 1.3 ms for 222 kB, where Pillow takes 9.7 ms for 219 kB at level 1 and 48 ms for 195 kB at
    its default 6. Maps without a picture come out smaller than Pillow's.
    """
    height, width = pixels.shape[:2]
    samples = pixels.reshape(height, width, -1)
    colour_type = _COLOUR_TYPES[samples.shape[2]]
    header = struct.pack(">IIBBBBB", width, height, 8 * pixels.itemsize, colour_type, 0, 0, 0)
    data = isal_zlib.compress(_filtered(samples), 1)
    return b"".join((_SIGNATURE, *_chunk(b"IHDR", header), *_chunk(b"IDAT", data), *_chunk(b"IEND", b"")))


def _filtered(samples: NDArray[np.uint8] | NDArray[np.uint16]) -> NDArray[np.uint8]:
    """Each line as a filter's number and the differences to the pixels at the left: one subtraction for all.

    Choosing the best of PNG's five filters line by line is half of Pillow's time and saves 2% to 5% of a photograph.
    """
    pixel = samples.shape[2] * samples.itemsize
    big_endian = samples.astype(samples.dtype.newbyteorder(">"), copy=False)
    raw = np.ascontiguousarray(big_endian).view(np.uint8).reshape(len(samples), -1)
    lines = np.empty((len(raw), 1 + raw.shape[1]), np.uint8)
    lines[:, 0] = _LEFT
    lines[:, 1 : 1 + pixel] = raw[:, :pixel]
    np.subtract(raw[:, pixel:], raw[:, :-pixel], out=lines[:, 1 + pixel :])
    return lines


def _chunk(name: bytes, body: bytes) -> tuple[bytes, ...]:
    return struct.pack(">I", len(body)), name, body, struct.pack(">I", isal_zlib.crc32(body, isal_zlib.crc32(name)))
