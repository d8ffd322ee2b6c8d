"""Eigen-Grad-CAM against NumPy's singular value decomposition and pytorch-grad-cam."""

import numpy as np
import pytest
import torch
from pytorch_grad_cam import EigenGradCAM

from tests.methods.cams import eager_64, modular, of_numbers, peer, raw
from tests.nets import SMALL, close_to, deep, images

NAME = "eigen_grad_cam"
CLASSES = [3, 6]


@pytest.mark.parametrize(("network", "layer"), [("resnet18", "layer4"), ("modular", "0"), ("modular", "3")])
def test_equals_numpys_svd_with_the_sign_of_grad_cam(network: str, layer: str) -> None:
    net, program = modular() if network == "modular" else deep(network)
    pictures = images(2, 12 if network == "modular" else SMALL)
    activation, gradient, _ = eager_64(net, layer, pictures, CLASSES)
    grad_cam = torch.einsum("nc,nchw->nhw", gradient.mean(dim=(2, 3)), activation).numpy()
    ours = raw(NAME, program, layer, pictures, CLASSES)
    theirs = peer(EigenGradCAM, net, layer, pictures, CLASSES)
    for index in range(2):
        rows = (gradient * activation)[index].flatten(1).T.numpy()
        rows = rows - rows.mean(axis=0)
        _, _, axes = np.linalg.svd(rows, full_matrices=False)
        projected = (rows @ axes[0]).reshape(grad_cam[index].shape)
        sign = np.sign((projected * grad_cam[index]).sum())
        assert close_to(ours[index], sign * projected) < 1e-4
        assert abs(np.corrcoef(ours[index].ravel(), theirs[index].ravel())[0, 1]) > 0.9999


def test_the_sign_is_that_of_grad_cam_even_where_the_sum_says_otherwise() -> None:
    activation, gradient = images(8, 4, seed=3), images(8, 4, seed=4)
    maps = of_numbers(NAME, activation, gradient)
    weights = gradient.mean(dim=(2, 3), keepdim=True)
    grad_cam = (weights * activation).sum(dim=1)
    assert ((maps * grad_cam).sum(dim=(1, 2)) >= 0).all()
    assert ((maps * (gradient * activation).sum(dim=1)).sum(dim=(1, 2)) < 0).any(), "this sign is another"


def test_without_a_gradient_there_is_nothing() -> None:
    activation = images(1, 4)
    assert not of_numbers(NAME, activation, torch.zeros_like(activation)).any()


def test_a_picture_alone_equals_itself_in_a_batch() -> None:
    program, pictures = modular()[1], images(2, 12)
    batch = raw(NAME, program, "2", pictures, CLASSES)
    assert close_to(raw(NAME, program, "2", pictures[1:], CLASSES[1:]), batch[1:]) < 1e-5
