"""From a picture file's hostile bytes to an upright RGB image; resizing to the network's input is geometry's work."""

from __future__ import annotations

import binascii
import io
import re
import warnings
from dataclasses import dataclass

import numpy as np
import pybase64
from PIL import BmpImagePlugin, Image, ImageCms, UnidentifiedImageError
from PIL.ExifTags import Base

from service.errors import MAX_ECHO, ServiceError, TooManyPixels, UndecodablePicture
from service.imaging.price import RUN_LENGTH, decode_seconds, tile_size

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")

# Pillow walks a file's parts in Python. The longest honest walk is a run-length BMP's, of two bytes a step.
MAX_READS = 1_000_000
# Pillow joins a JPEG's EXIF segments, and copies all that came before for each.
MAX_EXIF_SEGMENTS = 100
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


class _File(io.BytesIO):
    """A picture's file for Pillow, which may read it in `MAX_READS` pieces."""

    left = MAX_READS

    def read(self, size: int | None = -1, /) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise UndecodablePicture(f"The picture's file has more than {MAX_READS} parts.")
        return super().read(size)


@dataclass(frozen=True, eq=False)
class Opened:
    """A picture's file of which the headers were read. `seconds`: what decoding it takes one core, estimated."""

    image: Image.Image
    seconds: float

    def decode(self) -> Image.Image:
        """The first frame as an upright 8-bit RGB image, alpha over white.

        Raises UndecodablePicture for what cannot be read to its end.
        """
        image = self.image
        try:
            image.load()
            rgb = _to_rgb(image)
        except ServiceError:
            raise
        except Exception as error:
            raise _damaged(image, error) from error
        orientation = _UPRIGHT.get(_orientation(image))
        return rgb if orientation is None else rgb.transpose(orientation)


def open_picture(data: bytes, max_pixels: int) -> Opened:
    """Read the headers of a JPEG, PNG, WebP, GIF, BMP or TIFF file.

    Raises TooManyPixels where they declare more than `max_pixels`, and UndecodablePicture for any other file.
    """
    image = _open(data, max_pixels)
    try:
        _check_pixels("picture", image.size, max_pixels)
        _check_pixels("picture's first tile", tile_size(image, data), max_pixels)
        if isinstance(image, BmpImagePlugin.BmpImageFile) and image.info.get("compression") in RUN_LENGTH:
            _check_pixels("run-length coded picture", image.size, MAX_RUN_LENGTH_PIXELS)
        return Opened(image, decode_seconds(image, data))
    except ServiceError:
        raise
    except Exception as error:
        raise _damaged(image, error) from error


def _damaged(image: Image.Image, error: Exception) -> UndecodablePicture:
    return UndecodablePicture(f"The {image.format} file is damaged or cut short: {str(error)[:MAX_ECHO]}.")


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
    _check_exif(data)
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


def _check_exif(data: bytes) -> None:
    """Raise UndecodablePicture for a JPEG of so many EXIF segments that Pillow takes minutes to join them."""
    if data.startswith(b"\xff\xd8") and (found := data.count(b"Exif\0\0")) > MAX_EXIF_SEGMENTS:
        raise UndecodablePicture(f"The JPEG file has {found} EXIF segments; at most {MAX_EXIF_SEGMENTS} are read.")


def _check_pixels(what: str, size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        detail = f"The {what} has {width} x {height} = {width * height} pixels; the limit is {max_pixels}."
        raise TooManyPixels(detail)


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
