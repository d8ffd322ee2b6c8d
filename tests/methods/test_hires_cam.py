"""HiResCAM against numbers worked out by hand, pytorch-grad-cam, and the completeness that it promises."""

import numpy as np
import pytest
from pytorch_grad_cam import HiResCAM

from tests.methods.cams import modular, of_numbers, peer, raw
from tests.nets import SMALL, close_to, deep, explain, hand, hand_picture, images, request

NAME = "hires_cam"
CLASSES = [3, 6]


def test_equals_the_closed_form_on_paper() -> None:
    # Class 0: [[1, 0], [0, 4]] + [[40, 6], [-2, -8]], which adds up to the logit 41: the network is linear, no bias.
    # Class 1: -[[1, 2], [3, 4]] + [[0, 16], [0, 0]]
    (answer,) = explain(hand(), request(1, (0, 1), methods=(NAME,)), hand_picture())
    first, second = (one.values for one in answer.maps)
    np.testing.assert_allclose(first, [[41, 6], [-2, -4]], rtol=0, atol=1e-5 * 41)
    np.testing.assert_allclose(second, [[-1, 14], [-3, -4]], rtol=0, atol=1e-5 * 14)


@pytest.mark.parametrize(("network", "layer"), [("resnet18", "layer4"), ("resnet18", "layer3"), ("modular", "0")])
def test_equals_pytorch_grad_cam(network: str, layer: str) -> None:
    net, program = modular() if network == "modular" else deep(network)
    pictures = images(2, 12 if network == "modular" else SMALL)
    theirs = peer(HiResCAM, net, layer, pictures, CLASSES)
    assert close_to(raw(NAME, program, layer, pictures, CLASSES), theirs) < 1e-5


def test_parts_add_up_to_the_logit_before_a_linear_layer() -> None:
    net, program = modular()
    pictures = images(2, 12)
    logits = net(pictures) - net.get_submodule("5").bias
    total = raw(NAME, program, "3", pictures, CLASSES).sum(dim=(1, 2))
    assert close_to(total, logits[range(2), CLASSES]) < 1e-5


def test_a_modifier_of_the_gradient_comes_first() -> None:
    activation, gradient = images(1, 4), images(1, 4, seed=1)
    answer = of_numbers(NAME, activation, gradient, grad_modifier="absolute")
    assert close_to(answer, (gradient.abs() * activation).sum(dim=1)) < 1e-6
