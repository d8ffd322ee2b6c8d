"""Grad-CAM++ against numbers worked out by hand, derivatives of exp(score), float64 autograd, and its peers' faults."""

import numpy as np
import pytest
import torch
from pytorch_grad_cam import GradCAMPlusPlus
from torch import Tensor

from tests.methods.cams import eager_64, modular, of_numbers, peer, raw
from tests.nets import SMALL, close_to, deep, explain, hand, hand_picture, images, request

NAME = "grad_cam_plus_plus"
CLASSES = [3, 6]


def test_equals_the_closed_form_on_paper() -> None:
    # Class 0: S is 10 and 0, relu(g) is [[1, 0], [0, 1]] and [[0, 3], [0, 4]]: 1/12 + 1/12 and 3/2 + 4/2.
    # Class 1: relu(g) is 0 and [[0, 8], [0, 0]]: 0 and 8/2.
    (answer,) = explain(hand(), request(1, (0, 1), methods=(NAME,)), hand_picture())
    first, second = (one.values for one in answer.maps)
    seen, other = np.array([[1, 2], [3, 4]]), np.array([[-2, 2], [2, -2]])
    np.testing.assert_allclose(first, seen / 6 + 3.5 * other, rtol=0, atol=1e-5 * 7)
    np.testing.assert_allclose(second, 4.0 * other, rtol=0, atol=1e-5 * 8)


def test_equals_the_papers_derivatives_of_exp_of_the_score() -> None:
    """Eq. 19 with Y = exp(y): second and third derivatives by autograd, value by value; exp(y) scales every weight."""
    generator = torch.Generator().manual_seed(0)
    activation = torch.rand(2, 2, 2, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(2, 2, 2, generator=generator, dtype=torch.float64)

    def derivative(value: Tensor, place: int) -> Tensor:
        (gradient,) = torch.autograd.grad(value, activation, create_graph=True)
        return gradient.flatten()[place]

    exponential = (weight * activation).sum().exp()
    summands = torch.zeros(8, dtype=torch.float64)
    for place in range(8):
        first = derivative(exponential, place)
        second = derivative(first, place)
        third = derivative(second, place)
        alpha = second / (2 * second + activation[place // 4].sum() * third)
        summands[place] = (alpha * first.relu()).detach()
    weights = summands.reshape(2, 4).sum(dim=1) / exponential.detach()
    oracle = torch.einsum("c,chw->hw", weights, activation.detach())
    answer = of_numbers(NAME, activation.detach()[None], weight[None])
    assert close_to(answer[0], oracle) < 1e-12


def oracle_64(activation: Tensor, gradient: Tensor) -> Tensor:
    """The closed form, one channel after the other."""
    total = torch.zeros_like(activation[:, 0])
    for one, slope in zip(activation.unbind(1), gradient.unbind(1), strict=True):
        alpha = 1 / (2 + one.sum(dim=(1, 2), keepdim=True) * slope)
        total += (alpha * slope.relu()).sum(dim=(1, 2), keepdim=True) * one
    return total


@pytest.mark.parametrize("layer", ["0", "1", "2", "3"])
def test_equals_float64_where_gradients_vary_from_place_to_place(layer: str) -> None:
    net, program = modular()
    pictures = images(2, 12)
    activation, gradient, _ = eager_64(net, layer, pictures, CLASSES)
    assert gradient.std(dim=(2, 3)).max() > 0
    assert close_to(raw(NAME, program, layer, pictures, CLASSES), oracle_64(activation, gradient)) < 1e-5


def test_is_right_where_pytorch_grad_cam_is_distorted_by_its_epsilon() -> None:
    """On pooled networks the squared gradient is as small as the peer's 1e-6, so that it is off by a tenth."""
    net, program = deep("resnet18")
    pictures = images(2, SMALL)
    oracle = oracle_64(*eager_64(net, "layer4", pictures, CLASSES)[:2])
    assert close_to(raw(NAME, program, "layer4", pictures, CLASSES), oracle) < 1e-4
    assert close_to(peer(GradCAMPlusPlus, net, "layer4", pictures, CLASSES), oracle) > 0.05


def test_equals_pytorch_grad_cam_where_gradients_are_large() -> None:
    activation, gradient = images(2, 4).abs(), 100 * images(2, 4, seed=1)
    theirs = GradCAMPlusPlus.get_cam_weights(None, None, None, None, activation.numpy(), gradient.numpy())
    oracle = torch.einsum("nc,nchw->nhw", torch.from_numpy(theirs), activation)
    assert close_to(of_numbers(NAME, activation, gradient), oracle) < 1e-5


def test_no_gradient_is_too_small() -> None:
    """With g of 1e-30 the denominator is 2: half the sum of relu(g)."""
    activation, gradient = images(1, 4).abs(), 1e-30 * images(1, 4, seed=1)
    weights = (1e30 * gradient).double().relu().sum(dim=(2, 3)) / 2
    oracle = torch.einsum("nc,nchw->nhw", weights, activation.double())
    assert close_to(1e30 * of_numbers(NAME, activation, gradient), oracle) < 1e-5


def test_a_denominator_of_0_counts_nothing() -> None:
    activation = torch.tensor([[[[-3.0, 1.0]]]])  # S is -2: 2 - 2 * 1 is 0, 2 - 2 * 0.5 is 1
    answer = of_numbers(NAME, activation, torch.tensor([[[[1.0, 0.5]]]]))
    np.testing.assert_allclose(answer, [[[-1.5, 0.5]]], rtol=1e-6)


def test_a_picture_alone_equals_itself_in_a_batch() -> None:
    program, pictures = modular()[1], images(3, 12)
    batch = raw(NAME, program, "2", pictures, [0, 1, 2])
    for index in range(3):
        assert close_to(raw(NAME, program, "2", pictures[index : index + 1], [index]), batch[index : index + 1]) < 1e-5
