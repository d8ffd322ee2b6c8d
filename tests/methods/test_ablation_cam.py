"""Ablation-CAM against numbers worked out by hand, a plain loop in float64, and pytorch-grad-cam behind ReLUs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from pytorch_grad_cam import AblationCAM
from pytorch_grad_cam.ablation_layer import AblationLayer
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from service.explain.means import Means
from service.explain.method import CamParams
from service.explain.trace import Pass
from service.methods.ablation_cam import AblationCam
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
    program_of,
    request,
    seeded,
    table,
    trace_of,
    varied,
)

CLASSES = [1, 6]


def ours(program: Program, layer: str, pictures: Tensor, classes: list[int], use_conv_only: bool = True) -> Tensor:
    target = table(program).target(layer, use_conv_only)
    return AblationCam().heatmap(trace_of(program, pictures, target, classes), CamParams())


def test_equals_the_numbers_on_paper() -> None:
    # No ReLU: the first channel adds 1 + 4 to the score, the second 40 + 6 - 2 - 8; without one the other is left.
    (answer,) = explain(hand(), request(1, (0,), methods=("ablation_cam",)), hand_picture())
    # (5 [[1, 2], [3, 4]] + 36 [[-2, 2], [2, -2]]) / 41
    expected = np.array([[-67, 82], [87, -52]]) / 41
    np.testing.assert_allclose(answer.maps[0].values, expected, rtol=0, atol=1e-5 * 2)
    assert answer.maps[0].values.dtype == np.float32


def test_a_score_of_zero_has_no_parts() -> None:
    # Class 1: -(1 + 2 + 3 + 10) + 8 * 2 = 0.
    (answer,) = explain(hand(), request(1, (1,), methods=("ablation_cam",)), hand_picture(last_red=10))
    np.testing.assert_array_equal(answer.maps[0].values, np.zeros((2, 2)))


Tail = Callable[[nn.Module, Tensor], Tensor]
"""What follows a layer in an eager network, part by part: from the layer's value to the logits."""


def oracle_64(
    module: nn.Module,
    layer: str,
    tail: Tail,
    pictures: Tensor,
    classes: list[int],
    places: Callable[[Tensor], Tensor] = lambda value: value,
) -> Tensor:
    """A plain loop in float64, (N,hw). `places` views the layer's value with its channels second, without prefix."""
    twin = peer_copy(module, torch.float64).requires_grad_(False)
    seen: list[Tensor] = []
    with twin.get_submodule(layer).register_forward_hook(lambda *args: seen.append(args[2].clone())):
        logits = twin(pictures.double())
    maps = []
    for n, number in enumerate(classes):
        value = seen[0][n : n + 1]
        activation = places(value)[0].flatten(1)
        total = torch.zeros_like(activation[0])
        for k, channel in enumerate(activation):
            ablated = value.clone()
            places(ablated)[:, k] = 0
            y = logits[n, number]
            total += (y - tail(twin, ablated)[0, number]) / y * channel
        maps.append(total)
    return torch.stack(maps)


def varied_tail(after: list[str]) -> Tail:
    def tail(net: nn.Module, value: Tensor) -> Tensor:
        for name in after:
            value = net.get_submodule(name)(value.relu())
        logits: Tensor = net.get_submodule("head")(value.relu().flatten(1))
        return logits

    return tail


@pytest.mark.parametrize(("layer", "after"), [("first", ["second", "third"]), ("second", ["third"]), ("third", [])])
def test_equals_a_plain_loop_in_float64(layer: str, after: list[str]) -> None:
    pictures = images(2, 12)
    oracle = oracle_64(seeded(Varied), layer, varied_tail(after), pictures, CLASSES)
    assert close_to(ours(varied(), layer, pictures, CLASSES).flatten(1), oracle) < 1e-5


def resnet_tail(net: nn.Module, value: Tensor) -> Tensor:
    logits: Tensor = net.get_submodule("fc")(value.mean(dim=(2, 3)))
    return logits


def swin_tail(net: nn.Module, value: Tensor) -> Tensor:
    logits: Tensor = net.get_submodule("head")(net.get_submodule("norm")(value).mean(dim=(1, 2)))
    return logits


@pytest.mark.parametrize(
    ("network", "layer", "tail", "places"),
    [
        ("resnet18", "layer4", resnet_tail, lambda value: value),
        ("swin_t", "features.7", swin_tail, lambda value: value.movedim(3, 1)),
    ],
)
def test_equals_the_loop_on_deep_networks(
    network: str, layer: str, tail: Tail, places: Callable[[Tensor], Tensor]
) -> None:
    """With its channels second, and last."""
    net, program = deep(network)
    pictures = images(1, SMALL)
    oracle = oracle_64(net, layer, tail, pictures, [3], places)
    assert close_to(ours(program, layer, pictures, [3]).flatten(1), oracle) < 1e-4


def vit() -> nn.Module:
    net: nn.Module = VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=12, mlp_dim=16, num_classes=7)
    return net


def vit_tail(net: nn.Module, value: Tensor) -> Tensor:
    value = net.get_submodule("encoder.ln")(net.get_submodule("encoder.layers.encoder_layer_1")(value))
    logits: Tensor = net.get_submodule("heads")(value[:, 0])
    return logits


def test_equals_the_loop_on_tokens() -> None:
    """The class token keeps its channels: it belongs to no place."""
    net, layer, pictures = seeded(vit), "encoder.layers.encoder_layer_0", images(2, 32)
    oracle = oracle_64(net, layer, vit_tail, pictures, CLASSES, lambda value: value[:, 1:].mT)
    assert close_to(ours(program_of(net, 32), layer, pictures, CLASSES).flatten(1), oracle) < 1e-4


def peer(net: nn.Module, layer: str, pictures: Tensor, classes: list[int]) -> Tensor:
    """pytorch-grad-cam's raw map at a module."""
    twin = peer_copy(net)
    targets = [ClassifierOutputTarget(number) for number in classes]
    module = twin.get_submodule(layer)
    with AblationCAM(twin, [module], ablation_layer=AblationLayer()) as cam, torch.no_grad():
        cam.activations_and_grads(pictures)
        activation = cam.activations_and_grads.activations[0].numpy()
        return torch.from_numpy(cam.get_cam_image(pictures, module, targets, activation, None))


def test_equals_pytorch_grad_cam_behind_a_relu() -> None:
    """The output of a block of ResNet, which a ReLU makes: where the smallest value is 0, the peer too sets 0."""
    net, program = deep("resnet18")
    pictures = images(1, SMALL)
    assert close_to(ours(program, "layer1", pictures, [3]), peer(net, "layer1", pictures, [3])) < 1e-4


def modular() -> nn.Module:
    """A network whose first layer is followed by no ReLU, which would make 0 of anything negative."""
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(320, 7))


def test_pytorch_grad_cam_ablates_with_minus_ten_million_where_values_are_negative() -> None:
    """The paper sets 0 (its section 3), as ours does; the peer's own value makes weights of millions."""
    net = seeded(modular)
    pictures = images(2, 12)
    program = program_of(net, 12)

    def tail(net: nn.Module, value: Tensor) -> Tensor:
        for part in list(net.children())[1:]:
            value = part(value)
        return value

    oracle = oracle_64(net, "0", tail, pictures, CLASSES)
    assert close_to(ours(program, "0", pictures, CLASSES).flatten(1), oracle) < 1e-5
    assert close_to(peer(net, "0", pictures, CLASSES).flatten(1), oracle) > 1e3


def test_alone_equals_in_a_batch_and_beside_other_layers() -> None:
    pictures = images(2, 12)
    both = ours(varied(), "second", pictures, CLASSES)
    second, third = (table(varied()).target(name, True) for name in ("second", "third"))
    for index, number in enumerate(CLASSES):
        one = Pass(varied(), pictures[index : index + 1], [second, third])
        alone = AblationCam().heatmap(one.backward(torch.tensor([number])).trace(second), CamParams())
        assert close_to(alone[0], both[index]) < 1e-5


def test_reads_a_score_by_the_same_means_as_those_without_a_channel() -> None:
    """What predicts whole images may be another precision: its y would not be that of the tail."""

    def predict(images: Tensor) -> Tensor:
        return torch.full((len(images), 7), torch.nan)

    pictures = images(1, 12)
    target = table(varied()).target("second", True)
    one = Pass(varied(), pictures, [target], means=Means(predict))
    assert one.logits.isnan().all()
    answer = AblationCam().heatmap(one.backward(torch.tensor([1])).trace(target), CamParams())
    assert close_to(answer, ours(varied(), "second", pictures, [1])) < 1e-5


def test_serves_every_layer() -> None:
    assert AblationCam().refusal(varied(), table(varied()).target("second", True)) is None
