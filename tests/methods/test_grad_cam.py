"""Grad-CAM against numbers worked out by hand, a float64 oracle, and pytorch-grad-cam on deep networks."""

import numpy as np
import pytest
import torch
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn
from torch.nn import functional as F

from service.methods.grad_cam import GradCam, GradCamParams
from service.models.program import Program
from tests.nets import (
    SMALL,
    Varied,
    close_to,
    deep,
    explain,
    hand,
    hand_picture,
    images,
    peer_copy,
    request,
    seeded,
    table,
    trace_of,
    varied,
)

CLASSES = [3, 7]


def ours(program: Program, layer: str, pictures: Tensor, classes: list[int], use_conv_only: bool = True) -> Tensor:
    target = table(program).target(layer, use_conv_only)
    return GradCam().heatmap(trace_of(program, pictures, target, classes), GradCamParams())


def test_equals_the_closed_form_on_paper() -> None:
    # No ReLU: the gradient is the linear's weights. Class 0: means 2/4 and -14/4; class 1: -4/4 and 8/4.
    (answer,) = explain(hand(), request(1, (0, 1), methods=("grad_cam",)), hand_picture())
    first, second = (raw.values for raw in answer.maps)
    # 0.5 [[1, 2], [3, 4]] - 3.5 [[-2, 2], [2, -2]], and -[[1, 2], [3, 4]] + 2 [[-2, 2], [2, -2]]
    np.testing.assert_allclose(first, [[7.5, -6.0], [-5.5, 9.0]], rtol=0, atol=1e-5 * 9)
    np.testing.assert_allclose(second, [[-5.0, 2.0], [1.0, -8.0]], rtol=0, atol=1e-5 * 8)
    assert first.dtype == second.dtype == np.float32


def test_takes_the_batch_norm_folded_into_its_convolution() -> None:
    # 0.5 [[2, 4], [6, 8]] - 3.5 [[-3, 1], [1, -3]]
    (answer,) = explain(hand(norm=True), request(1, (0,), methods=("grad_cam",)), hand_picture())
    np.testing.assert_allclose(answer.maps[0].values, [[11.5, -1.5], [-0.5, 14.5]], rtol=0, atol=1e-5 * 14.5)


def oracle_64(layer: str, pictures: Tensor, classes: list[int]) -> Tensor:
    """The paper's equations 1 and 2 in float64, on the eager network, its parts called one by one."""
    net = seeded(Varied).double()
    names = ["first", "second", "third"]
    value = pictures.double()
    activation = torch.zeros(0)
    for name in names:
        value = net.get_submodule(name)(value)
        if name == layer:
            activation = value = value.detach().requires_grad_()
        value = F.relu(value)
    logits = net.get_submodule("head")(value.flatten(1))
    total = torch.stack([logits[index, number] for index, number in enumerate(classes)]).sum()
    (gradient,) = torch.autograd.grad(total, activation)
    assert gradient.std(dim=(2, 3)).amax(dim=1).min() > 0, "the gradient should vary from place to place"
    n, c, h, w = activation.shape
    weights = gradient.reshape(n, c, h * w).sum(2) / (h * w)
    return torch.einsum("nc,nchw->nhw", weights, activation.detach())


@pytest.mark.parametrize("layer", ["first", "second", "third"])
def test_equals_float64_where_gradients_vary_from_place_to_place(layer: str) -> None:
    pictures = images(2, 12)
    assert close_to(ours(varied(), layer, pictures, [1, 6]), oracle_64(layer, pictures, [1, 6])) < 1e-5


def peer(module: nn.Module, layer: str, pictures: Tensor, classes: list[int]) -> Tensor:
    """pytorch-grad-cam's raw map at a module, and a check that its gradient is not zero."""
    twin = peer_copy(module)
    target = twin.get_submodule(layer)
    targets = [ClassifierOutputTarget(number) for number in classes]
    with GradCAM(twin, [target]) as cam:
        # A copy goes on, since `out += identity` would overwrite what the peer has kept.
        target.register_forward_hook(lambda _module, _inputs, output: output.clone())
        cam(pictures, targets)
        (activation,) = cam.activations_and_grads.activations
        (gradient,) = cam.activations_and_grads.gradients
    assert np.abs(gradient.numpy()).max() > 0
    return torch.from_numpy(
        cam.get_cam_image(pictures, target, targets, activation.numpy(), gradient.numpy(), eigen_smooth=False)
    )


@pytest.mark.parametrize(
    ("network", "layer", "module"),
    [
        ("resnet18", "layer4.1.conv2", "layer4.1.bn2"),
        ("resnet18", "layer3.0.conv1", "layer3.0.bn1"),
        ("resnet18", "layer2.1.conv2", "layer2.1.bn2"),
        ("densenet121", "features.denseblock4.denselayer16.conv2", "features.denseblock4.denselayer16.conv2"),
        ("densenet121", "features.denseblock3.denselayer5.conv1", "features.denseblock3.denselayer5.norm2"),
        ("densenet121", "features.transition2.conv", "features.transition2.conv"),
        ("mobilenet_v3_small", "features.12.0", "features.12.1"),
        ("mobilenet_v3_small", "features.6.block.1.0", "features.6.block.1.1"),
        ("mobilenet_v3_small", "features.3.block.2.0", "features.3.block.2.1"),
    ],
)
def test_equals_pytorch_grad_cam(network: str, layer: str, module: str) -> None:
    """A convolution that a batch norm alone reads is compared at the batch norm."""
    net, program = deep(network)
    pictures = images(2, SMALL)
    assert close_to(ours(program, layer, pictures, CLASSES), peer(net, module, pictures, CLASSES)) < 1e-5
