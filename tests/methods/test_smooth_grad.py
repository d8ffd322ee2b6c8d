"""SmoothGrad against a float64 loop with the same noise, its reduction to the gradient, and its seed."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from service.explain.mathematics import noise
from service.explain.means import Means
from service.explain.trace import Pass
from service.methods.smooth_grad import SmoothGrad, SmoothGradParams
from service.models.program import Program
from tests.nets import (
    Varied,
    close_to,
    explain,
    hand,
    hand_picture,
    images,
    peer_copy,
    request,
    residual,
    seeded,
    trace_of,
    varied,
)

CLASSES = [1, 4]


def ours(program: Program, pictures: Tensor, classes: list[int], means: Means | None = None, **params: float) -> Tensor:
    trace = trace_of(program, pictures, None, classes, means)
    return SmoothGrad().heatmap(trace, SmoothGradParams.model_validate(params))


def test_is_the_gradient_where_the_network_is_linear() -> None:
    asked = request(1, (0,), methods=("smooth_grad",), gen_params={"n": 3})
    (answer,) = explain(hand(), asked, hand_picture())
    red, green, blue = [[1, 0], [0, 1]], [[-20, 3], [-1, 4]], [[20, -3], [1, -4]]
    np.testing.assert_allclose(answer.maps[0].values, np.stack([red, green, blue], axis=-1), rtol=0, atol=1e-5 * 20)


def oracle_64(pictures: Tensor, classes: list[int], n: int, sigma: float, seed: int) -> Tensor:
    """Sample after sample in float64 on the eager network, (N,3,H,W)."""
    twin = peer_copy(seeded(Varied), torch.float64)
    found = []
    for picture, number in zip(pictures.double(), classes, strict=True):
        total = torch.zeros_like(picture)
        for sample in range(n):
            drawn = np.random.default_rng((seed, sample)).standard_normal(picture.shape, np.float32)
            shown = picture + sigma * (picture.max() - picture.min()) * torch.from_numpy(drawn).double()
            shown.requires_grad_()
            (gradient,) = torch.autograd.grad(twin(shown[None])[0, number], shown)
            total += gradient
        found.append(total / n)
    return torch.stack(found)


def test_equals_a_float64_loop_with_the_noise_of_each_pictures_range() -> None:
    pictures = images(2, 12) * torch.tensor([0.5, 3.0]).reshape(2, 1, 1, 1)
    answer = ours(varied(), pictures, CLASSES, n=7, sigma=0.3, seed=5).movedim(-1, 1)
    assert close_to(answer, oracle_64(pictures, CLASSES, 7, 0.3, 5)) < 1e-5


def test_defaults_are_the_papers() -> None:
    params = SmoothGradParams()
    assert (params.n, params.sigma, params.seed) == (50, 0.15, 0)


@pytest.mark.parametrize("net", [varied, residual])
def test_is_the_gradient_without_noise(net: Callable[[], Program]) -> None:
    """Its largest absolute value over the channels is `saliency`."""
    program, pictures = net(), images(2, 12)
    gradient = Pass(program, pictures).backward(torch.tensor(CLASSES)).trace().image_gradient
    assert close_to(ours(program, pictures, CLASSES, n=3, sigma=0).movedim(-1, 1), gradient) < 1e-5


def test_the_seed_alone_decides() -> None:
    pictures = images(3, 12)
    batch = ours(varied(), pictures, [0, 1, 2], n=9)
    assert torch.equal(batch, ours(varied(), pictures, [0, 1, 2], n=9))
    assert close_to(ours(varied(), pictures, [0, 1, 2], n=9, seed=1), batch) > 1e-2
    alone = torch.cat([ours(varied(), pictures[[index]], [index], n=9) for index in range(3)])
    assert close_to(batch, alone) < 1e-5


def test_the_chunk_does_not_matter() -> None:
    pictures = images(1, 12)
    checks: list[None] = []
    answers = []
    for chunk in (1, 4, 16):
        checks.clear()
        answers.append(ours(varied(), pictures, [2], Means(chunk=chunk, check=lambda: checks.append(None)), n=9))
        assert len(checks) == -(-9 // chunk)
    assert close_to(answers[1], answers[0]) < 1e-5
    assert close_to(answers[2], answers[0]) < 1e-5


def test_the_noise_has_the_deviation_that_is_stated() -> None:
    drawn = torch.stack([noise(torch.zeros(3, 12, 12), 0, number) for number in range(50)])
    assert drawn.std() == pytest.approx(1, abs=0.02)
    assert drawn.mean() == pytest.approx(0, abs=0.02)
