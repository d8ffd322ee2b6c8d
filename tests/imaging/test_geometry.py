from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

from service.imaging.geometry import Fit, FitMode, Geometry, Interpolation, fit_picture, place
from service.imaging.maps import resample

DATA = Path(__file__).parents[1] / "data"
MEAN = (0.485, 0.456, 0.406)
RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def a_fit(fit: FitMode, size: tuple[int, int], resize: int = 256, interpolation: Interpolation = "bilinear") -> Fit:
    return Fit(size, fit, resize, interpolation, MEAN)


def noise(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def whole_then_crop(image: Image.Image, fit: Fit) -> NDArray[np.uint8]:
    """The definition, written out: the shorter side to `resize`, horizontally first, then the centre.

    Pillow 13 takes the vertical pass first where it shrinks a tall picture, which clips bicubic's overshoot elsewhere.
    """
    width, height = image.size
    if width <= height:
        new_width, new_height = fit.resize, int(fit.resize * height / width)
    else:
        new_width, new_height = int(fit.resize * width / height), fit.resize
    wide = image.resize((new_width, height), RESAMPLING[fit.interpolation])
    whole = np.asarray(wide.resize((new_width, new_height), RESAMPLING[fit.interpolation]))
    rows, columns = fit.size
    top, left = round((new_height - rows) / 2.0), round((new_width - columns) / 2.0)
    return whole[top : top + rows, left : left + columns]


def assert_near(one: NDArray[Any], other: NDArray[Any]) -> None:
    """Within the ties that Pillow's 32-bit box rounds the other way: a level in each of the two passes."""
    assert one.shape == other.shape
    difference = np.abs(one.astype(int) - other.astype(int))
    assert difference.max() <= 2
    assert difference.mean() < 0.5


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    "size", [(451, 300), (301, 200), (100, 37), (37, 100), (1, 1), (1000, 3), (256, 256), (640, 256), (257, 499)]
)
def test_crop_is_torchvisions_resize_and_centre_crop(size: tuple[int, int], interpolation: Interpolation) -> None:
    image, fit = noise(*size), a_fit("crop", (224, 224), 256, interpolation)
    expected = tv.center_crop(tv.resize(image, [256], InterpolationMode(interpolation)), [224, 224])
    assert_near(fit_picture(image, fit), np.asarray(expected))


@given(
    width=st.integers(1, 150),
    height=st.integers(1, 150),
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    margin=st.integers(0, 20),
    interpolation=st.sampled_from(("bilinear", "bicubic")),
)
@settings(max_examples=150, deadline=None)
def test_crop_equals_resizing_the_whole(
    width: int, height: int, rows: int, columns: int, margin: int, interpolation: Interpolation
) -> None:
    fit = a_fit("crop", (rows, columns), max(rows, columns) + margin, interpolation)
    image = noise(width, height)
    assert_near(fit_picture(image, fit), whole_then_crop(image, fit))


@pytest.mark.parametrize("name", ["chelsea.png", "coffee.png"])
def test_crop_of_a_photograph(name: str) -> None:
    with Image.open(DATA / name) as image:
        fit = a_fit("crop", (224, 224), 256, "bicubic")
        seen, expected = fit_picture(image, fit), whole_then_crop(image, fit)
    assert np.abs(seen.astype(int) - expected).max() <= 1
    assert (seen != expected).mean() < 0.01


@pytest.mark.parametrize("size", [(1, 10_000), (10_000, 1), (1, 3_000_000), (3_000_000, 1)])
def test_crop_of_a_long_picture_takes_little_memory(size: tuple[int, int]) -> None:
    """The first one is 256 x 2,560,000 pixels, 2.6 GB, once its shorter side is fitted."""
    line = np.random.default_rng(1).integers(0, 256, max(size), dtype=np.uint8)
    flat = size[0] > size[1]
    image = Image.fromarray(line[None] if flat else line[:, None]).convert("RGB")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seen = fit_picture(image, a_fit("crop", (224, 224), 256))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * (1 if sys.platform == "darwin" else 1024) < 100 * 2**20

    # Upscaling bilinearly is linear interpolation between the centres of pixels.
    places = (np.arange(224) + (256 * max(size) - 224) // 2 + 0.5) / 256
    expected = np.interp(places, np.arange(max(size)) + 0.5, line)
    along = seen[0, :, 0] if flat else seen[:, 0, 0]
    assert np.abs(along - expected).max() <= 1


@pytest.mark.parametrize("fit", ["stretch", "letterbox"])
def test_a_very_long_picture_shrinks(fit: FitMode) -> None:
    image = Image.new("RGB", (1, 2_000_000))
    image.paste("white", (0, 1_000_000, 1, 2_000_000))
    middle = fit_picture(image, a_fit(fit, (100, 11)))[:, 5, 0]
    assert middle[:49].tolist() == [0] * 49
    assert middle[51:].tolist() == [255] * 49


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_stretch_is_one_resize(interpolation: Interpolation) -> None:
    image = noise(123, 77)
    expected = np.asarray(image.resize((60, 90), RESAMPLING[interpolation]))
    seen = fit_picture(image, a_fit("stretch", (90, 60), interpolation=interpolation))
    np.testing.assert_array_equal(seen, expected)


def test_letterbox_centres_the_picture_between_bars_of_the_mean() -> None:
    image = noise(200, 100)
    seen = fit_picture(image, a_fit("letterbox", (100, 101)))
    # 200 x 100 to 101 x 50 (50.5 rounds to even), 25 rows above and below
    np.testing.assert_array_equal(seen[25:75], np.asarray(image.resize((101, 50), Image.Resampling.BILINEAR)))
    assert (seen[:25] == (124, 116, 104)).all()
    assert (seen[75:] == (124, 116, 104)).all()


def test_letterbox_shows_at_least_a_line() -> None:
    assert (fit_picture(Image.new("RGB", (10_000, 1), "red"), a_fit("letterbox", (9, 9)))[4] == (255, 0, 0)).all()


def test_the_input_can_be_written_to() -> None:
    for fit in ("crop", "stretch", "letterbox"):
        assert fit_picture(noise(9, 9), a_fit(fit, (5, 5), 6)).flags.writeable


def test_places_by_hand() -> None:
    # crop: 400 x 200 to 512 x 256; 224 of it begin at 144 and 16; a resized pixel is 0.78125 of the picture's
    assert place(400, 200, a_fit("crop", (224, 224))) == Geometry(400, 200, (112.5, 12.5, 287.5, 187.5), (224, 224))
    assert place(400, 200, a_fit("stretch", (50, 60))) == Geometry(400, 200, (0, 0, 400, 200), (50, 60))
    # letterbox: 100 x 50, 25 rows of bars above and below, a pixel is 4 of the picture's
    assert place(400, 200, a_fit("letterbox", (100, 100))) == Geometry(400, 200, (0, -100, 400, 300), (100, 100))


@pytest.mark.parametrize("fit", ["crop", "stretch", "letterbox"])
@pytest.mark.parametrize("size", [(300, 200), (200, 301), (50, 60), (451, 300)])
def test_what_the_network_saw_lands_where_it_was(fit: FitMode, size: tuple[int, int]) -> None:
    """A spot in the picture, taken as the map of the network's input, comes back to the spot."""
    width, height = size
    x, y = width * 0.55, height * 0.42
    columns, rows = np.arange(width) + 0.5, np.arange(height)[:, None] + 0.5
    spot = 255 * np.exp(-(((columns - x) / width) ** 2 + ((rows - y) / height) ** 2) / (2 * 0.03**2))
    how = Fit((112, 96), fit, 128, "bilinear", (0.0, 0.0, 0.0))
    seen = fit_picture(Image.fromarray(np.rint(spot).astype(np.uint8)).convert("RGB"), how)
    back, _ = resample(seen[..., 0].astype(np.float32), place(width, height, how), "original")
    assert back.shape == (height, width)
    assert (back * columns).sum() / back.sum() == pytest.approx(x, abs=0.005 * width)
    assert (back * rows).sum() / back.sum() == pytest.approx(y, abs=0.005 * height)
    assert back.sum() == pytest.approx(spot.sum(), rel=0.05)
