from __future__ import annotations

import base64
import io
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from service.errors import TooManyPixels, UndecodablePicture
from service.imaging.decode import decode_base64, open_picture

LIMIT = 1_000_000
CHELSEA = Path(__file__).parents[1] / "data" / "chelsea.png"
RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)


def decode(data: bytes, max_pixels: int) -> Image.Image:
    return open_picture(data, max_pixels).decode()


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(data: bytes) -> NDArray[np.uint8]:
    image = decode(data, LIMIT)
    assert image.mode == "RGB"
    return np.asarray(image)


def png(width: int, height: int, depth: int, colour: int, *chunks: tuple[bytes, bytes], data: bytes = b"") -> bytes:
    """A hand-made PNG: whatever its header says, whatever its data are."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    crc = (
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(crc)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("PNG", {}), ("BMP", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("WEBP", {"lossless": True})],
)
def test_lossless_formats_come_back_exactly(kind: str, options: dict[str, Any]) -> None:
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(NOISE), kind, **options)), NOISE)


@pytest.mark.parametrize(("kind", "tolerance"), [("JPEG", 3), ("WEBP", 6), ("GIF", 0)])
def test_lossy_formats_come_back_nearly(kind: str, tolerance: int) -> None:
    plain = Image.new("RGB", (16, 8), (200, 100, 50))
    assert np.abs(pixels(encoded(plain, kind)).astype(int) - np.asarray(plain)).max() <= tolerance


def test_a_photograph() -> None:
    with Image.open(CHELSEA) as expected:
        np.testing.assert_array_equal(pixels(CHELSEA.read_bytes()), np.asarray(expected))


@pytest.mark.parametrize("kind", ["PPM", "ICO", "TGA", "EPS", "PDF"])
def test_other_formats_are_refused(kind: str) -> None:
    with pytest.raises(UndecodablePicture, match="no JPEG, PNG, WebP, GIF, BMP or TIFF"):
        decode(encoded(Image.new("RGB", (16, 16)), kind), LIMIT)


# EXIF says of an orientation on which side of the upright picture the stored first row and first column are.
SIDES = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}
OPPOSITE = {"top": "bottom", "bottom": "top", "left": "right", "right": "left"}


def corner(image: NDArray[np.uint8], *sides: str) -> tuple[int, ...]:
    return tuple(image[-1 if "bottom" in sides else 0, -1 if "right" in sides else 0].tolist())


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", SIDES)
def test_exif_orientation_puts_marked_corners_where_it_says(kind: str, orientation: int) -> None:
    stored = Image.new("RGB", (6, 4), "white")
    stored.putpixel((0, 0), (255, 0, 0))
    stored.putpixel((5, 0), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    upright = pixels(encoded(stored, kind, exif=exif, **options))
    row, column = SIDES[orientation]
    assert upright.shape == ((4, 6, 3) if orientation < 5 else (6, 4, 3))
    assert corner(upright, row, column) == (255, 0, 0)
    assert corner(upright, row, OPPOSITE[column]) == (0, 0, 255)


def test_a_jpeg_is_turned() -> None:
    stored = Image.new("RGB", (32, 16), "black")
    stored.paste("red", (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = decode(encoded(stored, "JPEG", exif=exif, quality=95, subsampling=0), LIMIT)
    assert upright.size == (16, 32)
    assert upright.getpixel((8, 4))[0] > 240  # type: ignore[index]
    assert upright.getpixel((8, 28))[0] < 15  # type: ignore[index]


# pytest's filter of warnings replaces the one that decode has installed.
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize(
    "block",
    [
        b"junk",
        b"MM\0*\0\0\0\x08\xff\xff",
        b"II*\0\xff\xff\xff\xff",
        b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\xff\xff\0\0\0\0",
    ],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_corrupt_exif_block_does_not_fail_the_picture(kind: str, block: bytes) -> None:
    assert decode(encoded(Image.fromarray(NOISE), kind, exif=b"Exif\0\0" + block), LIMIT).size == (30, 20)


def test_alpha_lies_over_white() -> None:
    rgba = np.array([[[0, 0, 0, 255], [0, 0, 0, 0], [0, 0, 0, 128], [200, 100, 0, 51]]], np.uint8)
    # 0.2 x colour + 0.8 x 255 in the last one
    expected = [[0, 0, 0], [255, 255, 255], [127, 127, 127], [244, 224, 204]]
    assert pixels(encoded(Image.fromarray(rgba), "PNG"))[0].tolist() == expected
    assert pixels(encoded(Image.fromarray(rgba), "WEBP", lossless=True, exact=True))[0].tolist() == expected


def test_gray_with_alpha_lies_over_white() -> None:
    la = np.array([[[0, 255], [0, 0], [0, 128], [100, 51]]], np.uint8)
    for kind in ("PNG", "TIFF"):
        assert pixels(encoded(Image.fromarray(la, "LA"), kind))[0, :, 0].tolist() == [0, 255, 127, 224]


def test_premultiplied_alpha_of_a_tiff_lies_over_white() -> None:
    la = np.array([[[0, 255], [0, 0], [20, 51]]], np.uint8)
    data = encoded(Image.fromarray(la, "LA"), "TIFF")
    extra_samples = struct.pack("<HHIHH", 338, 3, 1, 2, 0)
    associated = struct.pack("<HHIHH", 338, 3, 1, 1, 0)
    assert data.count(extra_samples) == 1
    assert pixels(data.replace(extra_samples, associated))[0, :, 0].tolist() == [0, 255, 224]


def test_palette_with_alpha_lies_over_white() -> None:
    palette = Image.new("P", (3, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    palette.putdata([0, 1, 2])
    expected = [[255, 0, 0], [255, 255, 255], [127, 127, 255]]
    assert pixels(encoded(palette, "PNG", transparency=bytes([255, 0, 128])))[0].tolist() == expected
    assert pixels(encoded(palette, "GIF", transparency=1))[0].tolist() == [[255, 0, 0], [255, 255, 255], [0, 0, 255]]


def test_a_palette_whose_alpha_is_a_band_of_its_own_lies_over_white() -> None:
    image = Image.new("PA", (2, 1))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putdata([(0, 255), (1, 0)])
    assert pixels(encoded(image, "TIFF"))[0].tolist() == [[255, 0, 0], [255, 255, 255]]


def test_a_transparent_colour_becomes_white() -> None:
    rgb = np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)
    assert pixels(encoded(Image.fromarray(rgb), "PNG", transparency=(1, 2, 3)))[0].tolist() == [[255] * 3, [4, 5, 6]]
    gray = np.array([[7, 8]], np.uint8)
    assert pixels(encoded(Image.fromarray(gray), "PNG", transparency=7))[0, :, 0].tolist() == [255, 8]
    wide = png(2, 1, 16, 0, (b"tRNS", struct.pack(">H", 300)), data=b"\0" + struct.pack(">HH", 300, 65535 // 2))
    assert pixels(wide)[0, :, 0].tolist() == [255, 127]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_gray_is_scaled_and_rounded(kind: str, order: str) -> None:
    values = np.concatenate([[0, 128, 129, 257, 65535, 65406, 65407], RNG.integers(0, 65536, 500)]).astype(np.uint16)
    image = Image.fromarray(values[None].astype(f"{order}u2"))
    expected = np.rint(values * (255 / 65535))
    np.testing.assert_array_equal(pixels(encoded(image, kind))[0], np.repeat(expected[:, None], 3, axis=1))


def test_whole_numbers_of_32_bits_count_as_16() -> None:
    values = np.array([[0, 257, 65535]], np.int32)
    assert pixels(encoded(Image.fromarray(values), "TIFF"))[0, :, 0].tolist() == [0, 1, 255]
    for wrong in (-1, 65536):
        with pytest.raises(UndecodablePicture, match=r"outside 0\.\.65535"):
            decode(encoded(Image.fromarray(values * 0 + wrong), "TIFF"), LIMIT)


def test_16_bit_colours_are_scaled_within_a_level() -> None:
    values = RNG.integers(0, 65536, (1, 50, 3), dtype=np.uint16)
    data = b"\0" + values.astype(">u2").tobytes()
    assert np.abs(pixels(png(50, 1, 16, 2, data=data)) - values * (255 / 65535)).max() <= 1


def test_one_bit_pixels() -> None:
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 1)
    for kind in ("PNG", "BMP", "TIFF"):
        assert pixels(encoded(image, kind))[0].tolist() == [[0] * 3, [255] * 3]


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk(kind: str) -> None:
    cyan, key = 100, 50
    data = encoded(Image.new("CMYK", (16, 16), (cyan, 0, 0, key)), kind)
    assert (b"Adobe" in data) == (kind == "JPEG"), "Adobe's JPEG holds the inks inverted"
    expected = [(255 - cyan) * (255 - key) / 255, 255 - key, 255 - key]
    assert np.abs(pixels(data) - np.array(expected)).max() <= 3


def test_ycbcr() -> None:
    # BT.601 by hand: (Y, Cb, Cr) = (76, 85, 255) is red, (128, 128, 128) is gray.
    image = Image.new("YCbCr", (2, 1), (128, 128, 128))
    image.putpixel((0, 0), (76, 85, 255))
    assert np.abs(pixels(encoded(image, "TIFF"))[0] - np.array([[254, 0, 0], [128, 128, 128]])).max() <= 1


def test_lab() -> None:
    # sRGB's red in CIELAB under D50 is about (54.3, 80.8, 69.9); L is stored as 0..255.
    image = Image.new("LAB", (3, 1), (0, 128, 128))
    image.putpixel((1, 0), (255, 128, 128))
    image.putpixel((2, 0), (round(54.3 * 2.55), 128 + 81, 128 + 70))
    expected = [[0, 0, 0], [255, 255, 255], [255, 0, 0]]
    assert np.abs(pixels(encoded(image, "TIFF"))[0] - np.array(expected)).max() <= 6


def test_floating_point_pixels_are_refused() -> None:
    with pytest.raises(UndecodablePicture, match="floating-point"):
        decode(encoded(Image.new("F", (4, 4), 0.5), "TIFF"), LIMIT)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_several_counts(kind: str) -> None:
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(first, kind, save_all=True, append_images=[second], **options)
    assert pixels(data)[4, 4].tolist() == [255, 0, 0]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 0.9])
def test_a_file_that_was_cut_short_is_refused(kind: str, share: float) -> None:
    data = encoded(Image.fromarray(NOISE), kind)
    with pytest.raises(UndecodablePicture, match="damaged"):
        decode(data[: int(len(data) * share)], LIMIT)


@pytest.mark.parametrize("data", [b"\0", b"GIF89a", b"\xff\xd8\xff", b"<svg/>", b"x" * 10_000])
def test_what_is_no_picture_is_refused(data: bytes) -> None:
    with pytest.raises(UndecodablePicture, match="damaged"):
        decode(data, LIMIT)


def test_no_bytes_are_refused() -> None:
    with pytest.raises(UndecodablePicture, match="empty"):
        decode(b"", LIMIT)


def test_noise_in_a_file_never_raises_anything_else() -> None:
    kinds = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
    for kind in kinds:
        good = np.frombuffer(encoded(Image.fromarray(NOISE), kind), np.uint8)
        for _ in range(40):
            bad = good.copy()
            bad[RNG.integers(0, len(bad), 4)] = RNG.integers(0, 256, 4)
            try:
                decode(bad.tobytes(), LIMIT)
            except (UndecodablePicture, TooManyPixels):
                continue


def test_a_bomb_is_refused_by_its_header() -> None:
    with pytest.raises(TooManyPixels) as caught:
        decode(png(50_000, 50_000, 8, 2), 50_000_000)
    assert caught.value.detail == "The picture has 2500000000 pixels; the limit is 50000000."


def test_a_gif_whose_frame_is_larger_than_its_header_is_refused() -> None:
    screen = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    frame = b"," + struct.pack("<HHHHB", 0, 0, 60_000, 60_000, 0) + b"\x02\x02\x4c\x01\x00;"
    with pytest.raises(TooManyPixels):
        decode(screen + frame, LIMIT)


def test_the_limit_itself_is_allowed() -> None:
    data = encoded(Image.new("L", (100, 10)), "PNG")
    assert decode(data, 1000).size == (100, 10)
    with pytest.raises(TooManyPixels, match="100 x 10 = 1000 pixels; the limit is 999"):
        decode(data, 999)


@pytest.mark.parametrize("size", [(1, 1), (1, 10_000), (10_000, 1)])
def test_thin_pictures(size: tuple[int, int]) -> None:
    assert decode(encoded(Image.new("L", size, 77), "PNG"), LIMIT).size == size


def test_threads_decode_as_one_does() -> None:
    files = [
        encoded(Image.fromarray(np.roll(NOISE, step, axis=0)), kind)
        for step in range(8)
        for kind in ("JPEG", "PNG", "TIFF")
    ]
    serial = [pixels(data) for data in files]
    with ThreadPoolExecutor(8) as pool:
        for one, other in zip(serial, pool.map(pixels, files), strict=True):
            np.testing.assert_array_equal(one, other)


def test_base64_and_data_uris() -> None:
    data = bytes(range(256))
    text = base64.b64encode(data).decode()
    wrapped = base64.encodebytes(data).decode().replace("\n", "\r\n")
    spaced = "\f".join(text[start : start + 5] for start in range(0, len(text), 5)) + "\v"
    for written in (
        text,
        wrapped,
        spaced,
        f"\n{text}\t",
        f"data:image/png;base64,{text}",
        f"DATA:;x=y;BASE64,{wrapped}",
    ):
        assert decode_base64(written) == data


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        ("https://example.org/cat.png", "not fetched by URL"),
        (" HTTP://x", "not fetched by URL"),
        ("file:///etc/passwd", "not fetched by URL"),
        ("data:image/png,abc", ";base64,"),
        ("data:image/png;base64", ";base64,"),
        ("YWJ", "padding"),
        ("YWJj=YWJj", "standard alphabet"),
        ("YWJj=", "padding"),
        ("YQ", "padding"),
        ("Y", "padding"),
        ("-_-_", "standard alphabet"),
        ("YWJ\u00e9", "standard alphabet"),
        ("data:image/png;base64,???", "standard alphabet"),
    ],
)
def test_what_is_no_base64_says_what_would_be_right(text: str, detail: str) -> None:
    with pytest.raises(UndecodablePicture, match=detail):
        decode_base64(text)
