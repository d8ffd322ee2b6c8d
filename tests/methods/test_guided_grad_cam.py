"""Guided Grad-CAM against numbers worked out by hand, captum, and a float64 oracle of the guided rule."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import GuidedGradCam as CaptumGuidedGradCam
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from service.explain.method import LayerParams
from service.methods.guided_grad_cam import GuidedGradCam
from service.models.program import Program
from tests.nets import SMALL, close_to, deep, explain, hand, hand_picture, images, peer_copy, request, table, trace_of

CLASSES = [3, 7]
# The module whose output each network's default layer is read at: the batch norm behind the convolution.
DEFAULTS = {
    "resnet18": "layer4.1.bn2",
    "densenet121": "features.denseblock4.denselayer16.conv2",
    "mobilenet_v3_small": "features.12.1",
}


def ours(program: Program, pictures: Tensor, classes: list[int]) -> Tensor:
    trace = trace_of(program, pictures, table(program).target(None, True), classes)
    return GuidedGradCam().heatmap(trace, LayerParams())


def test_equals_the_product_on_paper() -> None:
    # Grad-CAM at the convolution: 0.5 [[1, 2], [3, 4]] + 0.5 [[-2, 2], [2, -2]] = [[-0.5, 2], [2.5, 1]].
    # Guided: the ReLU passes max(weights, 0) where it was positive. Red [[1, 0], [0, 1]]; green [[0, 3], [0, 0]],
    # whose weight -1 at (1, 0) is clipped; blue is minus green.
    (answer,) = explain(hand(nn.ReLU()), request(1, (0,), methods=("guided_grad_cam",)), hand_picture())
    red, green, blue = [[0, 0], [0, 1]], [[0, 6], [0, 0]], [[0, -6], [0, 0]]
    np.testing.assert_allclose(answer.maps[0].values, np.stack([red, green, blue], axis=-1), rtol=0, atol=1e-5 * 6)


class GuidedRule(TorchFunctionMode):
    """Every call of an activation function, however it is made, lets positive output gradients through alone."""

    rules = frozenset({F.relu, F.relu6, F.hardtanh, F.hardswish, F.silu, F.gelu, torch.relu, Tensor.relu})

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in self.rules:
            assert result.requires_grad
            result.register_hook(lambda gradient: gradient * (gradient > 0))
        return result


def oracle_64(module: nn.Module, layer: str, pictures: Tensor, classes: list[int]) -> tuple[Tensor, Tensor]:
    """Guided Grad-CAM and the guided gradient in float64 by plain autograd on an eager copy, (N,3,H,W) both."""
    twin = peer_copy(module, torch.float64)
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        seen.append(output)
        return output.clone()  # `out += identity` would overwrite what was kept

    handle = twin.get_submodule(layer).register_forward_hook(keep)
    total = twin(pictures.double())[range(len(classes)), classes].sum()
    handle.remove()
    (gradient,) = torch.autograd.grad(total, seen[0])
    assert gradient.abs().max() > 0
    coarse = torch.einsum("nc,nchw->nhw", gradient.mean(dim=(2, 3)), seen[0].detach()).relu()
    fine = F.interpolate(coarse[:, None], pictures.shape[2:], mode="bilinear", align_corners=False)
    inputs = pictures.double().requires_grad_()
    with GuidedRule():
        scores = twin(inputs)
    (guided,) = torch.autograd.grad(scores[range(len(classes)), classes].sum(), inputs)
    return fine * guided, guided


def captum(module: nn.Module, layer: str, pictures: Tensor, classes: list[int]) -> Tensor:
    """Captum's answer; it warns of the hooks that it sets and removes."""
    twin = peer_copy(module)
    method = CaptumGuidedGradCam(twin, twin.get_submodule(layer))
    answer: Tensor = method.attribute(pictures.clone().requires_grad_(), classes, interpolate_mode="bilinear")
    return answer.detach()


def correlation(one: Tensor, other: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([one.flatten().double(), other.flatten().double()]))[0, 1])


@pytest.mark.filterwarnings("ignore:Setting backward hooks on ReLU")
def test_equals_captum_where_relu_modules_are_the_only_activation() -> None:
    net, program = deep("resnet18")
    pictures = images(2, SMALL)
    answer = ours(program, pictures, CLASSES)
    assert answer.shape == (2, SMALL, SMALL, 3)
    assert close_to(answer.movedim(-1, 1), captum(net, DEFAULTS["resnet18"], pictures, CLASSES)) < 1e-5


@pytest.mark.parametrize("network", list(DEFAULTS))
def test_equals_a_float64_oracle_of_the_guided_rule(network: str) -> None:
    net, program = deep(network)
    pictures = images(2, SMALL)
    answer = ours(program, pictures, CLASSES).movedim(-1, 1)
    oracle, guided = oracle_64(net, DEFAULTS[network], pictures, CLASSES)
    assert close_to(answer, oracle) < 1e-4
    trace = trace_of(program, pictures, table(program).target(None, True), CLASSES)
    assert close_to(trace.image_gradient_under("guided"), guided) < 1e-4


@pytest.mark.filterwarnings("ignore:Setting backward hooks on ReLU")
@pytest.mark.parametrize(("network", "least"), [("densenet121", 0.1), ("mobilenet_v3_small", 0.5)])
def test_differs_from_captum_by_design_where_other_activations_are(network: str, least: float) -> None:
    """Captum leaves `F.relu` and Hardswish unguided."""
    net, program = deep(network)
    pictures = images(1, SMALL)
    theirs = captum(net, DEFAULTS[network], pictures, CLASSES[:1])
    assert close_to(ours(program, pictures, CLASSES[:1]).movedim(-1, 1), theirs) > least
