"""Integrated Gradients against numbers worked out by hand, captum, a float64 loop, and its own completeness."""

import numpy as np
import pytest
import torch
from captum.attr import IntegratedGradients as CaptumIntegratedGradients
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.functional import gaussian_blur

from service.explain.means import Means
from service.methods.integrated_gradients import IntegratedGradients, IntegratedGradientsParams, blurred
from service.models.program import Program
from tests.nets import (
    SMALL,
    Residual,
    Varied,
    close_to,
    deep,
    explain,
    hand,
    hand_picture,
    images,
    peer_copy,
    program_of,
    request,
    residual,
    seeded,
    trace_of,
    varied,
)

CLASSES = [1, 4]
BLUR = 1.5


def ours(
    program: Program, pictures: Tensor, classes: list[int], means: Means | None = None, **params: float | str
) -> Tensor:
    """As the method gives it, but (N,3,H,W)."""
    trace = trace_of(program, pictures, None, classes, means)
    params = {"blur_sigma": BLUR, **params}
    return IntegratedGradients().heatmap(trace, IntegratedGradientsParams.model_validate(params)).movedim(-1, 1)


def test_equals_the_numbers_on_paper() -> None:
    """Without biases the gradient is the same all along the path from 0, so the answer is x dy/dx."""
    asked = request(1, (0,), methods=("integrated_gradients",), gen_params={"steps": 3})
    (answer,) = explain(hand(nn.ReLU()), asked, hand_picture())
    red, green, blue = [[1, 0], [0, 4]], [[0, 6], [-2, 0]], [[0, 0], [0, 0]]
    np.testing.assert_allclose(answer.maps[0].values, np.stack([red, green, blue], axis=-1), rtol=0, atol=1e-5 * 6)


def baselines(pictures: Tensor, baseline: str) -> Tensor:
    """The baseline of each picture in float64."""
    exact = pictures.double()
    return torchvisions_blur(exact, BLUR) if baseline == "blur" else torch.zeros_like(exact)


def torchvisions_blur(pictures: Tensor, sigma: float) -> Tensor:
    """torchvision's blur, which mirrors at the edges, on pictures that go on as at their edges."""
    radius = int(4 * sigma + 0.5)
    wide = F.pad(pictures, [radius] * 4, mode="replicate")
    blur: Tensor = gaussian_blur(wide, [2 * radius + 1] * 2, [sigma] * 2)
    return blur[..., radius:-radius, radius:-radius]


@pytest.mark.parametrize("sigma", [1.0, 2.5, 4.0])
def test_blurs_as_torchvision_does(sigma: float) -> None:
    """On pictures that are neither square nor larger than the kernel."""
    pictures = images(2, (12, 17))
    answer = torch.stack([blurred(picture, sigma) for picture in pictures])
    assert close_to(answer, torchvisions_blur(pictures.double(), sigma)) < 1e-5


def test_blurs_an_edge_to_the_normal_distribution() -> None:
    """A step between two columns becomes the bell's integral, up to what a pixel's width makes of it."""
    step = torch.zeros(3, 4, 80)
    step[:, :, 40:] = 1
    places = torch.arange(80, dtype=torch.float64) - 39.5
    expected = torch.special.ndtr(places / 5).expand(3, 4, 80)
    assert close_to(blurred(step, 5), expected) < 1e-3


def captum(module: nn.Module, pictures: Tensor, classes: list[int], steps: int, baseline: str) -> Tensor:
    method = CaptumIntegratedGradients(peer_copy(module, torch.float64))
    answer: Tensor = method.attribute(
        pictures.double(), baselines(pictures, baseline), classes, n_steps=steps, method="gausslegendre"
    )
    return answer.detach()


@pytest.mark.parametrize("baseline", ["zero", "blur"])
@pytest.mark.parametrize("steps", [1, 20, 50])
def test_equals_captum(steps: int, baseline: str) -> None:
    pictures = images(2, 12)
    expected = captum(seeded(Varied), pictures, CLASSES, steps, baseline)
    assert close_to(ours(varied(), pictures, CLASSES, steps=steps, baseline=baseline), expected) < 1e-5


def test_equals_captum_on_a_deep_network() -> None:
    net, program = deep("resnet18")
    pictures = images(1, SMALL)
    expected = captum(net, pictures, [7], 6, "zero")
    assert close_to(ours(program, pictures, [7], steps=6), expected) < 1e-4


class Smooth(nn.Sequential):
    """A network without kinks, on whose paths the quadrature converges fast."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 6, 3), nn.SiLU(), nn.Conv2d(6, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(256, 5))


@pytest.mark.parametrize("baseline", ["zero", "blur"])
@pytest.mark.parametrize(
    ("net", "steps", "tolerance"),
    [(Smooth, 50, 1e-5), (Varied, 50, 5e-2), (Varied, 300, 5e-3), (Residual, 50, 5e-2)],
)
def test_adds_up_to_what_the_score_gained(net: type[nn.Module], steps: int, tolerance: float, baseline: str) -> None:
    """Where the path crosses the kinks of ReLUs the gradient jumps, and the quadrature needs more steps."""
    module, pictures = seeded(net), images(2, 12)
    program = {Varied: varied, Residual: residual}.get(net, lambda: program_of(module, 12))()
    twin = peer_copy(module, torch.float64)
    starts = baselines(pictures, baseline)
    gained = (twin(pictures.double()) - twin(starts))[[0, 1], CLASSES].detach()
    answer = ours(program, pictures, CLASSES, Means(chunk=64), baseline=baseline, steps=steps)
    assert close_to(answer.sum(dim=(1, 2, 3)), gained) < tolerance


@pytest.mark.parametrize("baseline", ["zero", "blur"])
def test_the_completeness_error_is_the_share_of_the_gain_that_the_sum_misses(baseline: str) -> None:
    pictures, params = (
        images(2, 12),
        IntegratedGradientsParams.model_validate({"steps": 1, "baseline": baseline, "blur_sigma": BLUR}),
    )
    trace = trace_of(varied(), pictures, None, CLASSES)
    values = IntegratedGradients().heatmap(trace, params)
    twin = peer_copy(seeded(Varied), torch.float64)
    gained = (twin(pictures.double()) - twin(baselines(pictures, baseline)))[[0, 1], CLASSES].detach()
    expected = (values.double().sum(dim=(1, 2, 3)) / gained - 1).abs()
    assert close_to(IntegratedGradients().completeness_error(trace, params, values), expected) < 1e-4


def test_defaults_are_fifty_steps_from_zero() -> None:
    params = IntegratedGradientsParams()
    assert (params.steps, params.baseline, params.blur_sigma) == (50, "zero", 10)


def test_the_sigma_of_the_blur_matters_with_that_baseline_alone() -> None:
    pictures = images(1, 12)
    one, other = (ours(varied(), pictures, [0], steps=4, blur_sigma=sigma) for sigma in (1, 3))
    assert torch.equal(one, other)
    one, other = (ours(varied(), pictures, [0], steps=4, baseline="blur", blur_sigma=sigma) for sigma in (1, 3))
    assert close_to(one, other) > 1e-2


@pytest.mark.parametrize("baseline", ["zero", "blur"])
def test_a_picture_alone_equals_the_same_in_a_batch(baseline: str) -> None:
    pictures = images(3, 12)
    batch = ours(residual(), pictures, [0, 1, 2], steps=9, baseline=baseline)
    alone = [ours(residual(), pictures[[index]], [index], steps=9, baseline=baseline) for index in range(3)]
    assert close_to(batch, torch.cat(alone)) < 1e-5


def test_the_chunk_does_not_matter() -> None:
    pictures = images(1, 12)
    checks: list[None] = []
    answers = []
    for chunk in (1, 4, 16):
        checks.clear()
        answers.append(ours(varied(), pictures, [2], Means(chunk=chunk, check=lambda: checks.append(None)), steps=9))
        assert len(checks) == -(-9 // chunk)
    assert close_to(answers[1], answers[0]) < 1e-5
    assert close_to(answers[2], answers[0]) < 1e-5
