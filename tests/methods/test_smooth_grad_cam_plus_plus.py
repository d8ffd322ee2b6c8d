"""Smooth Grad-CAM++ against Grad-CAM++ without noise, and against float64 autograd on the noisy pictures."""

import pytest
import torch
from torch import Tensor, nn

from service.explain.mathematics import noise
from tests.methods.cams import eager_64, modular, raw
from tests.nets import close_to, images, program_of, seeded

NAME = "smooth_grad_cam_plus_plus"
CLASSES = [3, 6]


@pytest.mark.parametrize("layer", ["0", "3"])
def test_one_sample_without_noise_is_grad_cam_plus_plus(layer: str) -> None:
    program, pictures = modular()[1], images(2, 12)
    answer = raw(NAME, program, layer, pictures, CLASSES, n=1, sigma=0.0)
    assert close_to(answer, raw("grad_cam_plus_plus", program, layer, pictures, CLASSES)) < 1e-5
    several = raw(NAME, program, layer, pictures, CLASSES, n=9, sigma=0.0)
    assert close_to(several, answer) < 1e-5


def oracle_64(module: nn.Module, layer: str, pictures: Tensor, n: int, sigma: float, seed: int) -> Tensor:
    """The paper, one sample after the other; sums and maps from the clean activation."""
    spread = torch.stack([picture.max() - picture.min() for picture in pictures])[:, None, None, None]
    drawn = [noise(pictures[0], seed, number) for number in range(n)]
    noisy = [pictures.double() + sigma * spread * one for one in drawn]
    slopes = [eager_64(module, layer, one, CLASSES)[1] for one in noisy]
    one, two, three = (torch.stack(slopes).pow(power).mean(dim=0) for power in (1, 2, 3))
    activation = eager_64(module, layer, pictures, CLASSES)[0]
    denominator = 2 * two + activation.sum(dim=(2, 3), keepdim=True) * three
    alpha = torch.where(two == 0, 0, two / denominator)
    return torch.einsum("nc,nchw->nhw", (alpha * one.relu()).sum(dim=(2, 3)), activation)


@pytest.mark.parametrize("layer", ["0", "2"])
def test_equals_float64_on_the_noisy_pictures(layer: str) -> None:
    """Eleven samples are two chunks. The second picture's range is a third of the first one's."""
    net, program = modular()
    pictures = images(2, 12) * torch.tensor([1.0, 1 / 3])[:, None, None, None]
    answer = raw(NAME, program, layer, pictures, CLASSES, n=11, sigma=0.2, seed=5)
    assert close_to(answer, oracle_64(net, layer, pictures, 11, 0.2, 5)) < 1e-5
    clean = raw("grad_cam_plus_plus", program, layer, pictures, CLASSES)
    assert close_to(answer, clean) > 0.01, "noise of a fifth of the range changes the map"


def test_powers_of_small_gradients_are_not_lost() -> None:
    """With g of about 1e-17, whose cube is no float32, alpha is one half: half the sum of relu(D1)."""
    net = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 7)))
    net.get_submodule("3").get_parameter("weight").mul_(1e-15)
    pictures = images(2, 6)
    activation, gradient, _ = eager_64(net, "1", pictures, CLASSES)  # constant: what follows is linear
    weights = gradient.relu().sum(dim=(2, 3)) / 2
    oracle = torch.einsum("nc,nchw->nhw", weights, activation)
    answer = raw(NAME, program_of(net, 6), "1", pictures, CLASSES, n=3)
    assert close_to(answer, oracle) < 1e-5


def test_the_noise_depends_on_the_seed_alone() -> None:
    program, pictures = modular()[1], images(2, 12)
    first = raw(NAME, program, "2", pictures, CLASSES, n=4, seed=1)
    assert torch.equal(raw(NAME, program, "2", pictures, CLASSES, n=4, seed=1), first)
    assert close_to(raw(NAME, program, "2", pictures, CLASSES, n=4, seed=2), first) > 1e-3
    for index, number in enumerate(CLASSES):
        alone = raw(NAME, program, "2", pictures[index : index + 1], [number], n=4, seed=1)
        assert close_to(alone, first[index : index + 1]) < 1e-5
