"""Finer-CAM against numbers worked out by hand and float64 autograd; and where pytorch-grad-cam differs."""

import numpy as np
import pytest
import torch
from pytorch_grad_cam import FinerCAM, GradCAM
from torch import Tensor, nn

from service.methods.finer_cam import FinerCam
from tests.methods.cams import eager_64, modular, peer, raw
from tests.nets import SMALL, close_to, deep, explain, hand, hand_picture, images, peer_copy, program_of, request

NAME = "finer_cam"
CLASSES = [3, 6]


def test_equals_the_difference_on_paper() -> None:
    # There is one other class, whatever `references` says. Grad-CAM of class 0 is [[7.5, -6], [-5.5, 9]], of class 1
    # [[-5, 2], [1, -8]]: the first minus the second, and minus half the second.
    model, asked = hand(), request(1, (0,), methods=(NAME,))
    (answer,) = explain(model, asked, hand_picture())
    np.testing.assert_allclose(answer.maps[0].values, [[12.5, -8], [-6.5, 17]], rtol=0, atol=1e-5 * 17)
    asked = request(1, (0,), methods=(NAME,), gen_params={"alpha": 0.5})
    (answer,) = explain(model, asked, hand_picture())
    np.testing.assert_allclose(answer.maps[0].values, [[10, -7], [-6, 13]], rtol=0, atol=1e-5 * 13)


def contrast(logits: Tensor, classes: list[int], alpha: float, references: int) -> Tensor:
    """The weight of each logit, one picture after the other, (N,classes)."""
    weights = torch.zeros_like(logits)
    for index, number in enumerate(classes):
        others = [other for other in range(logits.shape[1]) if other != number]
        others.sort(key=lambda other: abs(float(logits[index, other] - logits[index, number])))
        chosen = others[:references]
        probabilities = logits[index].softmax(dim=0)[chosen]
        weights[index, number] = 1
        weights[index, chosen] = -alpha * probabilities / probabilities.sum()
    return weights


def oracle_64(
    module: nn.Module, layer: str, pictures: Tensor, classes: list[int], alpha: float, references: int
) -> Tensor:
    logits = eager_64(module, layer, pictures, classes)[2]
    weights = contrast(logits, classes, alpha, references)
    activation, gradient, _ = eager_64(module, layer, pictures, weights)
    return torch.einsum("nc,nchw->nhw", gradient.mean(dim=(2, 3)), activation)


@pytest.mark.parametrize(("alpha", "references"), [(1.0, 3), (0.6, 1), (1.0, 6), (2.0, 100)])
def test_equals_float64_of_the_contrast(alpha: float, references: int) -> None:
    net, program = modular()
    pictures = images(2, 12)
    answer = raw(NAME, program, "0", pictures, CLASSES, alpha=alpha, references=references)
    assert close_to(answer, oracle_64(net, "0", pictures, CLASSES, alpha, references)) < 1e-5


def test_equals_float64_of_the_contrast_on_a_deep_network() -> None:
    net, program = deep("resnet18")
    pictures = images(2, SMALL)
    answer = raw(NAME, program, "layer4", pictures, CLASSES)
    assert close_to(answer, oracle_64(net, "layer4", pictures, CLASSES, 1.0, 3)) < 1e-4


def test_without_alpha_is_grad_cam() -> None:
    program, pictures = modular()[1], images(2, 12)
    answer = raw(NAME, program, "2", pictures, CLASSES, alpha=0.0)
    assert close_to(answer, raw("grad_cam", program, "2", pictures, CLASSES)) < 1e-5


def test_a_contrast_with_constant_weights_is_where_pytorch_grad_cam_differs() -> None:
    """With constant weights the map is Grad-CAM of the class minus that of the references, by the peer's own Grad-CAM.

    Its Finer-CAM lets the gradient through the probabilities, too.
    """
    net, program = modular()
    pictures = 10 * images(1, 12)
    logits = net(pictures)
    top = int(logits.argmax())
    weights = contrast(logits, [top], 1.0, 3)
    constant = peer(GradCAM, net, "0", pictures, [top], targets=[lambda scores: (scores * weights[0]).sum()])
    ours = raw(NAME, program, "0", pictures, [top])
    assert close_to(ours, constant) < 1e-5
    singly = [peer(GradCAM, net, "0", pictures, [number]) for number in range(7)]
    difference = torch.stack([weight * one for weight, one in zip(weights[0], singly, strict=True)]).sum(dim=0)
    assert close_to(ours, difference) < 1e-5
    twin = peer_copy(net)
    with FinerCAM(twin, [twin.get_submodule("0")]) as theirs:
        scaled = torch.from_numpy(theirs(pictures))[0]
    fine = nn.functional.interpolate(ours.clamp(min=0)[None], size=12, mode="bilinear")[0, 0]
    assert close_to(scaled, (fine - fine.min()) / (fine.max() - fine.min())) > 0.01


def test_a_network_of_one_class_is_refused() -> None:
    net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(32, 1)).eval()
    reason = FinerCam().refusal(program_of(net, 6), None)
    assert reason == "it has but one class, and there is no other to compare with"
    assert FinerCam().refusal(modular()[1], None) is None


def test_a_picture_alone_equals_itself_in_a_batch() -> None:
    program, pictures = modular()[1], images(2, 12)
    batch = raw(NAME, program, "2", pictures, CLASSES)
    assert close_to(raw(NAME, program, "2", pictures[1:], CLASSES[1:]), batch[1:]) < 1e-5
