"""Occlusion against numbers worked out by hand, the closed form of a linear model, and captum."""

from functools import cache

import numpy as np
import pytest
import torch
from captum.attr import Occlusion as CaptumOcclusion
from torch import Tensor, nn

from service.explain.means import Means
from service.explain.trace import Pass
from service.methods.occlusion import Occlusion, OcclusionParams
from service.models.program import Program
from tests.nets import SMALL, Varied, close_to, deep, explain, hand, hand_picture, images, program_of, request, seeded
from tests.nets import varied as varied_program

HEIGHT, WIDTH = 7, 10


def ours(program: Program, pictures: Tensor, classes: list[int], window: int, stride: int, chunk: int = 8) -> Tensor:
    one = Pass(program, pictures, means=Means(chunk=chunk))
    return Occlusion().heatmap(
        one.backward(torch.tensor(classes)).trace(), OcclusionParams(window=window, stride=stride)
    )


def captum(module: nn.Module, pictures: Tensor, classes: list[int], window: int, stride: int) -> Tensor:
    answer: Tensor = CaptumOcclusion(module).attribute(
        pictures, (3, window, window), (3, stride, stride), baselines=0, target=classes
    )
    return answer[:, 0]  # a window hides all three channels


@cache
def linear() -> tuple[nn.Module, Program]:
    module = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * HEIGHT * WIDTH, 4)))
    return module, program_of(module, (HEIGHT, WIDTH))


def test_equals_the_falls_on_paper() -> None:
    # Linear: a pixel's fall is its part of the score, here w0 red + w1 (green - blue) with class 0's weights:
    # 1 * 1 - 20 * (0 - 2) = 41; 3 * 2 = 6; -1 * 2 = -2; 1 * 4 + 4 * (0 - 2) = -4.
    asked = request(1, (0,), methods=("occlusion",), gen_params={"window": 1, "stride": 1})
    (answer,) = explain(hand(), asked, hand_picture())
    np.testing.assert_allclose(answer.maps[0].values, [[41, 6], [-2, -4]], rtol=0, atol=1e-5 * 41)
    assert answer.maps[0].values.dtype == np.float32


def linear_oracle(picture: Tensor, number: int, window: int, starts: list[list[int]]) -> Tensor:
    """In float64, window by window: each one's fall is the sum of what its pixels add to the score."""
    weights = linear()[0].get_parameter("1.weight")[number].double().reshape(3, HEIGHT, WIDTH)
    parts = (weights * picture.double()).sum(dim=0)
    seen: list[list[list[float]]] = [[[] for _ in range(WIDTH)] for _ in range(HEIGHT)]
    for top in starts[0]:
        for left in starts[1]:
            fall = float(parts[top : top + window, left : left + window].sum())
            for row in range(top, top + window):
                for column in range(left, left + window):
                    seen[row][column].append(fall)
    return torch.tensor([[sum(falls) / len(falls) for falls in row] for row in seen], dtype=torch.float64)


@pytest.mark.parametrize(
    ("window", "stride", "starts"),
    [
        (3, 2, [[0, 2, 4], [0, 2, 4, 6, 7]]),  # 10 - 3 is odd: the last window is moved in
        (4, 3, [[0, 3], [0, 3, 6]]),
        (5, 4, [[0, 2], [0, 4, 5]]),
        (1, 1, [list(range(HEIGHT)), list(range(WIDTH))]),
        (2, 9, [[0, 2, 4, 5], [0, 2, 4, 6, 8]]),  # a stride beyond the window would leave pixels out
    ],
)
def test_equals_the_closed_form_of_a_linear_model(window: int, stride: int, starts: list[list[int]]) -> None:
    pictures, classes = images(2, (HEIGHT, WIDTH)), [0, 3]
    both = zip(pictures, classes, strict=True)
    oracle = torch.stack([linear_oracle(picture, number, window, starts) for picture, number in both])
    assert oracle.std() > 0
    assert close_to(ours(linear()[1], pictures, classes, window, stride), oracle) < 1e-5


def test_a_window_larger_than_the_picture_is_the_picture() -> None:
    module, program = linear()
    pictures = images(1, (HEIGHT, WIDTH))
    fall = (module(pictures) - module(torch.zeros_like(pictures)))[0, 2]
    assert close_to(ours(program, pictures, [2], 1024, 8), fall.expand(1, HEIGHT, WIDTH)) < 1e-5
    tall = ours(program, pictures, [2], 8, 8)  # clipped to 7 rows, and two windows of 8 columns
    assert torch.equal(tall[:, 0], tall[:, -1])
    assert not torch.equal(tall[:, :, 0], tall[:, :, -1])


@pytest.mark.parametrize(("window", "stride"), [(4, 2), (6, 6), (2, 1)])
def test_equals_captum_where_strides_divide_evenly(window: int, stride: int) -> None:
    pictures, classes = images(2, 12), [1, 6]
    oracle = captum(seeded(Varied), pictures, classes, window, stride)
    assert oracle.std() > 0
    assert close_to(ours(varied_program(), pictures, classes, window, stride), oracle) < 1e-5


def test_equals_captum_on_a_deep_network() -> None:
    module, program = deep("resnet18")
    pictures = images(1, SMALL)
    assert close_to(ours(program, pictures, [3], 32, 32), captum(module, pictures, [3], 32, 32)) < 1e-4


def test_differs_from_captum_by_design_where_they_do_not() -> None:
    """Each pixel adds 1 to the score: a window of 9 pixels takes 9. Captum cuts its last windows to fewer."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 1, bias=False)).eval().requires_grad_(False)
    nn.init.constant_(module.get_parameter("1.weight"), 1 / 3)
    ones = torch.ones(1, 3, 8, 8)
    assert close_to(ours(program_of(module, 8), ones, [0], 3, 2), torch.full((1, 8, 8), 9.0)) < 1e-5
    theirs = captum(module, ones, [0], 3, 2)
    assert theirs[0, 0, 0] == pytest.approx(9)
    assert theirs[0, -1, -1] < 8


def test_alone_equals_in_a_batch_and_in_chunks_of_any_size() -> None:
    pictures = images(3, 12)
    together = ours(varied_program(), pictures, [1, 2, 3], 5, 3)
    for index, number in enumerate([1, 2, 3]):
        alone = ours(varied_program(), pictures[index : index + 1], [number], 5, 3, chunk=4)
        assert close_to(alone, together[index : index + 1]) < 1e-5
    assert torch.equal(together, ours(varied_program(), pictures, [1, 2, 3], 5, 3))


def test_serves_every_network_and_runs_alone() -> None:
    assert Occlusion().refusal(varied_program(), None) is None
    assert Occlusion.alone
