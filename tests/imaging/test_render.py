from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from service.errors import InvalidRequest
from service.imaging.colormaps import colour_table
from service.imaging.geometry import Fit, Geometry, fit_picture, place
from service.imaging.maps import Floats, Scaling, resample, scale
from service.imaging.render import Rendered, Style, render

CHELSEA = Path(__file__).parents[1] / "data" / "chelsea.png"
FLAT = Geometry(4, 1, (0.0, 0.0, 4.0, 1.0), (1, 4))
# Shows columns 1 and 2 of four.
CROP = Geometry(4, 1, (1.0, 0.0, 3.0, 1.0), (1, 2))
PICTURE = np.array([[[0, 10, 20], [30, 40, 50], [101, 111, 121], [200, 210, 220]]], np.uint8)
HOT = colour_table("hot")
RAMP = np.array([[-1, 0, 2, 4]], np.float32)


def read(rendered: Rendered) -> NDArray[Any]:
    if rendered.media_type == "application/x-npy":
        array: NDArray[Any] = np.load(io.BytesIO(rendered.data), allow_pickle=False)
    else:
        image = Image.open(io.BytesIO(rendered.data))
        assert Image.MIME[str(image.format)] == rendered.media_type
        array = np.asarray(image)
    assert array.shape[:2] == (rendered.height, rendered.width)
    return array


def shown(
    raw: Floats, scaling: Scaling | None = "scale_after_relu", geometry: Geometry = FLAT, **style: Any
) -> NDArray[Any]:
    return read(render(raw, geometry, PICTURE, scaling, Style(colormap="hot", **style)))


def test_gray_and_gray16_by_hand() -> None:
    assert shown(RAMP, format="gray").tolist() == [[0, 0, 128, 255]]
    gray16 = shown(RAMP, format="gray16")
    assert gray16.dtype == np.uint16
    assert gray16.tolist() == [[0, 0, 32768, 65535]]


@pytest.mark.parametrize(
    ("scaling", "npy", "gray"),
    [
        ("scale_after_relu", [0, 0, 0.5, 1], [0, 0, 128, 255]),
        ("scale_before_relu", [0, 0, 0.5, 1], [0, 0, 128, 255]),
        ("none", [-1, 0, 2, 4], [0, 0, 128, 255]),
    ],
)
def test_npy_is_the_scaled_map(scaling: Scaling, npy: list[float], gray: list[int]) -> None:
    values = shown(RAMP, scaling, format="npy")
    assert values.dtype == np.float32
    assert values.tolist() == [npy]
    assert shown(RAMP, scaling, format="gray").tolist() == [gray]


def test_an_overlay_by_hand() -> None:
    for alpha in (0.0, 0.3, 0.5, 1.0):
        expected = alpha * HOT[[0, 0, 128, 255]] + (1 - alpha) * PICTURE[0]
        assert np.abs(shown(RAMP, alpha=alpha)[0] - expected).max() <= 0.5 + 1e-4


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.3, 0.5, 0.77, 1.0])
def test_every_colour_over_every_value_is_the_formula_rounded(alpha: float) -> None:
    levels, values = np.meshgrid(np.arange(256), np.arange(256))
    picture = np.repeat(values.astype(np.uint8)[..., None], 3, axis=2)
    geometry = Geometry(256, 256, (0.0, 0.0, 256.0, 256.0), (256, 256))
    style = Style(colormap="turbo", alpha=alpha)
    answer = read(render(levels.astype(np.float32), geometry, picture, "none", style))
    formula = alpha * colour_table("turbo")[levels].astype(np.float64) + (1 - alpha) * values[..., None]
    # float32 leaves a value that lies between two levels to either of them.
    decided = np.abs(formula % 1 - 0.5) > 1e-4
    np.testing.assert_array_equal(answer[decided], np.rint(formula)[decided])
    assert np.abs(answer - formula).max() <= 0.5 + 1e-4


def test_an_image_is_as_good_as_its_pixels_and_is_read_only_where_it_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.fromarray(PICTURE)
    raw = np.array([[1, 2]], np.float32)
    for style in (Style(), Style("heatmap", "jpeg"), Style(alpha=0.2, encoding="webp")):
        one, other = (render(raw, CROP, under, "scale_after_relu", style) for under in (image, PICTURE))
        assert one == other

    def unwanted(*_: object) -> bytes:
        raise AssertionError("the picture's pixels were copied")

    monkeypatch.setattr(image, "tobytes", unwanted)
    with pytest.raises(AssertionError, match="were copied"):
        render(raw, CROP, image, "scale_after_relu", Style())
    for style in (Style("npy"), Style("gray"), Style("gray16"), Style("heatmap")):
        expected = render(raw, CROP, PICTURE, "scale_after_relu", style)
        assert render(raw, CROP, image, "scale_after_relu", style) == expected


def test_an_overlay_of_many_rows_is_blended_everywhere() -> None:
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (150, 7, 3), dtype=np.uint8)
    raw = rng.random((150, 7), dtype=np.float32)
    geometry = Geometry(7, 150, (0.0, 0.0, 7.0, 150.0), (150, 7))
    answer = read(render(raw, geometry, picture, "none", Style(alpha=0.25)))
    levels = np.rint(raw / raw.max() * 255).astype(int)
    assert np.abs(answer - (0.25 * colour_table("jet")[levels] + 0.75 * picture)).max() <= 0.5 + 1e-4


def test_a_heatmap_is_colours_alone() -> None:
    expected = np.concatenate([HOT[[0, 0, 128, 255]], np.full((4, 1), 255)], axis=1)
    assert shown(RAMP, format="heatmap")[0].tolist() == expected.tolist()


def test_what_a_crop_never_showed() -> None:
    raw = np.array([[1, 2]], np.float32)
    overlay = shown(raw, geometry=CROP)[0]
    assert overlay[[0, 3]].tolist() == PICTURE[0, [0, 3]].tolist()
    assert overlay[2].tolist() == np.rint(0.5 * HOT[255] + 0.5 * PICTURE[0, 2]).tolist()
    heatmap = shown(raw, geometry=CROP, format="heatmap")[0]
    assert heatmap[:, 3].tolist() == [0, 255, 255, 0]
    assert heatmap[:3, :3].tolist() == [[0, 0, 0], HOT[128].tolist(), HOT[255].tolist()]
    assert shown(raw, geometry=CROP, format="gray").tolist() == [[0, 128, 255, 0]]
    assert shown(raw, geometry=CROP, format="npy").tolist() == [[0, 0.5, 1, 0]]


def test_a_letterboxed_map_is_seen_whole_in_the_models_size() -> None:
    fit = Fit((8, 8), "letterbox", 8, "bilinear", (0.0, 0.0, 0.0))
    picture = Image.new("RGB", (16, 8), "white")
    raw = np.arange(64, dtype=np.float32).reshape(8, 8)
    style = Style(format="heatmap", size="model")
    answer = read(render(raw, place(16, 8, fit), fit_picture(picture, fit), "scale_after_relu", style))
    assert answer.shape == (8, 8, 4)
    assert (answer[..., 3] == 255).all()
    assert answer[7, 7, :3].tolist() == [128, 0, 0]


def test_a_heatmap_in_jpeg_shows_the_picture_where_it_would_be_transparent() -> None:
    geometry = Geometry(64, 32, (32.0, 0.0, 64.0, 32.0), (8, 8))
    picture = np.full((32, 64, 3), (40, 200, 90), np.uint8)
    raw = np.full((1, 2), 1, np.float32)
    raw[0, 0] = 0.999
    answer = read(render(raw, geometry, picture, "none", Style("heatmap", "jpeg", alpha=0.1))).astype(int)
    assert np.abs(answer[:, :24] - (40, 200, 90)).max() < 8
    assert np.abs(answer[:, 40:] - (128, 0, 0)).max() < 8


@pytest.mark.parametrize("encoding", ["webp", "jpeg"])
def test_lossy_encodings_are_near_to_png(encoding: Any) -> None:
    picture = np.asarray(Image.open(CHELSEA))
    geometry = place(451, 300, Fit((224, 224), "crop", 256, "bicubic", (0.5, 0.5, 0.5)))
    raw = np.random.default_rng(0).random((7, 7), dtype=np.float32)
    exact = render(raw, geometry, picture, "scale_after_relu", Style())
    lossy = render(raw, geometry, picture, "scale_after_relu", Style(encoding=encoding))
    assert (lossy.media_type, exact.media_type) == (f"image/{encoding}", "image/png")
    assert np.abs(read(exact).astype(int) - read(lossy)).mean() < 5
    heatmap = read(render(raw, geometry, picture, "scale_after_relu", Style("heatmap", "webp")))
    assert heatmap[0, 0, 3] == 0
    assert heatmap[150, 225, 3] == 255


def test_three_channels_stay_signed_in_npy_and_are_displayed_by_magnitude() -> None:
    raw = np.array([[[1, -4, 2], [0, 0, 1], [2, 2, -1], [0, 0, 0]]], np.float32)
    np.testing.assert_array_equal(shown(raw, None, format="npy"), raw)
    assert shown(raw, None, format="gray").tolist() == [[255, 64, 128, 0]]
    assert shown(raw, None, format="heatmap")[0, 0].tolist() == [*HOT[255].tolist(), 255]


@pytest.mark.parametrize(
    ("raw", "npy"),
    [
        ([0, 0, 0, 0], [0, 0, 0, 0]),
        ([-1, -2, -1, -2], [0, 0, 0, 0]),
        ([3, 3, 3, 3], [1, 1, 1, 1]),
        ([5, np.nan, -2, 3], [5, np.nan, -2, 3]),
    ],
)
def test_a_degenerate_map_shows_no_colours(raw: list[float], npy: list[float]) -> None:
    bad = np.array([raw], np.float32)
    assert shown(bad).tolist() == PICTURE.tolist()
    assert not shown(bad, format="heatmap").any()
    assert not shown(bad, format="gray").any()
    assert not shown(bad, format="gray16").any()
    np.testing.assert_array_equal(shown(bad, format="npy"), np.array([npy], np.float32))
    assert np.abs(shown(bad, format="heatmap", encoding="jpeg").astype(int) - PICTURE).max() < 80


def test_a_map_that_cancelled_shows_no_colours_and_stays_in_npy() -> None:
    def cancelled(rounding_error: float, **style: Any) -> NDArray[Any]:
        return read(render(RAMP, FLAT, PICTURE, "none", Style(colormap="hot", **style), rounding_error))

    for format_ in ("overlay", "heatmap", "gray", "gray16"):
        plain = shown(RAMP, "none", format=format_)
        np.testing.assert_array_equal(cancelled(0.39, format=format_), plain)
        nothing = PICTURE if format_ == "overlay" else np.zeros_like(plain)
        np.testing.assert_array_equal(cancelled(0.41, format=format_), nothing)
    assert cancelled(0.41, format="npy").tolist() == RAMP.tolist()


def test_a_tiny_map_is_painted_as_its_multiple_is() -> None:
    tiny = RAMP * np.float32(1e-30)
    for format_ in ("overlay", "gray16", "npy"):
        for scaling in ("scale_after_relu", "scale_before_relu"):
            np.testing.assert_allclose(
                shown(tiny, scaling, format=format_),
                shown(RAMP, scaling, format=format_),
                rtol=1e-6,
            )


def test_pictures_show_what_npy_holds_on_a_photograph() -> None:
    picture = np.asarray(Image.open(CHELSEA))
    geometry = place(451, 300, Fit((224, 224), "crop", 256, "bicubic", (0.5, 0.5, 0.5)))
    raw = np.random.default_rng(1).standard_normal((7, 7)).astype(np.float32)
    style = Style(format="npy")
    values = read(render(raw, geometry, picture, "scale_after_relu", style))
    np.testing.assert_array_equal(values, scale(resample(raw, geometry, "original")[0], "scale_after_relu"))
    gray16 = read(render(raw, geometry, picture, "scale_after_relu", replace(style, format="gray16")))
    assert np.abs(gray16 / 65535 - values).max() <= 0.5 / 65535 + 1e-6
    gray = read(render(raw, geometry, picture, "scale_after_relu", replace(style, format="gray")))
    assert np.abs(gray / 255 - values).max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize(("encoding", "side"), [("webp", 16_384), ("jpeg", 65_501)])
def test_a_side_that_the_encoding_cannot_hold_is_refused(encoding: Any, side: int) -> None:
    picture = np.zeros((1, side, 3), np.uint8)
    geometry = Geometry(side, 1, (0.0, 0.0, float(side), 1.0), (1, 1))
    with pytest.raises(InvalidRequest, match=f"{encoding} holds at most {side - 1} pixels") as caught:
        render(RAMP, geometry, picture, "none", Style(encoding=encoding))
    assert caught.value.errors[0].pointer == "/encoding"
    narrower = replace(geometry, width=side - 1, box=(0.0, 0.0, side - 1.0, 1.0))
    assert render(RAMP, narrower, picture[:, 1:], "none", Style(encoding=encoding)).width == side - 1


def test_an_unknown_colormap_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="'jett'"):
        render(RAMP, FLAT, PICTURE, "none", Style(colormap="jett"))


def test_threads_render_as_one_does_and_leave_the_input_alone() -> None:
    raws = [np.random.default_rng(seed).standard_normal((7, 7)).astype(np.float32) for seed in range(16)]
    picture = np.asarray(Image.open(CHELSEA))
    picture.flags.writeable = False
    geometry = place(451, 300, Fit((224, 224), "crop", 256, "bicubic", (0.5, 0.5, 0.5)))

    def answer(raw: Floats) -> bytes:
        raw.flags.writeable = False
        return render(raw, geometry, picture, "scale_after_relu", Style()).data

    serial = [answer(raw) for raw in raws]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(answer, raws)) == serial
