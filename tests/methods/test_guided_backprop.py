"""Guided backpropagation against numbers worked out by hand, captum, and a float64 oracle of the rule."""

import numpy as np
import pytest
import torch
from captum.attr import GuidedBackprop as CaptumGuidedBackprop
from torch import Tensor, nn

from service.explain.method import GenParams
from service.methods.guided_backprop import GuidedBackprop
from service.models.program import Program
from tests.methods.test_guided_grad_cam import GuidedRule
from tests.nets import (
    SMALL,
    close_to,
    deep,
    explain,
    hand,
    hand_picture,
    images,
    peer_copy,
    program_of,
    request,
    seeded,
    trace_of,
    varied,
)

CLASSES = [3, 7]


def ours(program: Program, pictures: Tensor, classes: list[int]) -> Tensor:
    trace = trace_of(program, pictures, None, classes)
    return GuidedBackprop().heatmap(trace, GenParams())


def test_equals_the_rule_on_paper() -> None:
    # Positive weights where the ReLU was open: red [[1, 0], [0, 1]], green [[0, 3], [0, 0]], blue minus green.
    (answer,) = explain(hand(nn.ReLU()), request(1, (0,), methods=("guided_backprop",)), hand_picture())
    red, green, blue = [[1, 0], [0, 1]], [[0, 3], [0, 0]], [[0, -3], [0, 0]]
    np.testing.assert_allclose(answer.maps[0].values, np.stack([red, green, blue], axis=-1), rtol=0, atol=1e-5 * 3)


@pytest.mark.filterwarnings("ignore:Setting backward hooks on ReLU")
def test_equals_captum_where_relu_modules_are_the_only_activation() -> None:
    net, program = deep("resnet18")
    pictures = images(2, SMALL)
    theirs: Tensor = CaptumGuidedBackprop(peer_copy(net)).attribute(pictures.clone().requires_grad_(), CLASSES)
    assert close_to(ours(program, pictures, CLASSES).movedim(-1, 1), theirs.detach()) < 1e-4


def oracle_64(module: nn.Module, pictures: Tensor, classes: list[int]) -> Tensor:
    inputs = pictures.double().requires_grad_()
    with GuidedRule():
        scores = peer_copy(module, torch.float64)(inputs)
    (gradient,) = torch.autograd.grad(scores[range(len(classes)), classes].sum(), inputs)
    return gradient


def test_equals_a_float64_oracle_of_the_rule() -> None:
    net, program = deep("resnet18")
    pictures = images(2, SMALL)
    assert close_to(ours(program, pictures, CLASSES).movedim(-1, 1), oracle_64(net, pictures, CLASSES)) < 1e-4


@pytest.mark.parametrize("activation", [nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish])
def test_other_activations_keep_their_derivative_behind_the_gate(activation: type[nn.Module]) -> None:
    net = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 3), activation(), nn.Conv2d(6, 4, 3), activation(), nn.Flatten(), nn.Linear(4 * 16, 8)
        )
    )
    pictures = 3 * images(2, 8)
    answer = ours(program_of(net, 8), pictures, CLASSES).movedim(-1, 1)
    assert close_to(answer, oracle_64(net, pictures, CLASSES)) < 1e-5


def test_a_picture_alone_equals_the_same_in_a_batch() -> None:
    pictures = images(3, 12)
    alone = torch.cat([ours(varied(), pictures[[index]], [index]) for index in range(3)])
    assert close_to(ours(varied(), pictures, [0, 1, 2]), alone) < 1e-5
