"""Layer-CAM against numbers worked out by hand and pytorch-grad-cam."""

import numpy as np
import pytest
from pytorch_grad_cam import LayerCAM

from tests.methods.cams import modular, of_numbers, peer, raw
from tests.nets import SMALL, close_to, deep, explain, hand, hand_picture, images, request

NAME = "layer_cam"
CLASSES = [3, 6]


def test_equals_the_closed_form_on_paper() -> None:
    # Class 0: [[1, 0], [0, 4]] + [[0, 6], [0, -8]]; class 1: [[0, 16], [0, 0]]
    (answer,) = explain(hand(), request(1, (0, 1), methods=(NAME,)), hand_picture())
    first, second = (one.values for one in answer.maps)
    np.testing.assert_allclose(first, [[1, 6], [0, -4]], rtol=0, atol=1e-5 * 6)
    np.testing.assert_allclose(second, [[0, 16], [0, 0]], rtol=0, atol=1e-5 * 16)


@pytest.mark.parametrize(("network", "layer"), [("resnet18", "layer4"), ("resnet18", "layer1"), ("modular", "0")])
def test_equals_pytorch_grad_cam(network: str, layer: str) -> None:
    net, program = modular() if network == "modular" else deep(network)
    pictures = images(2, 12 if network == "modular" else SMALL)
    theirs = peer(LayerCAM, net, layer, pictures, CLASSES)
    assert close_to(raw(NAME, program, layer, pictures, CLASSES), theirs) < 1e-5


def test_a_modifier_of_the_gradient_comes_before_its_relu() -> None:
    activation, gradient = images(1, 4), images(1, 4, seed=1)
    negated = of_numbers(NAME, activation, gradient, grad_modifier="negate")
    assert close_to(negated, ((-gradient).clamp(min=0) * activation).sum(dim=1)) < 1e-6
