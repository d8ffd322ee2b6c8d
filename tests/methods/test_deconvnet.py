"""The deconvolution network's gradient against numbers worked out by hand, captum, and a float64 oracle of the rule."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import Deconvolution
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from service.explain.method import GenParams
from service.explain.trace import Pass
from service.methods.deconvnet import Deconvnet
from service.models.program import Program
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
    return Deconvnet().heatmap(trace, GenParams())


def test_equals_the_rule_on_paper() -> None:
    # Positive weights, though the ReLU was closed at (1, 1) of channel 1: green [[0, 3], [0, 4]], blue minus green.
    (answer,) = explain(hand(nn.ReLU()), request(1, (0,), methods=("deconvnet",)), hand_picture())
    red, green, blue = [[1, 0], [0, 1]], [[0, 3], [0, 4]], [[0, -3], [0, -4]]
    np.testing.assert_allclose(answer.maps[0].values, np.stack([red, green, blue], axis=-1), rtol=0, atol=1e-5 * 4)


class DeconvRule(TorchFunctionMode):
    """Every ReLU passes positive output gradients whatever its input was; others these times their derivative."""

    others = frozenset({F.relu6, F.hardtanh, F.hardswish, F.silu, F.gelu})

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in {F.relu, torch.relu, Tensor.relu}:
            result = args[0] + (result - args[0]).detach()  # the ReLU's value with a derivative of 1
        elif func not in self.others:
            return result
        assert result.requires_grad
        result.register_hook(lambda gradient: gradient * (gradient > 0))
        return result


def oracle_64(module: nn.Module, pictures: Tensor, classes: list[int]) -> Tensor:
    inputs = pictures.double().requires_grad_()
    with DeconvRule():
        scores = peer_copy(module, torch.float64)(inputs)
    (gradient,) = torch.autograd.grad(scores[range(len(classes)), classes].sum(), inputs)
    return gradient


def test_equals_a_float64_oracle_of_the_rule() -> None:
    net, program = deep("resnet18")
    pictures = images(2, SMALL)
    assert close_to(ours(program, pictures, CLASSES).movedim(-1, 1), oracle_64(net, pictures, CLASSES)) < 1e-4


def with_activation(activation: type[nn.Module]) -> nn.Module:
    layers = nn.Conv2d(3, 6, 3), activation(), nn.Conv2d(6, 4, 3), activation(), nn.Flatten(), nn.Linear(4 * 16, 8)
    return nn.Sequential(*layers)


@pytest.mark.parametrize("activation", [nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish])
def test_other_activations_keep_their_derivative_behind_the_gate(activation: type[nn.Module]) -> None:
    net = seeded(lambda: with_activation(activation))
    pictures = 3 * images(2, 8)
    answer = ours(program_of(net, 8), pictures, CLASSES).movedim(-1, 1)
    assert close_to(answer, oracle_64(net, pictures, CLASSES)) < 1e-5


@pytest.mark.filterwarnings("ignore:Setting backward hooks on ReLU")
def test_equals_captum_where_relu_modules_are_the_only_activation() -> None:
    net, program = deep("resnet18")
    pictures = images(2, SMALL)
    theirs: Tensor = Deconvolution(peer_copy(net)).attribute(pictures.clone().requires_grad_(), CLASSES)
    assert close_to(ours(program, pictures, CLASSES).movedim(-1, 1), theirs.detach()) < 1e-4


@pytest.mark.filterwarnings("ignore:Setting backward hooks on ReLU")
def test_differs_from_captum_by_design_where_other_activations_are() -> None:
    """Captum leaves Hardswish ungated: its answer is the plain gradient, ours is the oracle of the test above."""
    net = seeded(lambda: with_activation(nn.Hardswish))
    pictures = 3 * images(1, 8)
    theirs: Tensor = Deconvolution(peer_copy(net)).attribute(pictures.clone().requires_grad_(), CLASSES[:1])
    program = program_of(net, 8)
    plain = Pass(program, pictures).backward(torch.tensor(CLASSES[:1])).trace().image_gradient
    assert close_to(theirs.detach(), plain) < 1e-5
    assert close_to(ours(program, pictures, CLASSES[:1]).movedim(-1, 1), theirs.detach()) > 0.1


def test_a_picture_alone_equals_the_same_in_a_batch() -> None:
    pictures = images(3, 12)
    alone = torch.cat([ours(varied(), pictures[[index]], [index]) for index in range(3)])
    assert close_to(ours(varied(), pictures, [0, 1, 2]), alone) < 1e-5
