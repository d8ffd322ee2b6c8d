"""Crafted files: each is decoded rightly or refused with a word on why, in little memory and without end in sight."""

from __future__ import annotations

import io
import multiprocessing
import re
import resource
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from service.errors import TooManyPixels, UndecodablePicture
from service.imaging.decode import FORMATS, MAX_EXIF_SEGMENTS, MAX_READS, decode_base64
from service.imaging.geometry import Fit, FitMode, fit_picture
from service.imaging.price import MAX_PARTS
from tests.imaging.test_decode import LIMIT, NOISE, decode, encoded, pixels, png

MAX_PIXELS = 50_000_000
MEMORY = 100 * 2**20
HUGE = 256 * 2**20
SIDE = 12_000

Picture = Callable[[], bytes]


def small(kind: str, **options: Any) -> bytes:
    return encoded(Image.fromarray(NOISE), kind, **options)


def zeros(size: int) -> bytes:
    """So many zeros, compressed a thousandfold."""
    deflate = zlib.compressobj(9)
    return b"".join([deflate.compress(bytes(2**20)) for _ in range(size >> 20)]) + deflate.flush()


def after_start(jpeg: bytes, segments: bytes) -> bytes:
    return jpeg[:2] + segments + jpeg[2:]


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, 2 + len(body)) + body


def scans(number: int) -> bytes:
    """A progressive JPEG whose last scan comes so often."""
    data = small("JPEG", progressive=True)
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * number + data[-2:]


def gif(frames: int, *, screen: int = 8, frame: int = 8, disposal: int = 0) -> bytes:
    """Black frames of one colour table; `disposal` says what becomes of a frame when the next one comes."""
    head = b"GIF89a" + struct.pack("<HHBBB", screen, screen, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    control = b"!\xf9\x04" + bytes([disposal << 2, 0, 0, 0, 0])
    block = b"," + struct.pack("<HHHHB", 0, 0, frame, frame, 0) + b"\x02" + bytes([len(BLACK)]) + BLACK + b"\0"
    return head + (control + block) * frames + b";"


# LZW in codes of three bits: clear (4), two pixels, 32 times; then the end (5)
BLACK = sum(code << 3 * i for i, code in enumerate([4, 0, 0] * 32 + [5])).to_bytes(37, "little")


def bmp(width: int, height: int, body: bytes = bytes(64), compression: int = 0) -> bytes:
    palette = b"".join(bytes([i, 255 - i, 0, 0]) for i in range(256))
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, compression, len(body), 0, 0, 256, 0)
    return struct.pack("<2sIHHI", b"BM", 1078 + len(body), 0, 0, 1078) + head + palette + body


def tiff(*entries: tuple[int, int, int, int], data: bytes = b"", following: int = 0) -> bytes:
    """Entries of (tag, type, count, value); data lie at 8."""
    packed = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    start = 8 + len(data)
    return (
        struct.pack("<2sHI", b"II", 42, start)
        + data
        + struct.pack("<H", len(entries))
        + packed
        + struct.pack("<I", following)
    )


# width, length, 8 bits, black is zero, one sample; then uncompressed in one strip of 64 bytes at 8
GRAY = ((256, 4, 1, 8), (257, 4, 1, 8), (258, 4, 1, 8), (262, 4, 1, 1), (277, 4, 1, 1))
PLAIN = (*GRAY, (259, 4, 1, 1), (273, 4, 1, 8), (279, 4, 1, 64))


def tiles(*sizes: tuple[int, int, int, int]) -> bytes:
    """8 x 8 pixels in the corner of one deflated tile of 12,000 x 12,000, whose size is told by these entries."""
    data = zeros(SIDE * SIDE)
    return tiff(*GRAY, (259, 4, 1, 8), *sizes, (324, 4, 1, 8), (325, 4, 1, len(data)), data=data)


def tile_of_signed_64_bits() -> bytes:
    """The same as a BigTIFF; the tile's size is of type 17, which libtiff reads and Pillow does not."""
    data = zeros(SIDE * SIDE)
    sizes = ((322, 17, 1, SIDE), (323, 17, 1, SIDE), (324, 16, 1, 16), (325, 16, 1, len(data)))
    entries = (*GRAY, (259, 4, 1, 8), *sizes)
    packed = b"".join(struct.pack("<HHQQ", *entry) for entry in entries)
    head = struct.pack("<2sHHHQ", b"II", 43, 8, 0, 16 + len(data))
    return head + data + struct.pack("<Q", len(entries)) + packed + bytes(8)


def overlapping_tags() -> bytes:
    """Thousands of tags that share one megabyte."""
    shared = bytes(2**20)
    return tiff(*PLAIN, *((40_000 + tag, 1, len(shared), 8) for tag in range(20_000)), data=shared)


def exif_of_shared_bytes() -> bytes:
    entries = b"".join(struct.pack("<HHII", 40_000 + tag, 7, 30_000, 60_000) for tag in range(5000))
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 5000) + entries + bytes(60_000)


def webp(width: int, height: int) -> bytes:
    """An animation of small frames on a canvas of this size."""
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = bytearray(encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True))
    canvas = data.index(b"VP8X") + 12
    data[canvas : canvas + 6] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return bytes(data)


# What each file is answered: words of the problem, or the picture's size.
BOMBS: dict[str, tuple[Picture, str]] = {
    "PNG that declares 50000 x 50000": (lambda: png(50_000, 50_000, 8, 2), "2500000000 pixels; the limit is 50000000"),
    "PNG of too many pixels": (lambda: idat(zeros(HUGE)), "(4, 4)"),
    "PNG of a bulky profile": (lambda: png(4, 4, 8, 0, (b"iCCP", b"x\0\0" + zeros(HUGE))), "too large"),
    "PNG of a bulky text": (lambda: png(4, 4, 8, 0, (b"zTXt", b"x\0\0" + zeros(HUGE))), "too large"),
    "PNG of many bulky texts": (lambda: png(4, 4, 8, 0, *[(b"zTXt", b"x\0\0" + zeros(2**20))] * 1000), "text"),
    "PNG of many chunks": (lambda: png(4, 4, 8, 0, *[(b"zzZz", b"")] * 500_000), f"more than {MAX_READS} parts"),
    "PNG whose EXIF entries share bytes": (lambda: small("PNG", exif=exif_of_shared_bytes()), "(30, 20)"),
    "JPEG of many segments": (
        lambda: after_start(small("JPEG"), b"\xff\xe3\0\2" * 600_000),
        f"more than {MAX_READS} parts",
    ),
    "JPEG of many fill bytes": (
        lambda: after_start(small("JPEG"), b"\xff" * 2_000_000),
        f"more than {MAX_READS} parts",
    ),
    "JPEG of many EXIF segments": (
        lambda: after_start(small("JPEG"), segment(0xE1, b"Exif\0\0" + bytes(100)) * 290_000),
        f"290000 EXIF segments; at most {MAX_EXIF_SEGMENTS}",
    ),
    "JPEG of many scans": (lambda: scans(5000), "(30, 20)"),
    "JPEG of many segments behind its first scan": (
        lambda: small("JPEG", progressive=True)[:-2] + segment(0xFE, b"") * 200_000 + b"\xff\xd9",
        f"more than {MAX_PARTS} parts",
    ),
    "GIF whose screen is huge": (lambda: gif(1, screen=60_000), "3600000000 pixels; the limit is 50000000"),
    "GIF whose frame is huge": (lambda: gif(1, frame=60_000), "3600000000 pixels"),
    "GIF whose huge frame is cleared": (lambda: gif(1, frame=60_000, disposal=2), "3600000000 pixels"),
    "GIF whose huge frame is taken back": (lambda: gif(1, frame=60_000, disposal=3), "3600000000 pixels"),
    "BMP of 2^31 x 2^31": (lambda: bmp(-(2**31), -(2**31)), "pixels; the limit is 50000000"),
    "BMP of a huge palette": (lambda: bmp(8, 8)[:46] + struct.pack("<I", 2**31) + bmp(8, 8)[50:], "Palette"),
    "BMP in runs, of empty lines": (
        lambda: bmp(7000, 7000, b"\1\1\0\0" * 7000, compression=1),
        "run-length coded picture has 7000 x 7000",
    ),
    "BMP in runs, of leaps": (lambda: bmp(4_000_000, 1, b"\1\1\0\2\xff\xff" * 1000, compression=1), "(4000000, 1)"),
    "BMP in runs of one": (lambda: bmp(2000, 2000, b"\1\1" * 600_000, compression=1), f"more than {MAX_READS} parts"),
    "TIFF of a huge tile": (lambda: tiles((322, 4, 1, SIDE), (323, 4, 1, SIDE)), f"tile has {SIDE} x {SIDE}"),
    "TIFF whose tile is told twice": (
        lambda: tiles((322, 4, 1, 16), (322, 4, 1, SIDE), (323, 4, 1, 16), (323, 4, 1, SIDE)),
        "one whole number",
    ),
    "TIFF whose tile Pillow does not see": (tile_of_signed_64_bits, "one whole number"),
    "TIFF whose tags share bytes": (overlapping_tags, "(8, 8)"),
    "TIFF of absurdly many strips": (
        lambda: tiff(*GRAY, (259, 4, 1, 8), (278, 4, 1, 1), (273, 4, 2**28, 8), (279, 4, 2**28, 8), data=bytes(64)),
        "",
    ),
    "TIFF whose strip is nowhere": (
        lambda: tiff(*GRAY, (259, 4, 1, 1), (273, 4, 1, 2**31), (279, 4, 1, 64)),
        "cut short",
    ),
    "TIFF that is followed by itself": (lambda: tiff(*PLAIN, data=bytes(64), following=72), "(8, 8)"),
    "TIFF whose EXIF is itself": (lambda: tiff(*PLAIN, (34665, 4, 1, 72), data=bytes(64)), "(8, 8)"),
    "WebP of a huge canvas": (lambda: webp(16_384, 16_384), "268435456 pixels"),
    "WebP of the hugest canvas": (lambda: webp(2**24, 2**8), "4294967296 pixels"),
}


def idat(data: bytes) -> bytes:
    """A PNG of 4 x 4 gray pixels whose data are these."""
    whole = png(4, 4, 8, 0)
    start = whole.index(b"IDAT") - 4
    body = b"IDAT" + data
    return whole[:start] + struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body)) + whole[-12:]


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def outcome(name: str) -> tuple[str, int]:
    """What a bomb is answered, and the memory that this took."""
    data = BOMBS[name][0]()
    before = peak()
    try:
        answer = str(decode(data, MAX_PIXELS).size)
    except (UndecodablePicture, TooManyPixels) as error:
        answer = error.detail
    return answer, peak() - before


@pytest.fixture(scope="module")
def process() -> Iterator[ProcessPoolExecutor]:
    """A process of its own, whose peak of memory is the bombs'."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as one:
        yield one


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_takes_little_memory(process: ProcessPoolExecutor, name: str) -> None:
    answer, memory = process.submit(outcome, name).result(60)
    assert re.search(re.escape(BOMBS[name][1]), answer), answer
    assert memory < MEMORY


@pytest.mark.parametrize("fit", ["crop", "stretch", "letterbox"])
@pytest.mark.parametrize("size", [(1, 10_000), (10_000, 1), (1, 20_000_000), (20_000_000, 1)])
def test_a_line_takes_little_memory(process: ProcessPoolExecutor, fit: FitMode, size: tuple[int, int]) -> None:
    """Fitted to a shorter side of 256 the smallest is 256 x 2,560,000 pixels, 2 GB. All of its input is its colour."""
    colours, memory = process.submit(fitted, size, fit).result(60)
    assert memory < 2 * MEMORY
    assert [200, 100, 50] in colours
    assert len(colours) == (2 if fit == "letterbox" else 1)


def fitted(size: tuple[int, int], fit: FitMode) -> tuple[list[list[int]], int]:
    """The colours of the network's input, and the memory that it took."""
    image = Image.new("RGB", size, (200, 100, 50))
    before = peak()
    seen = fit_picture(image, Fit((224, 224), fit, 256, "bilinear", (0, 0, 0)))
    return np.unique(seen.reshape(-1, 3), axis=0).tolist(), peak() - before


# Files cut, flipped and doubled


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"])
def test_a_file_cut_anywhere_is_refused_or_whole(kind: str) -> None:
    """What remains may be whole where only a trailer is missing."""
    whole = small(kind)
    expected = pixels(whole)
    for end in range(len(whole)):
        try:
            seen = pixels(whole[:end])
        except UndecodablePicture:
            continue
        assert end > 0.9 * len(whole) or kind == "TIFF", end
        np.testing.assert_array_equal(seen, expected)


@pytest.mark.parametrize("length", [0, 1, 2, 3, 0x7FFF, 0xFFFF])
def test_a_jpeg_whose_segments_lie_is_refused(length: int) -> None:
    """A shorter quantisation table, or one that swallows the rest."""
    data = bytearray(small("JPEG"))
    place = data.index(b"\xff\xdb") + 2
    data[place : place + 2] = struct.pack(">H", length)
    with pytest.raises(UndecodablePicture, match="damaged"):
        decode(bytes(data), LIMIT)


SEEDS = [
    *(small(kind) for kind in FORMATS),
    small("JPEG", progressive=True),
    small("JPEG", exif=Image.Exif()),
    small("TIFF", compression="tiff_adobe_deflate"),
    small("TIFF", compression="jpeg"),
    encoded(Image.fromarray(NOISE).convert("P"), "BMP"),
    bmp(16, 16, b"\x08\1\0\0\0\2\1\1\0\3abc\0" * 4, compression=1),
    encoded(Image.fromarray(NOISE).convert("RGBA"), "PNG"),
    encoded(Image.fromarray(NOISE).convert("RGBA"), "WEBP", lossless=True),
    encoded(Image.fromarray(NOISE).convert("CMYK"), "JPEG"),
    encoded(Image.fromarray(NOISE).convert("LAB"), "TIFF"),
    gif(3, disposal=2),
    webp(8, 8),
]
Edit = tuple[str, int, int]
EDITS = st.lists(
    st.tuples(st.sampled_from(["set", "cut", "double", "end"]), st.integers(0, 2**16), st.integers(0, 255)),
    min_size=1,
    max_size=6,
)


def edited(data: bytes, edits: list[Edit]) -> bytes:
    for what, place, value in edits:
        at = place % max(1, len(data))
        match what:
            case "set":
                data = data[:at] + bytes([value]) + data[at + 1 :]
            case "cut":
                data = data[:at] + data[at + value :]
            case "double":
                data = data[: at + value] + data[at:]
            case "end":
                data = data[: at + 1]
    return data


@settings(max_examples=600, deadline=None, derandomize=True)
@given(seed=st.sampled_from(SEEDS), edits=EDITS)
@example(seed=b"\xff\xd8", edits=[])
@pytest.mark.filterwarnings("ignore:::PIL")
def test_edited_files_are_decoded_or_refused(seed: bytes, edits: list[Edit]) -> None:
    try:
        image = decode(edited(seed, edits), LIMIT)
    except (UndecodablePicture, TooManyPixels):
        return
    assert image.mode == "RGB"
    assert image.width * image.height <= LIMIT


# Other formats, and files of two formats


def foreign() -> dict[str, bytes]:
    """Every format that Pillow writes and the contract does not name, and some by hand."""
    Image.init()
    made = {"SVG": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>"}
    made["PSD"] = struct.pack(">4sH6xHIIHH", b"8BPS", 1, 3, 8, 8, 8, 3) + bytes(14 + 192)
    for kind in sorted(Image.SAVE.keys() - {*FORMATS, "MPO"}):  # MPO is a JPEG with another behind it
        for mode in ("RGB", "L", "1"):
            try:
                made[kind] = encoded(Image.new(mode, (16, 16)), kind)
            except (OSError, ValueError, KeyError, TypeError, NotImplementedError, AttributeError):
                continue
            break
    return made


FOREIGN = foreign()


def test_the_foreign_ones_are_many() -> None:
    assert {"EPS", "ICO", "PCX", "PDF", "PPM", "PSD", "SVG", "TGA"} <= FOREIGN.keys()


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_the_contract_does_not_name_is_refused(kind: str) -> None:
    with pytest.raises(UndecodablePicture, match="no JPEG, PNG, WebP, GIF, BMP or TIFF"):
        decode(FOREIGN[kind], LIMIT)


def test_ghostscript_is_never_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called = tmp_path / "called"
    for name in ("gs", "gswin64c", "gswin32c"):
        (tmp_path / name).write_text(f"#!/bin/sh\ntouch {called}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    for data in (FOREIGN["EPS"], b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n"):
        with pytest.raises(UndecodablePicture):
            decode(data, LIMIT)
    assert not called.exists()


@pytest.mark.parametrize("tail", [b"PK\5\6" + bytes(18), b"<script>alert(1)</script>", b"%PDF-1.7\n", b"\0" * 999])
@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "WEBP", "TIFF"])
def test_what_follows_a_picture_does_not_count(kind: str, tail: bytes) -> None:
    data = small(kind)
    np.testing.assert_array_equal(pixels(data + tail), pixels(data))


def test_a_picture_behind_something_else_is_none() -> None:
    for head in (b"<html>", b"%PDF-1.7\n", b"\0", b"\xef\xbb\xbf"):
        with pytest.raises(UndecodablePicture, match="no JPEG"):
            decode(head + small("JPEG"), LIMIT)


# What test_decode has no room for


def test_inks_without_adobes_mark_are_inverted_as_well() -> None:
    """So all browsers have it, and so Pillow does."""
    cyan, key = 100, 50
    data = encoded(Image.new("CMYK", (16, 16), (cyan, 0, 0, key)), "JPEG")
    start = data.index(b"\xff\xee")
    plain = data[:start] + data[start + 2 + int.from_bytes(data[start + 2 : start + 4], "big") :]
    assert b"Adobe" not in plain
    expected = [(255 - cyan) * (255 - key) / 255, 255 - key, 255 - key]
    assert np.abs(pixels(plain) - np.array(expected)).max() <= 3


def test_numbers_that_are_none_are_refused() -> None:
    values = np.array([[np.nan, np.inf, -np.inf, 0.5]], np.float32)
    with pytest.raises(UndecodablePicture, match="floating-point"):
        decode(encoded(Image.fromarray(values), "TIFF"), LIMIT)


def test_a_bottom_up_and_a_top_down_bmp() -> None:
    """The first stored line is the lowest one, unless the height is negative. Colour i is (0, 255 - i, i)."""
    body = bytes([1] * 8 + [2] * 8)
    for height, lines in ((2, [2, 1]), (-2, [1, 2])):
        assert pixels(bmp(8, height, body))[:, 0].tolist() == [[0, 255 - line, line] for line in lines]


def test_the_first_of_thousands_of_frames() -> None:
    assert pixels(gif(20_000)).tolist() == [[[0, 0, 0]] * 8] * 8


@pytest.mark.parametrize("head", ["data:text/html", "data:", "data:image/svg+xml;charset=utf-8", "DATA:a/b;c;d=e;"])
def test_the_media_type_of_a_data_uri_is_not_trusted(head: str) -> None:
    assert decode_base64(f"{head};base64,AAEC") == b"\0\1\2"


def test_a_jpeg_of_several_is_the_first() -> None:
    """An MPO is read as the JPEG that it begins with."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(file, "MPO", save_all=True, append_images=[Image.new("RGB", (16, 16))])
    assert np.abs(pixels(file.getvalue()).astype(int) - [254, 0, 0]).max() <= 2
