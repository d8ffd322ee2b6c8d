"""From a picture file's hostile bytes to an upright RGB image; resizing to the network's input is geometry's work."""

from __future__ import annotations

import binascii
import io
import re
import struct
import warnings

import numpy as np
import pybase64
from PIL import BmpImagePlugin, Image, ImageCms, TiffImagePlugin, UnidentifiedImageError
from PIL.ExifTags import Base

from service.errors import MAX_ECHO, ServiceError, TooManyPixels, UndecodablePicture

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")

# Pillow walks a file's parts in Python. The longest honest walk is a run-length BMP's, of two bytes a step.
MAX_READS = 1_000_000
# Each scan of a progressive JPEG passes over the whole picture, and each EXIF segment copies those before it.
MAX_SCANS = MAX_EXIF_SEGMENTS = 100
# Pillow reads run-length BMPs in Python, a pixel at a time.
MAX_RUN_LENGTH_PIXELS = 4_000_000
# What Pillow finds odd in a client's file is no news to the server's log.
warnings.filterwarnings("ignore", module=r"PIL\.")

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_URL = re.compile(r"\s*[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_WHITESPACE = b" \t\r\n\f\v"
_RUN_LENGTH = (BmpImagePlugin.BmpImageFile.COMPRESSIONS["RLE8"], BmpImagePlugin.BmpImageFile.COMPRESSIONS["RLE4"])
_TILE_TAGS = (TiffImagePlugin.TILEWIDTH, TiffImagePlugin.TILELENGTH)


class _File(io.BytesIO):
    """A picture's file for Pillow, which may read it in `MAX_READS` pieces."""

    left = MAX_READS

    def read(self, size: int | None = -1, /) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise UndecodablePicture(f"The picture's file has more than {MAX_READS} parts.")
        return super().read(size)


def decode(data: bytes, max_pixels: int) -> Image.Image:
    """The first frame of a JPEG, PNG, WebP, GIF, BMP or TIFF file as an upright 8-bit RGB image, alpha over white.

    Raises TooManyPixels where the header declares more than `max_pixels`, before a pixel is decoded, and
    UndecodablePicture for anything else that cannot be read to its end.
    """
    image = _open(data, max_pixels)
    try:
        _check_pixels("picture", image.size, max_pixels)
        _check_pixels("picture's first tile", _tile(image, data), max_pixels)
        if isinstance(image, BmpImagePlugin.BmpImageFile) and image.info.get("compression") in _RUN_LENGTH:
            _check_pixels("run-length coded picture", image.size, MAX_RUN_LENGTH_PIXELS)
        image.load()
        rgb = _to_rgb(image)
    except ServiceError:
        raise
    except Exception as error:
        raise UndecodablePicture(
            f"The {image.format} file is damaged or cut short: {str(error)[:MAX_ECHO]}."
        ) from error
    orientation = _UPRIGHT.get(_orientation(image))
    return rgb if orientation is None else rgb.transpose(orientation)


def decode_base64(text: str) -> bytes:
    """The bytes behind base64 (standard alphabet, whitespace allowed) or a `data:...;base64,` URI.

    Raises UndecodablePicture that says what would be right.
    """
    if _URL.match(text):
        raise UndecodablePicture("Pictures are not fetched by URL; send the file's bytes in base64 or as a data: URI.")
    if text[:5].lower() == "data:":
        head, comma, text = text.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise UndecodablePicture("A data: URI of a picture must be data:image/...;base64, followed by base64.")
    try:
        code = text.encode("ascii")
        if any(space in code for space in _WHITESPACE):
            code = code.translate(None, _WHITESPACE)
        # A file of 219 kB takes 0.01 ms, with the standard library 0.65 ms, in which no other thread runs Python.
        return pybase64.b64decode(code, validate=True)
    except (UnicodeEncodeError, binascii.Error) as error:
        raise UndecodablePicture(
            "The text is no base64: it must be the picture file's bytes in the standard alphabet (A-Z a-z 0-9 + /) "
            "with = padding, or a data:image/...;base64, URI."
        ) from error


def _open(data: bytes, max_pixels: int) -> Image.Image:
    if not data:
        raise UndecodablePicture("The picture is empty: 0 bytes.")
    _check_jpeg(data)
    # Some plugins reserve memory for a frame while they open a file; Pillow checks it against twice this number.
    Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        return Image.open(_File(data), formats=FORMATS)
    except UndecodablePicture:
        raise
    except Image.DecompressionBombError as error:
        pixels = next(iter(re.findall(r"\d+", str(error))), "too many")
        raise TooManyPixels(f"The picture has {pixels} pixels; the limit is {max_pixels}.") from error
    except UnidentifiedImageError as error:
        raise UndecodablePicture(
            "The bytes are no JPEG, PNG, WebP, GIF, BMP or TIFF file, or its header is damaged."
        ) from error
    except Exception as error:
        raise UndecodablePicture(f"The picture's header is damaged: {str(error)[:MAX_ECHO]}.") from error


def _check_jpeg(data: bytes) -> None:
    """Raise UndecodablePicture for a JPEG that is made to cost minutes. libtiff has such a limit of its own."""
    if not data.startswith(b"\xff\xd8"):
        return
    limits = {"scans": (b"\xff\xda\x00", MAX_SCANS), "EXIF segments": (b"Exif\0\0", MAX_EXIF_SEGMENTS)}
    for what, (mark, limit) in limits.items():
        if (found := data.count(mark)) > limit:
            raise UndecodablePicture(f"The JPEG file has {found} {what}; at most {limit} are read.")


def _check_pixels(what: str, size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        detail = f"The {what} has {width} x {height} = {width * height} pixels; the limit is {max_pixels}."
        raise TooManyPixels(detail)


def _tile(image: Image.Image, data: bytes) -> tuple[int, int]:
    """Width and height of a TIFF's tiles: one is decoded whole, however small the picture in it.

    libtiff reads the file anew, and knows types of numbers that Pillow passes over: what they may see differently is
    refused.
    """
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return 0, 0
    given = [tag for tag in _tags(image.tag_v2, data) if tag in _TILE_TAGS]
    if not given:
        return 0, 0
    width, height = (image.tag_v2.get(tag) for tag in _TILE_TAGS)
    if len(given) == len(_TILE_TAGS) and isinstance(width, int) and isinstance(height, int):
        return width, height
    raise UndecodablePicture("The TIFF file's tiles need one whole number for their width and one for their height.")


def _tags(directory: TiffImagePlugin.ImageFileDirectory_v2, data: bytes) -> list[int]:
    """Every tag in the file's first directory, as often as it is there."""
    order = ">" if data.startswith(b"M") else "<"
    count, entry = ("Q", 20) if data[2:4] in (b"+\0", b"\0+") else ("H", 12)
    (entries,) = struct.unpack_from(order + count, data, directory.offset)
    start = directory.offset + struct.calcsize(count)
    return [struct.unpack_from(order + "H", data, start + entry * number)[0] for number in range(entries)]


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 where a damaged block hides it. Of a TIFF it is 1: Pillow has turned it while loading."""
    try:
        return int(image.getexif().get(Base.Orientation, 1))
    except Exception:
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise UndecodablePicture("The picture has floating-point pixels; send 8-bit or 16-bit ones.")
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _from_16_bit(image)
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.buildTransform(lab, srgb, "LAB", "RGB").apply(image)
    if image.has_transparency_data:
        return _over_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Gray 0..65535 as 0..255, rounded; the one gray that a PNG may declare transparent as white."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise UndecodablePicture("The picture has gray values outside 0..65535; send 8-bit or 16-bit ones.")
    gray = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if "transparency" in image.info:
        gray[values == image.info["transparency"]] = 255
    return Image.fromarray(gray).convert("RGB")


def _over_white(image: Image.Image) -> Image.Image:
    if image.mode == "La":
        image = image.convert("LA")
    rgba = image.convert("RGBA")
    white = Image.new("RGB", rgba.size, "white")
    white.paste(rgba, mask=rgba.getchannel("A"))
    return white
