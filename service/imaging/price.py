"""How long a picture will take to decode, estimated from its headers before any pixel is decoded.

The rates are upper estimates, measured on one core of an AMD EPYC of family 26; `python -m benchmarks.decoding`
compares them with what decoding takes. A file's size says little: 34 bytes of WebP may hold 50 megapixels.
"""

from __future__ import annotations

import itertools
import math
import re
import struct

from PIL import BmpImagePlugin, Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin

from service.errors import UndecodablePicture

MAX_PARTS = 100_000
"""Of a file that are looked at in Python; honest files have fewer."""
RUN_LENGTH = (BmpImagePlugin.BmpImageFile.COMPRESSIONS["RLE8"], BmpImagePlugin.BmpImageFile.COMPRESSIONS["RLE4"])

# Nanoseconds per pixel. FIT: the picture is turned upright and resized to the network's input.
_FIT = 8.0
_TRANSPARENCY = 16.0
_TO_RGB = {"RGB": 0.0, "1": 3.0, "L": 3.0, "P": 3.0, "CMYK": 6.0, "YCbCr": 6.0, "LAB": 18.0, "RGBA": 0.0}
_TO_RGB_FROM_16_BIT = 15.0
_INDEXED = 5.0  # GIF and BMP
_WEBP_LOSSY, _WEBP_LOSSLESS = 9.0, 20.0
# Nanoseconds per pixel and component.
_JPEG, _JPEG_SCAN = 1.7, 0.4
_JPEG_SMOOTHED = 5.0  # a progressive file may leave out scans; its blocks are smoothed then
_ARITHMETIC = 8.0  # arithmetic coding takes so many times longer: a decision costs time, but hardly a byte
# Nanoseconds per decoded byte of a pixel.
_PNG, _TIFF = 2.5, 3.0
# Nanoseconds per byte of the file.
_BYTE = {"JPEG": 10.0, "MPO": 10.0, "PNG": 22.0, "WEBP": 10.0, "GIF": 2.0, "BMP": 1.0, "TIFF": 6.0}
_LZMA_BYTE = 25.0
_RUN_BYTE = 400.0  # Pillow decodes runs in Python

# Markers with a length; others stand alone, and a decoder passes over them. FF 00 is a byte of coded data.
_MARKER = re.compile(rb"\xff+([\xc0-\xcf\xd9-\xfe])")
_SOS, _EOI = 0xDA, 0xD9
_ARITHMETIC_FRAMES = frozenset({0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF})

_TILE_TAGS = (TiffImagePlugin.TILEWIDTH, TiffImagePlugin.TILELENGTH)
# What the price of a TIFF is computed from, beside the tiles.
_PRICED_TAGS = (
    TiffImagePlugin.IMAGEWIDTH,
    TiffImagePlugin.IMAGELENGTH,
    TiffImagePlugin.BITSPERSAMPLE,
    TiffImagePlugin.COMPRESSION,
    TiffImagePlugin.SAMPLESPERPIXEL,
    TiffImagePlugin.ROWSPERSTRIP,
    TiffImagePlugin.STRIPOFFSETS,
    TiffImagePlugin.STRIPBYTECOUNTS,
    TiffImagePlugin.TILEOFFSETS,
    TiffImagePlugin.TILEBYTECOUNTS,
)


def decode_seconds(image: Image.Image, data: bytes) -> float:
    """The seconds of one core that decoding `data`, converting it to RGB and fitting it to a network take at most.

    `image` is the file as Pillow opened it. Raises UndecodablePicture where the headers are made to hide the cost.
    """
    pixels = image.width * image.height
    byte = _BYTE[image.format or ""]
    match image:
        case JpegImagePlugin.JpegImageFile():
            decoding = _jpeg(image, data)
        case PngImagePlugin.PngImageFile():
            decoding = pixels * _png_bytes(image) * _PNG
        case TiffImagePlugin.TiffImageFile():
            decoding = _tiff(image, data)
            byte = _LZMA_BYTE if image.info["compression"] == "lzma" else byte
        case WebPImagePlugin.WebPImageFile():
            decoding = pixels * (_WEBP_LOSSY if data[12:16] == b"VP8 " else _WEBP_LOSSLESS)
        case _:
            decoding = pixels * _INDEXED
            byte = _RUN_BYTE if image.info.get("compression") in RUN_LENGTH else byte
    return (decoding + len(data) * byte + pixels * (_conversion(image) + _FIT)) / 1e9


def tile_size(image: Image.Image, data: bytes) -> tuple[int, int]:
    """Width and height of a TIFF's tiles, each of which is decoded whole; 0, 0 where there are none.

    libtiff reads the file anew, and knows types of numbers that Pillow passes over: what they may see differently is
    refused with UndecodablePicture.
    """
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return 0, 0
    given = _tags(image.tag_v2, data)
    if any(given.count(tag) > 1 for tag in _PRICED_TAGS):
        raise UndecodablePicture("The TIFF file's directory describes the pixels twice.")
    tiles = [tag for tag in given if tag in _TILE_TAGS]
    if not tiles:
        return 0, 0
    width, height = (image.tag_v2.get(tag) for tag in _TILE_TAGS)
    if len(tiles) == len(_TILE_TAGS) and isinstance(width, int) and isinstance(height, int) and min(width, height) > 0:
        return width, height
    raise UndecodablePicture("The TIFF file's tiles need one whole number for their width and one for their height.")


def _conversion(image: Image.Image) -> float:
    transparent = image.mode in ("RGBA", "LA", "La", "PA") or "transparency" in image.info
    return _TO_RGB.get(image.mode, _TO_RGB_FROM_16_BIT) + (_TRANSPARENCY if transparent else 0.0)


def _png_bytes(image: PngImagePlugin.PngImageFile) -> int:
    """Of a decoded pixel."""
    wide = bool(image.tile) and "16" in str(image.tile[0].args)
    return len(image.getbands()) * (2 if wide else 1)


def _jpeg(image: JpegImagePlugin.JpegImageFile, data: bytes) -> float:
    """A scan passes over all blocks of its components, however few bytes it has."""
    pixels = math.ceil(image.width / 32) * math.ceil(image.height / 32) * 32**2  # the largest block has 32 x 32 pixels
    scanned, arithmetic = _component_scans(data)
    once = _JPEG_SMOOTHED if image.info.get("progressive") else _JPEG
    return pixels * (image.layers * once + scanned * _JPEG_SCAN * (_ARITHMETIC if arithmetic else 1.0))


def _component_scans(data: bytes) -> tuple[int, bool]:
    """The components of all scans that a decoder would find, and whether they are coded arithmetically.

    Scans in a thumbnail, in a comment or behind the end of the picture do not count.
    """
    total, arithmetic, at = 0, False, 2
    for _ in range(MAX_PARTS):
        found = _MARKER.search(data, at)
        if found is None or found[1][0] == _EOI:
            return total, arithmetic
        at = found.end()
        if found[1][0] == _SOS:
            total += data[at + 2] if at + 2 < len(data) else 0
        arithmetic = arithmetic or found[1][0] in _ARITHMETIC_FRAMES
        at += max(2, int.from_bytes(data[at : at + 2], "big"))
    raise UndecodablePicture(f"The JPEG file has more than {MAX_PARTS} parts.")


def _tiff(image: TiffImagePlugin.TiffImageFile, data: bytes) -> float:
    """A tile is decoded whole, however little of it lies in the picture."""
    tags = image.tag_v2
    columns, rows = tags[TiffImagePlugin.IMAGEWIDTH], tags[TiffImagePlugin.IMAGELENGTH]
    width, height = tile_size(image, data)
    if not width:
        width, height = columns, max(1, min(_number(tags.get(TiffImagePlugin.ROWSPERSTRIP, rows), rows), rows))
    parts = math.ceil(columns / width) * math.ceil(rows / height)
    scans = _scans_per_part(tags, data, parts) if image.info["compression"] in ("jpeg", "tiff_jpeg") else 1.0
    bits = tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,))
    samples = _number(tags.get(TiffImagePlugin.SAMPLESPERPIXEL, len(bits)), 1)
    per_pixel = max(len(bits), samples) * max(1.0, float(max(bits)) / 8)
    return float(parts * width * height) * per_pixel * scans * _TIFF


def _scans_per_part(tags: TiffImagePlugin.ImageFileDirectory_v2, data: bytes, parts: int) -> float:
    """On average; parts that may share their bytes may all have every scan in the file. Other pages don't count."""
    mark = bytes([0xFF, _SOS])
    offsets = tags.get(TiffImagePlugin.STRIPOFFSETS, ()) + tags.get(TiffImagePlugin.TILEOFFSETS, ())
    sizes = tags.get(TiffImagePlugin.STRIPBYTECOUNTS, ()) + tags.get(TiffImagePlugin.TILEBYTECOUNTS, ())
    if not _are_apart(offsets, sizes):
        return max(1.0, data.count(mark))
    own = sum(data.count(mark, offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))
    return max(1.0, own / parts)


def _are_apart(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> bool:
    """Whether the parts of a TIFF are known to share no byte."""
    if not len(offsets) == len(sizes) <= MAX_PARTS or min(sizes, default=0) <= 0:
        return False
    parts = sorted(zip(offsets, sizes, strict=True))
    return all(offset + size <= following for (offset, size), (following, _) in itertools.pairwise(parts))


def _number(value: object, otherwise: int) -> int:
    return value if isinstance(value, int) else otherwise


def _tags(directory: TiffImagePlugin.ImageFileDirectory_v2, data: bytes) -> list[int]:
    """Every tag in the file's first directory, as often as it is there."""
    order = ">" if data.startswith(b"M") else "<"
    count, entry = ("Q", 20) if data[2:4] in (b"+\0", b"\0+") else ("H", 12)
    (entries,) = struct.unpack_from(order + count, data, directory.offset)
    start = directory.offset + struct.calcsize(count)
    return [struct.unpack_from(order + "H", data, start + entry * number)[0] for number in range(entries)]
