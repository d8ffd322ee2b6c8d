"""XGrad-CAM against numbers worked out by hand, pytorch-grad-cam, and the axiom that it is named after."""

import numpy as np
import pytest
from pytorch_grad_cam import XGradCAM

from tests.methods.cams import eager_64, modular, of_numbers, peer, raw
from tests.nets import SMALL, close_to, deep, explain, hand, hand_picture, images, request

NAME = "xgrad_cam"
CLASSES = [3, 6]


def test_equals_the_closed_form_on_paper() -> None:
    # Class 0: (1 + 4) / 10; class 1: -10 / 10. Channel 1 adds up to 0 and counts nothing.
    (answer,) = explain(hand(), request(1, (0, 1), methods=(NAME,)), hand_picture())
    first, second = (one.values for one in answer.maps)
    np.testing.assert_allclose(first, [[0.5, 1], [1.5, 2]], rtol=0, atol=1e-5 * 2)
    np.testing.assert_allclose(second, [[-1, -2], [-3, -4]], rtol=0, atol=1e-5 * 4)


@pytest.mark.parametrize(("network", "layer"), [("resnet18", "layer4"), ("resnet18", "layer3"), ("modular", "3")])
def test_equals_pytorch_grad_cam_behind_a_relu(network: str, layer: str) -> None:
    net, program = modular() if network == "modular" else deep(network)
    pictures = images(2, 12 if network == "modular" else SMALL)
    theirs = peer(XGradCAM, net, layer, pictures, CLASSES)
    assert close_to(raw(NAME, program, layer, pictures, CLASSES), theirs) < 1e-5


@pytest.mark.parametrize("layer", ["0", "3"])
def test_a_map_adds_up_to_the_gradient_times_the_activation(layer: str) -> None:
    """The paper's axioms: sum_k w_k S_k is sum(g A)."""
    net, program = modular()
    pictures = images(2, 12)
    activation, gradient, _ = eager_64(net, layer, pictures, CLASSES)
    total = raw(NAME, program, layer, pictures, CLASSES).sum(dim=(1, 2))
    assert close_to(total, (activation * gradient).sum(dim=(1, 2, 3))) < 1e-4


def test_a_modifier_of_the_gradient_comes_first() -> None:
    activation, gradient = images(1, 4).abs(), images(1, 4, seed=1)
    answer = of_numbers(NAME, activation, gradient, grad_modifier="relu")
    assert close_to(answer, of_numbers(NAME, activation, gradient.clamp(min=0))) == 0
    assert close_to(answer, of_numbers(NAME, activation, gradient)) > 0.1
