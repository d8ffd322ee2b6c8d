"""Small picture files that take long to decode."""

from __future__ import annotations

import struct

from PIL import Image

from tests.e2e.support import file_of


def webp_of_one_colour(width: int, height: int) -> bytes:
    """A lossless WebP of less than 40 bytes: five prefix codes of one symbol each, so that pixels take no bits.

    https://developers.google.com/speed/webp/docs/webp_lossless_bitstream_specification
    """
    bits = [(width - 1, 14), (height - 1, 14), (0, 4)]  # no alpha, version 0
    bits += [(0, 3)]  # no transform, no colour cache, one group of prefix codes
    bits += [(1, 1), (0, 3)] * 5  # a simple code of one symbol, 0
    number = length = 0
    for value, count in bits:
        number |= value << length
        length += count
    stream = b"\x2f" + number.to_bytes((length + 7) // 8 + 2, "little")
    stream += bytes(len(stream) % 2)
    chunk = b"WEBPVP8L" + struct.pack("<I", len(stream)) + stream
    return b"RIFF" + struct.pack("<I", len(chunk)) + chunk


def jpeg_of_scans(width: int, height: int, scans: int) -> bytes:
    """A progressive JPEG of one grey whose last scan is there again and again."""
    file = file_of(Image.new("L", (width, height), 99), "JPEG", progressive=True)
    starts = [at for at in range(len(file) - 1) if file[at : at + 2] == b"\xff\xda"]
    body, last = file[: starts[-1]], file[starts[-1] : -2]
    return body + last * (scans - len(starts) + 1) + file[-2:]
