"""Saliency against numbers worked out by hand, captum, and keras-vis' modifiers written out."""

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from captum.attr import Saliency as CaptumSaliency
from torch import Tensor, nn

from service.explain.trace import Trace
from service.methods.saliency import Saliency, SaliencyParams
from service.models.program import Program
from service.models.resident import Model
from tests.nets import (
    SMALL,
    close_to,
    deep,
    explain,
    hand,
    hand_picture,
    images,
    peer_copy,
    request,
    residual,
    trace_of,
    varied,
)

CLASSES = [3, 7]


def trace(program: Program, pictures: Tensor, classes: list[int]) -> Trace:
    return trace_of(program, pictures, None, classes)


def ours(program: Program, pictures: Tensor, classes: list[int], **params: str | None) -> Tensor:
    return Saliency().heatmap(trace(program, pictures, classes), SaliencyParams.model_validate(params))


@cache
def rectified() -> Model:
    return hand(nn.ReLU())


# The gradient of class 0 of `hand(nn.ReLU())`: red [[1, 0], [0, 1]] (the ReLU was open everywhere), green where
# channel 1 was positive, [[0, 3], [-1, 0]], blue minus green.
@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, [[1, 3], [1, 1]]),
        ({"grad_modifier": None}, [[1, 3], [1, 1]]),
        ({"grad_modifier": "negate"}, [[0, 3], [1, 0]]),
        ({"grad_modifier": "relu"}, [[1, 3], [1, 1]]),
        ({"grad_modifier": "invert"}, [[1, 1 / 3], [1, 1]]),
        ({"grad_modifier": "small_values"}, [[1, 1 / 3], [1, 1]]),
        ({"backprop_modifier": "guided"}, [[1, 3], [0, 1]]),  # green and blue of (1, 0) came from the weight -1
        # The weights are [[-20, 3], [-1, 4]]: the positive ones pass though the ReLU was closed at (1, 1).
        ({"backprop_modifier": "deconv"}, [[1, 3], [0, 4]]),
        ({"backprop_modifier": "rectified"}, [[1, 3], [0, 4]]),
        ({"backprop_modifier": "guided", "grad_modifier": "negate"}, [[0, 3], [0, 0]]),
    ],
)
def test_equals_the_numbers_on_paper(params: dict[str, str | None], expected: list[list[float]]) -> None:
    asked = request(1, (0,), methods=("saliency",), gen_params=params)
    (answer,) = explain(rectified(), asked, hand_picture())
    np.testing.assert_allclose(answer.maps[0].values, expected, rtol=0, atol=1e-5)
    assert answer.maps[0].values.dtype == np.float32


def captum(module: nn.Module, pictures: Tensor, classes: list[int]) -> Tensor:
    method = CaptumSaliency(peer_copy(module))
    answer: Tensor = method.attribute(pictures.clone().requires_grad_(), classes, abs=True)
    return answer.detach().amax(dim=1)


def test_equals_captum() -> None:
    net, program = deep("resnet18")
    pictures = images(2, SMALL)
    assert close_to(ours(program, pictures, CLASSES), captum(net, pictures, CLASSES)) < 1e-4


@pytest.mark.parametrize("net", [varied, residual])
def test_a_picture_alone_equals_the_same_in_a_batch(net: Callable[[], Program]) -> None:
    program = net()
    pictures = images(3, 12)
    alone = torch.cat([ours(program, pictures[[index]], [index]) for index in range(3)])
    assert close_to(ours(program, pictures, [0, 1, 2]), alone) < 1e-5
