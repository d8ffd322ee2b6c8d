from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from service.imaging.png import encode_png

# Channels, type, and PNG's number of the colour type.
KINDS: list[tuple[tuple[int, ...], Any, int]] = [
    ((), np.uint8, 0),
    ((), np.uint16, 0),
    ((3,), np.uint8, 2),
    ((4,), np.uint8, 6),
]
of_each_kind = pytest.mark.parametrize(("channels", "dtype", "colour_type"), KINDS)


def noise(height: int, width: int, channels: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    top = np.iinfo(dtype).max
    return np.random.default_rng(height + width).integers(0, top, (height, width, *channels), dtype, endpoint=True)


def pillows(file: bytes) -> NDArray[Any]:
    return np.asarray(Image.open(io.BytesIO(file)))


def chunks(file: bytes) -> dict[bytes, bytes]:
    assert file.startswith(b"\x89PNG\r\n\x1a\n")
    found, place = {}, 8
    while place < len(file):
        (length,) = struct.unpack(">I", file[place : place + 4])
        named = file[place + 4 : place + 8 + length]
        assert file[place + 8 + length : place + 12 + length] == struct.pack(">I", zlib.crc32(named))
        found[named[:4]] = named[4:]
        place += 12 + length
    return found


@given(height=st.integers(1, 40), width=st.integers(1, 40), kind=st.sampled_from(KINDS))
@settings(max_examples=100, deadline=None)
def test_pillow_finds_the_very_pixels(height: int, width: int, kind: tuple[tuple[int, ...], Any, int]) -> None:
    pixels = noise(height, width, *kind[:2])
    found = pillows(encode_png(pixels))
    assert found.dtype == pixels.dtype
    np.testing.assert_array_equal(found, pixels)


@of_each_kind
def test_the_file_is_what_the_standard_says(channels: tuple[int, ...], dtype: Any, colour_type: int) -> None:
    """Read by the standard's own words: chunks with CRCs, big-endian samples, lines of the filter Sub."""
    pixels = noise(5, 7, channels, dtype)
    found = chunks(encode_png(pixels))
    assert list(found) == [b"IHDR", b"IDAT", b"IEND"]
    assert found[b"IHDR"] == struct.pack(">IIBBBBB", 7, 5, 8 * pixels.itemsize, colour_type, 0, 0, 0)
    lines = np.frombuffer(zlib.decompress(found[b"IDAT"]), np.uint8).reshape(5, -1)
    assert (lines[:, 0] == 1).all()
    samples = np.cumsum(lines[:, 1:].reshape(5, 7, -1), axis=1, dtype=np.uint8)
    read = samples.reshape(5, -1).view(pixels.dtype.newbyteorder(">")).reshape(pixels.shape)
    np.testing.assert_array_equal(read, pixels)


@of_each_kind
def test_any_layout_in_memory_will_do_and_is_left_alone(
    channels: tuple[int, ...], dtype: Any, colour_type: int
) -> None:
    pixels = noise(20, 30, channels, dtype)
    for laid in (pixels[::-1, ::2], np.asfortranarray(pixels), pixels[3:9, 5:6]):
        before = laid.copy()
        laid.flags.writeable = False
        np.testing.assert_array_equal(pillows(encode_png(laid)), before)
        np.testing.assert_array_equal(laid, before)


def test_flat_colours_take_little_room() -> None:
    assert len(encode_png(np.full((1000, 1000, 3), 200, np.uint8))) < 20_000
