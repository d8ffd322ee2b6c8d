from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import grid_sample, interpolate

from service.imaging.geometry import Geometry
from service.imaging.maps import Floats, Scaling, degeneracy, displayed, resample, scale

WHOLE = Geometry(30, 20, (0.0, 0.0, 30.0, 20.0), (17, 13))
# What a crop 224 of 256 of a 400 x 200 picture shows.
CROP = Geometry(400, 200, (112.5, 12.5, 287.5, 187.5), (224, 224))
LETTERBOX = Geometry(40, 20, (0.0, -10.0, 40.0, 30.0), (10, 10))


def a_map(*shape: int) -> Floats:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def numbers(*values: float) -> Floats:
    return np.array([values], np.float32)


def torchs(raw: Floats, size: tuple[int, int]) -> Floats:
    planes = torch.from_numpy(np.atleast_3d(raw)).permute(2, 0, 1)[None]
    answer = interpolate(planes, size, mode="bilinear", align_corners=False)[0].permute(1, 2, 0)
    return answer.numpy().reshape(*size, *raw.shape[2:])


def test_resampling_by_hand() -> None:
    # The centres of four pixels lie at -0.25, 0.25, 0.75 and 1.25 of two cells; beyond the edge the edge counts.
    values, covered = resample(numbers(0, 1), Geometry(4, 1, (0.0, 0.0, 4.0, 1.0), (1, 1)), "original")
    assert values.tolist() == [[0, 0.25, 0.75, 1]]
    assert covered == (slice(0, 1), slice(0, 4))


@given(
    cells=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    pixels=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    channels=st.sampled_from(((), (3,))),
)
@settings(max_examples=100, deadline=None)
def test_resampling_is_torchs_bilinear(
    cells: tuple[int, int], pixels: tuple[int, int], channels: tuple[int, ...]
) -> None:
    raw, (height, width) = a_map(*cells, *channels), pixels
    model, covered = resample(raw, Geometry(7, 9, (-1.0, 2.0, 3.0, 4.0), pixels), "model")
    np.testing.assert_allclose(model, torchs(raw, pixels), atol=2e-5)
    assert covered == (slice(0, height), slice(0, width))
    whole = Geometry(width, height, (0.0, 0.0, float(width), float(height)), (5, 5))
    np.testing.assert_allclose(resample(raw, whole, "original")[0], torchs(raw, pixels), atol=2e-5)


def test_a_constant_stays_constant() -> None:
    values, _ = resample(np.full((7, 7), 0.1, np.float32), WHOLE, "original")
    np.testing.assert_allclose(values, np.float32(0.1), rtol=2e-7)


@pytest.mark.parametrize("geometry", [CROP, LETTERBOX])
def test_a_box_is_sampled_where_it_lies(geometry: Geometry) -> None:
    raw = a_map(7, 5)
    left, top, right, bottom = geometry.box
    x = (torch.arange(geometry.width) + 0.5 - left) / (right - left) * 2 - 1
    y = (torch.arange(geometry.height) + 0.5 - top) / (bottom - top) * 2 - 1
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)[None]
    sampled = grid_sample(torch.from_numpy(raw)[None, None], grid, padding_mode="border", align_corners=False)
    inside = ((x >= -1) & (x < 1))[None, :] & ((y >= -1) & (y < 1))[:, None]
    values, covered = resample(raw, geometry, "original")
    np.testing.assert_allclose(values, torch.where(inside, sampled[0, 0], 0).numpy(), atol=1e-5)
    marked = np.zeros(inside.shape, bool)
    marked[covered] = True
    np.testing.assert_array_equal(marked, inside.numpy())


def test_what_a_crop_never_showed_is_zero() -> None:
    values, covered = resample(np.ones((7, 7), np.float32), CROP, "original")
    assert covered == (slice(12, 187), slice(112, 287))
    assert values[covered].min() > 0.999
    assert np.count_nonzero(values) == 175 * 175


def test_a_crop_between_two_centres_covers_one_pixel() -> None:
    # 1 x 10,000 with crop 224 of 256
    long = Geometry(1, 10_000, (0.0625, 4999.5625, 0.9375, 5000.4375), (224, 224))
    values, covered = resample(np.ones((7, 7), np.float32), long, "original")
    assert values[covered].tolist() == [[1]]
    assert np.count_nonzero(values) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_spoils_only_what_it_touches(bad: float) -> None:
    raw = a_map(4, 4)
    spoilt = raw.copy()
    spoilt[0, 0] = bad
    clean, _ = resample(raw, WHOLE, "original")
    values, _ = resample(spoilt, WHOLE, "original")
    # Cell (0, 0) reaches to the centre of its neighbour: 1.5 of 4 cells, 7.5 of 20 rows and 11.25 of 30 columns.
    assert np.isnan(values[:7, :11]).all()
    values[:7, :11] = clean[:7, :11]
    np.testing.assert_allclose(values, clean, atol=1e-6)


@pytest.mark.parametrize(
    ("scaling", "values", "expected"),
    [
        ("scale_after_relu", (-4, 0, 1, 2), (0, 0, 0.5, 1)),
        ("scale_before_relu", (-4, 0, 1, 2), (0, 0, 0.25, 0.5)),
        ("none", (-4, 0, 1, 2), (-4, 0, 1, 2)),
        ("scale_after_relu", (-2, -1), (0, 0)),
        ("scale_before_relu", (-2, -1), (0, 0)),
        ("none", (-2, -1), (-2, -1)),
        ("scale_after_relu", (0, 0), (0, 0)),
        ("scale_before_relu", (0, 0), (0, 0)),
        ("scale_after_relu", (1e-30, 5e-31), (1, 0.5)),
        ("scale_before_relu", (-1e-30, 5e-31), (0, 0.5)),
        ("scale_after_relu", (1e-42, 0), (1, 0)),
        ("scale_after_relu", (3e38, -3e38), (1, 0)),
    ],
)
def test_scaling_by_hand(scaling: Scaling, values: tuple[float, ...], expected: tuple[float, ...]) -> None:
    given_map = numbers(*values)
    answer = scale(given_map, scaling)
    assert answer.dtype == np.float32
    np.testing.assert_allclose(answer, numbers(*expected), rtol=1e-6)
    np.testing.assert_array_equal(given_map, numbers(*values))


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (numbers(0, 0), "all_zero"),
        (numbers(0, -0.0), "all_zero"),
        (numbers(-1, 0), "all_negative"),
        (numbers(-1, -1), "all_negative"),
        (numbers(2, 2), "constant"),
        (numbers(0, np.nan), "not_finite"),
        (numbers(-1, -np.inf), "not_finite"),
        (numbers(-1, 1e-45), None),
        (np.full((2, 2, 3), -1, np.float32), "constant"),
        (np.zeros((2, 2, 3), np.float32), "all_zero"),
        (-np.arange(12, dtype=np.float32).reshape(2, 2, 3), None),
    ],
)
def test_degenerate_maps(raw: Floats, reason: str | None) -> None:
    assert degeneracy(raw) == reason


@pytest.mark.parametrize(
    ("scaling", "values", "expected"),
    [
        ("scale_after_relu", (0, 0.5, 1), (0, 0.5, 1)),
        ("scale_before_relu", (0, 0.25, 0.5), (0, 0.25, 0.5)),
        ("none", (-8, 1, 4), (0, 0.25, 1)),
        ("none", (-8, -1), (0, 0)),
    ],
)
def test_what_is_displayed_by_hand(scaling: Scaling, values: tuple[float, ...], expected: tuple[float, ...]) -> None:
    assert displayed(numbers(*values), scaling).tolist() == [list(expected)]


def test_three_channels_are_displayed_as_their_largest_absolute_value() -> None:
    values = np.array([[[1, -4, 2], [0, 0, 1], [2, 2, -1], [0, 0, 0]]], np.float32)
    assert displayed(values, None).tolist() == [[1, 0.25, 0.5, 0]]
