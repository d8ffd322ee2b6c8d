"""What decoding is estimated to take: it follows what a decoder does, not the bytes of the file."""

from __future__ import annotations

import struct
import zlib

import pytest
from PIL import Image

from service.errors import UndecodablePicture
from service.imaging.decode import open_picture
from tests.imaging.test_decode import encoded, png
from tests.imaging.test_hostile import GRAY, after_start, bmp, gif, scans, segment, small, tiff

MAX_PIXELS = 50_000_000
FLAT = Image.new("RGB", (640, 480), (3, 7, 77))


def seconds(data: bytes) -> float:
    return open_picture(data, MAX_PIXELS).seconds


def test_a_tiny_lossless_webp_of_many_pixels_is_dear() -> None:
    data = encoded(Image.new("RGB", (8000, 6000)), "WEBP", lossless=True, method=0)
    assert len(data) < 100
    assert seconds(data) > 50 * seconds(encoded(FLAT, "BMP"))


def test_other_pages_of_a_scan_cost_only_their_bytes() -> None:
    """Pillow decodes the first one; each page has scans of its own."""
    page = Image.effect_noise((600, 800), 50).convert("RGB")
    one = encoded(page, "TIFF", compression="jpeg")
    many = encoded(page, "TIFF", compression="jpeg", save_all=True, append_images=[page] * 19)
    assert len(many) > 15 * len(one)
    assert seconds(many) - seconds(one) < 7e-9 * len(many)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_the_price_grows_with_the_pixels(kind: str) -> None:
    large, little = (seconds(encoded(FLAT.resize(size), kind)) for size in ((1280, 960), (640, 480)))
    assert 3 < large / little < 5


def test_every_scan_of_a_jpeg_counts() -> None:
    one, ten, hundred = (seconds(scans(number)) for number in (1, 10, 100))
    assert (hundred - one) / (ten - one) == pytest.approx(11, rel=0.2)


def hidden(data: bytes) -> list[bytes]:
    """The same picture with the marks of many scans where no decoder looks for any."""
    marks = b"\xff\xda\0\x0c\3" * 1000
    return [
        after_start(data, segment(0xE1, b"Exif\0\0" + marks)),
        after_start(data, segment(0xFE, marks)),
        data + marks,
    ]


def test_marks_of_scans_in_a_thumbnail_a_comment_or_behind_the_end_are_none() -> None:
    plain = small("JPEG")
    assert max(map(seconds, hidden(plain))) < 2 * seconds(plain) + 1e-4


def test_scans_behind_stray_markers_are_counted() -> None:
    """A decoder reads no length behind the markers of a restart, nor of those below C0."""
    data = scans(100)
    cut = data.index(b"\xff\xda") + 20
    for stray in (b"\xff\xd0\xff\xff", b"\xff\x02\xff\xff", b"\xff\xff\0"):
        assert seconds(data[:cut] + stray + data[cut:]) == pytest.approx(seconds(data), rel=0.01)


def test_arithmetic_coding_is_dearer() -> None:
    data = scans(100)
    arithmetic = data.replace(b"\xff\xc2", b"\xff\xca", 1)
    assert seconds(arithmetic) > 2 * seconds(data)


def test_transparency_and_deep_pixels_cost_more() -> None:
    plain = seconds(png(1000, 1000, 8, 2))
    assert seconds(png(1000, 1000, 8, 6)) > plain
    assert seconds(png(1000, 1000, 16, 2)) > plain
    veil = seconds(encoded(FLAT.convert("P"), "GIF", transparency=1))
    assert veil > seconds(encoded(FLAT.convert("P"), "GIF"))
    assert seconds(gif(1, screen=1000)) > 100 * seconds(gif(1, screen=8))


def test_a_run_costs_more_than_a_byte() -> None:
    runs = b"\1\1" * 100_000
    assert seconds(bmp(400, 400, runs, compression=1)) > 10 * seconds(bmp(400, 400, runs))


def tiled(number: int) -> bytes:
    """A picture 16 pixels wide in tiles of 4096 x 16, all of which are the same bytes."""
    data = zlib.compress(bytes(4096 * 16))
    blocks = struct.pack(f"<{number}I", *[8] * number) + struct.pack(f"<{number}I", *[len(data)] * number)
    size = ((256, 4, 1, 16), (257, 4, 1, 16 * number), *GRAY[2:])
    places = ((324, 4, number, 8 + len(data)), (325, 4, number, 8 + len(data) + 4 * number))
    return tiff(*size, (259, 4, 1, 8), (322, 4, 1, 4096), (323, 4, 1, 16), *places, data=data + blocks)


def test_tiles_are_priced_whole_however_little_of_them_is_seen() -> None:
    hundred, ten = seconds(tiled(100)), seconds(tiled(10))
    assert hundred / ten == pytest.approx(10, rel=0.1)
    assert hundred > 100 * 4096 * 16 * 1e-9, "the picture has 256 times fewer pixels"


def test_a_directory_that_describes_the_pixels_twice_is_refused() -> None:
    twice = tiff(*GRAY, (259, 4, 1, 8), (259, 4, 1, 7), (273, 4, 1, 8), (279, 4, 1, 64), data=bytes(64))
    with pytest.raises(UndecodablePicture, match="twice"):
        seconds(twice)


def jpeg_strips(offsets: list[int], size: int, jpeg: bytes) -> bytes:
    """A TIFF of JPEG strips of 20 rows, each of so many bytes from its offset on; the file has as many more again."""
    number = len(offsets)
    data = jpeg + bytes(size * number)
    lists = struct.pack(f"<{number}I", *offsets) + struct.pack(f"<{number}I", *[size] * number)
    at = 8 + len(data)
    head = ((256, 4, 1, 32), (257, 4, 1, 20 * number), *GRAY[2:], (259, 4, 1, 7), (278, 4, 1, 20))
    return tiff(*head, (273, 4, number, at), (279, 4, number, at + 4 * number), data=data + lists)


def test_strips_that_share_a_jpeg_have_all_its_scans_each() -> None:
    jpeg = scans(200)
    size = len(jpeg)
    shared = seconds(jpeg_strips([8] * 50, size, jpeg))
    apart = seconds(jpeg_strips([8 + size * number for number in range(50)], size, jpeg))
    assert shared > 3 * apart
