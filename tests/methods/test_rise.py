"""RISE against a plain loop in float64, masks made one by one, and the expectation of a linear confidence."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from service.explain.means import Means
from service.explain.trace import Pass
from service.methods.rise import Rise, RiseParams, masks
from service.models.program import Program
from tests.nets import Varied, close_to, explain, hand, hand_picture, images, peer_copy, program_of, request, seeded
from tests.nets import varied as varied_program

Floats = NDArray[np.float64]


def ours(program: Program, pictures: Tensor, classes: list[int], params: RiseParams, chunk: int = 8) -> Tensor:
    one = Pass(program, pictures, means=Means(chunk=chunk))
    return Rise().heatmap(one.backward(torch.tensor(classes)).trace(), params)


def shares(grid: int, side: int, shift: int) -> Floats:
    """What each of a row's cells adds to each pixel, (side,grid): bilinear between the cells' centres."""
    cell = -(-side // grid)
    found = np.zeros((side, grid))
    for pixel in range(side):
        place = (pixel + shift + 0.5) * grid / ((grid + 1) * cell) - 0.5
        low = int(np.floor(place))
        for at, share in ((low, 1 - (place - low)), (low + 1, place - low)):
            found[pixel, min(max(at, 0), grid - 1)] += share
    return found


def mask_alone(seed: int, number: int, grid: int, p: float, height: int, width: int) -> Floats:
    """The mask of one number, in NumPy."""
    rng = np.random.default_rng((seed, number))
    shown = (rng.random((grid, grid)) < p).astype(np.float64)
    top, left = (int(rng.integers(-(-side // grid) + 1)) for side in (height, width))
    return shares(grid, height, top) @ shown @ shares(grid, width, left).T


@pytest.mark.parametrize(("grid", "height", "width"), [(3, 12, 12), (7, 24, 17), (1, 5, 6), (4, 3, 9)])
def test_a_mask_is_a_random_grid_upsampled_and_shifted(grid: int, height: int, width: int) -> None:
    params = RiseParams(grid=grid, p=0.4, seed=5)
    made = masks(slice(3, 9), params, torch.zeros(3, height, width))
    expected = np.stack([mask_alone(5, number, grid, 0.4, height, width) for number in range(3, 9)])
    assert expected.std() > 0
    assert close_to(made, expected) < 1e-5
    assert torch.equal(made[2:4], masks(slice(5, 7), params, torch.zeros(3, height, width)))


def test_equals_a_plain_loop_in_float64() -> None:
    params = RiseParams(n=37, grid=3, p=0.3, seed=2)
    pictures, classes = images(2, 12), [1, 6]
    twin = peer_copy(seeded(Varied), torch.float64)
    oracle = np.zeros((2, 12, 12))
    for index, number in enumerate(classes):
        for mask in range(37):
            shown = mask_alone(2, mask, 3, 0.3, 12, 12)
            scores = twin(pictures[index : index + 1].double() * torch.from_numpy(shown)).softmax(dim=1)
            oracle[index] += float(scores[0, number].detach()) * shown / (37 * 0.3)
    assert oracle.std() > 0
    assert close_to(ours(varied_program(), pictures, classes, params), oracle) < 1e-5


def test_masks_that_hide_nothing_give_the_confidence() -> None:
    asked = request(1, (0,), methods=("rise",), gen_params={"n": 5, "p": 1.0})
    (answer,) = explain(hand(), asked, hand_picture())
    np.testing.assert_allclose(answer.maps[0].values, np.full((2, 2), answer.confidences[0]), rtol=1e-6)
    assert answer.maps[0].values.dtype == np.float32


class Affine(nn.Module):
    """Two classes; the confidence of the first is 0.5 and a weighted sum of the pixels."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = nn.Parameter(weights)

    def forward(self, x: Tensor) -> Tensor:
        first = 0.5 + (x * self.weights).sum(dim=(1, 2, 3))
        return torch.stack([first, 1 - first], dim=1).log()


def test_comes_near_its_expectation_on_a_linear_model() -> None:
    """E[S_i] = b + sum_j a_j x_j E[M_i M_j] / p, within five standard errors; E[M_i M_j] over all grids and shifts."""
    side, grid, p, n = 12, 3, 0.5, 3000
    parts = torch.zeros(3, side, side)
    parts[0, 1:5, 6:10] = 0.45 / 16
    parts[1, 7:11, 2:6] = -0.4 / 16
    shifts = range(-(-side // grid) + 1)
    by_side = [shares(grid, side, shift) @ shares(grid, side, shift).T for shift in shifts]
    same = sum(by_side) / len(by_side)  # the mean, over shifts, of what the same cells add to both pixels
    both = p**2 + p * (1 - p) * np.einsum("ac,bd->abcd", same, same)
    expected = 0.5 + np.einsum("abcd,cd->ab", both, parts.sum(dim=0).double().numpy()) / p
    drawn = np.stack([mask_alone(0, number, grid, p, side, side) for number in range(n)])
    each = (0.5 + np.einsum("nab,ab->n", drawn, parts.sum(dim=0).double().numpy()))[:, None, None] * drawn / p
    error = each.std(axis=0) / np.sqrt(n)
    assert np.ptp(expected) > 8 * error.max(), "what is expected should differ from pixel to pixel by more than chance"
    program = program_of(Affine(parts).eval().requires_grad_(False), side)
    answer = ours(program, torch.ones(1, 3, side, side), [0], RiseParams(n=n, grid=grid, p=p), chunk=500)[0].numpy()
    assert (np.abs(answer - expected) < 5 * error).all()
    assert close_to(answer, each.mean(axis=0)) < 1e-5


def test_alone_equals_in_a_batch_and_in_chunks_of_any_size() -> None:
    params = RiseParams(n=20, grid=3)
    pictures = images(3, 12)
    together = ours(varied_program(), pictures, [1, 2, 3], params)
    for index, number in enumerate([1, 2, 3]):
        alone = ours(varied_program(), pictures[index : index + 1], [number], params, chunk=3)
        assert close_to(alone, together[index : index + 1]) < 1e-5


def test_the_seed_alone_decides() -> None:
    first, again, other = (
        ours(varied_program(), images(1, 12), [1], RiseParams(n=10, seed=seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert close_to(other, first) > 1e-3


def test_serves_every_network_and_runs_alone() -> None:
    assert Rise().refusal(varied_program(), None) is None
    assert Rise.alone
