"""What decoding takes beside what `service.imaging.price` estimates, for the dear files of each format.

`python -m benchmarks.decoding` prints a line per file. An estimate is sound where it is not below the measured time.
"""

from __future__ import annotations

import io
import re
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import machine
from service.imaging.decode import open_picture
from service.imaging.geometry import Fit, fit_picture

SIDES = (4000, 3000)
FIT = Fit((224, 224), "crop", 256, "bilinear", (0, 0, 0))
CHELSEA = Path(__file__).parents[1] / "tests" / "data" / "chelsea.png"
NEXT = re.compile(rb"\xff[\xc0-\xcf\xd9-\xfe]")


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def with_first_scan(jpeg: bytes, times: int) -> bytes:
    """The first scan of a progressive JPEG, which is of all components, so often and nothing behind it."""
    start = jpeg.index(b"\xff\xda")
    following = NEXT.search(jpeg, start + 2 + struct.unpack_from(">H", jpeg, start + 2)[0])
    assert following
    return jpeg[:start] + jpeg[start : following.start()] * times + b"\xff\xd9"


def with_last_scan(jpeg: bytes, times: int) -> bytes:
    """A progressive JPEG whose last scan comes so often."""
    start = jpeg.rindex(b"\xff\xda")
    return jpeg[:start] + jpeg[start:-2] * times + jpeg[-2:]


def png(depth: int, colour: int, channels: int, interlaced: bool) -> bytes:
    """Zeros behind the Paeth filter."""
    width, height = SIDES
    rows = (b"\4" + bytes(width * channels * depth // 8)) * height + bytes(8 * height)
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(rows, 1)), (b"IEND", b""))
    chunks = (
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def bmp_in_runs(width: int, height: int) -> bytes:
    """Runs of one pixel each."""
    body = (b"\1\1" * width + b"\0\0") * height + b"\0\1"
    palette = bytes(1024)
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(body), 0, 0, 256, 0)
    return struct.pack("<2sIHHI", b"BM", 1078 + len(body), 0, 0, 1078) + head + palette + body


def files() -> dict[str, Callable[[], bytes]]:
    """By what they are."""
    flat = Image.new("RGB", SIDES, (3, 7, 77))
    photo = Image.open(CHELSEA).convert("RGB").resize(SIDES)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*SIDES[::-1], 3), np.uint8))
    veiled = photo.copy()
    veiled.putalpha(100)
    deep = Image.fromarray(np.zeros(SIDES[::-1], np.uint16))
    tiffs = {
        f"TIFF {compression}": lambda compression=compression, image=image: encoded(
            image, "TIFF", compression=compression
        )
        for compression, image in (
            ("raw", photo),
            ("packbits", photo),
            ("tiff_lzw", photo),
            ("tiff_adobe_deflate", veiled),
            ("jpeg", photo),
            ("zstd", photo),
            ("lzma", photo),
            ("group4", noise.convert("1")),
        )
    }
    return {
        "JPEG, photograph": lambda: encoded(photo, "JPEG", quality=90),
        "JPEG, noise": lambda: encoded(noise, "JPEG", quality=95, subsampling=0),
        "JPEG, CMYK": lambda: encoded(photo.convert("CMYK"), "JPEG", quality=90),
        "JPEG, progressive": lambda: encoded(photo, "JPEG", quality=90, progressive=True, subsampling=0),
        "JPEG, one scan of many": lambda: with_first_scan(encoded(photo, "JPEG", progressive=True, subsampling=0), 1),
        "JPEG, 100 scans of all": lambda: with_first_scan(encoded(flat, "JPEG", progressive=True, subsampling=0), 100),
        "JPEG, 100 scans of one": lambda: with_last_scan(encoded(flat, "JPEG", progressive=True), 100),
        "PNG, photograph": lambda: encoded(photo, "PNG", compress_level=1),
        "PNG, noise": lambda: encoded(noise, "PNG", compress_level=1),
        "PNG, RGB": lambda: png(8, 2, 3, False),
        "PNG, RGBA of 16 bits": lambda: png(16, 6, 4, False),
        "PNG, RGBA of 16 bits, interlaced": lambda: png(16, 6, 4, True),
        "PNG, gray of 16 bits": lambda: png(16, 0, 1, False),
        "WebP, photograph": lambda: encoded(photo, "WEBP", method=0),
        "WebP, photograph with alpha": lambda: encoded(veiled, "WEBP", method=0),
        "WebP, lossless, flat": lambda: encoded(flat, "WEBP", lossless=True, method=0),
        "WebP, lossless, photograph": lambda: encoded(photo, "WEBP", lossless=True, method=0, quality=0),
        "GIF": lambda: encoded(photo.convert("P"), "GIF"),
        "GIF, transparent": lambda: encoded(photo.convert("P"), "GIF", transparency=1),
        "BMP": lambda: encoded(photo, "BMP"),
        "BMP in runs": lambda: bmp_in_runs(490, 1000),
        **tiffs,
        "TIFF, Lab": lambda: encoded(Image.new("LAB", SIDES), "TIFF", compression="tiff_lzw"),
        "TIFF, gray of 16 bits": lambda: encoded(deep, "TIFF", compression="tiff_lzw"),
    }


def main() -> None:
    print(machine.describe("cpu")["processor"])
    fit_picture(Image.new("RGB", SIDES), FIT)  # the first time takes longer
    for name, make in files().items():
        data = make()
        started = time.perf_counter()
        opened = open_picture(data, 50_000_000)
        fit_picture(opened.decode(), FIT)
        seconds = time.perf_counter() - started
        print(f"{name:36}{len(data):12} bytes {seconds:8.3f} s, estimated {opened.seconds:8.3f} s", flush=True)


if __name__ == "__main__":
    main()
