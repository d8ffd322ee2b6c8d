"""Input times gradient against numbers worked out by hand and captum."""

import numpy as np
import pytest
import torch
from captum.attr import InputXGradient as CaptumInputXGradient
from torch import Tensor, nn

from service.explain.method import GenParams
from service.methods.input_x_gradient import InputXGradient
from service.models.program import Program
from tests.nets import SMALL, close_to, deep, explain, hand, hand_picture, images, peer_copy, request, trace_of, varied

CLASSES = [3, 7]


def ours(program: Program, pictures: Tensor, classes: list[int]) -> Tensor:
    trace = trace_of(program, pictures, None, classes)
    return InputXGradient().heatmap(trace, GenParams())


def test_equals_the_product_on_paper() -> None:
    # Red [[1, 2], [3, 4]] times [[1, 0], [0, 1]]; green [[0, 2], [2, 0]] times [[0, 3], [-1, 0]]; blue is 0 there.
    (answer,) = explain(hand(nn.ReLU()), request(1, (0,), methods=("input_x_gradient",)), hand_picture())
    red, green, blue = [[1, 0], [0, 4]], [[0, 6], [-2, 0]], [[0, 0], [0, 0]]
    np.testing.assert_allclose(answer.maps[0].values, np.stack([red, green, blue], axis=-1), rtol=0, atol=1e-5 * 6)
    assert answer.maps[0].values.sum() == pytest.approx(9)  # the logit: the network has no bias


def captum(module: nn.Module, pictures: Tensor, classes: list[int]) -> Tensor:
    method = CaptumInputXGradient(peer_copy(module))
    answer: Tensor = method.attribute(pictures.clone().requires_grad_(), classes)
    return answer.detach()


def test_equals_captum() -> None:
    net, program = deep("resnet18")
    pictures = images(2, SMALL)
    answer = ours(program, pictures, CLASSES)
    assert answer.shape == (2, SMALL, SMALL, 3)
    assert answer.min() < 0 < answer.max()
    assert close_to(answer.movedim(-1, 1), captum(net, pictures, CLASSES)) < 1e-4


def test_a_picture_alone_equals_the_same_in_a_batch() -> None:
    pictures = images(3, 12)
    alone = torch.cat([ours(varied(), pictures[[index]], [index]) for index in range(3)])
    assert close_to(ours(varied(), pictures, [0, 1, 2]), alone) < 1e-5
