"""FullGrad against numbers worked out by hand, its completeness, a float64 oracle, and pytorch-grad-cam."""

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from pytorch_grad_cam import FullGrad as PeerFullGrad
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, ResNet

from service.explain.mathematics import minmax
from service.explain.method import ScaledParams
from service.explain.trace import Trace
from service.methods.full_grad import FullGrad, parts
from service.models.program import Program
from tests.nets import (
    Residual,
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
    trace_of,
)

CLASSES = [1, 4]


def with_statistics(build: Callable[[], nn.Module]) -> nn.Module:
    """A network whose batch norms shift and scale, and whose biases are all large; both are 0 or small at first."""
    module = seeded(build)
    generator = torch.Generator().manual_seed(1)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d | nn.BatchNorm1d):
            for values in (part.weight, part.running_var):
                if values is not None:
                    values.copy_(0.5 + torch.rand(values.shape, generator=generator))
            assert part.running_mean is not None
            part.running_mean.normal_(0, 0.3, generator=generator)
        if isinstance(bias := getattr(part, "bias", None), Tensor):
            bias.normal_(0, 0.3, generator=generator)
    return module


class Mixed(nn.Module):
    """Padding by name, a batch norm without gain and shift, linear layers on (N,h,w,C) and on (N,C), a 1-d norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding="same")
        self.norm = nn.BatchNorm2d(6, affine=False)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.last = nn.Linear(4, 5)
        self.hidden = nn.Linear(5, 8)
        self.flat = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 7, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.up(F.relu(self.norm(self.conv(x)))))
        x = F.relu(self.last(x.movedim(1, -1))).amax(dim=(1, 2))
        scores: Tensor = self.head(F.relu(self.flat(self.hidden(x))))
        return scores


class Hyper(nn.Module):
    """A convolution whose weight is normalised over a batch of its own, and one whose bias is made of the picture."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.second = nn.Conv2d(4, 4, 3)
        self.head = nn.Linear(4, 7)

    def forward(self, x: Tensor) -> Tensor:
        made = self.first.weight.reshape(1, 4, -1)
        weight = F.batch_norm(made, None, None, training=True).reshape_as(self.first.weight)
        x = F.relu(F.conv2d(x, weight, self.first.bias))
        x = F.relu(F.conv2d(x, self.second.weight, x.mean(dim=(0, 2, 3))))
        scores: Tensor = self.head(x.mean(dim=(2, 3)))
        return scores


def small_resnet() -> nn.Module:
    net: nn.Module = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=7)
    return net


@cache
def captured(build: Callable[[], nn.Module], size: int) -> tuple[nn.Module, Program]:
    net = with_statistics(build)
    return net, program_of(net, size)


def trace(program: Program, pictures: Tensor, classes: list[int]) -> Trace:
    return trace_of(program, pictures, None, classes)


def ours(program: Program, pictures: Tensor, classes: list[int]) -> Tensor:
    return FullGrad().heatmap(trace(program, pictures, classes), ScaledParams())


def test_equals_the_numbers_on_paper() -> None:
    # The batch norm has the gains 2 and 1 and adds 0 and 1 - 2 * 2/2 = -1, and its values are [[2, 4], [6, 8]] and
    # [[-3, 1], [1, -3]]. Behind the ReLU class 0 has the weights [[1, 0], [0, 1]] and [[., 3], [-1, .]].
    # |x dy/dx| of red is [[2, 0], [0, 8]], of green [[0, 6], [2, 0]], of blue 0. The first channel has no bias, that of
    # the second times its gradient is [[0, -3], [1, 0]]. Each is divided by its maximum, all minima being 0.
    (answer,) = explain(hand(nn.ReLU(), norm=True), request(1, (0,), methods=("full_grad",)), hand_picture())
    expected = [[0.25, 1 + 1], [1 / 3 + 1 / 3, 1]]
    np.testing.assert_allclose(answer.maps[0].values, expected, rtol=0, atol=1e-5 * 2)
    assert answer.maps[0].values.dtype == np.float32


def totals(all_parts: list[Tensor]) -> Tensor:
    return torch.stack([part.flatten(1).sum(dim=1) for part in all_parts]).sum(dim=0)


@pytest.mark.parametrize(
    ("build", "size", "placed", "placeless"),
    [(Varied, 12, 4, 1), (Residual, 12, 4, 1), (Mixed, 12, 4, 3), (small_resnet, 64, 13, 1)],
    ids=["varied", "residual", "mixed", "resnet"],
)
def test_its_parts_add_up_to_the_score(build: Callable[[], nn.Module], size: int, placed: int, placeless: int) -> None:
    """On networks of ReLUs; no group of parts could be left out."""
    net, program = captured(build, size)
    pictures = images(2, size)
    with_place, without = parts(trace(program, pictures, CLASSES))
    assert (len(with_place), len(without)) == (placed, placeless)
    assert all(part.ndim == 4 and len(part) == 2 for part in with_place)
    scores = peer_copy(net, torch.float64)(pictures.double())[[0, 1], CLASSES].detach()
    assert close_to(totals([*with_place, *without]), scores) < 1e-4
    for left_out in range(len(with_place + without)):
        rest = [part for number, part in enumerate(with_place + without) if number != left_out]
        assert close_to(totals(rest), scores) > 1e-3


def test_its_parts_add_up_on_a_deep_network() -> None:
    net, program = deep("resnet18")
    pictures = images(2, 96)
    scores = peer_copy(net, torch.float64)(pictures.double())[[0, 1], CLASSES].detach()
    placed, placeless = parts(trace(program, pictures, CLASSES))
    assert close_to(totals([*placed, *placeless]), scores) < 1e-4


def test_takes_no_bias_that_is_made_of_the_picture_and_no_norm_of_a_weight() -> None:
    placed, placeless = parts(trace(captured(Hyper, 12)[1], images(1, 12), [1]))
    assert [part.shape[1] for part in (*placed, *placeless)] == [3, 4, 7]  # the picture, the first bias, the head's


def oracle_64(pictures: Tensor, classes: list[int]) -> Tensor:
    """Equation 8 in float64, map after map, on an eager `Varied`, each bias a value of its own at every place."""
    net = peer_copy(with_statistics(Varied), torch.float64)
    value = inputs = pictures.double().requires_grad_()
    biases = []
    for name in ("first", "second", "third"):
        layer = net.get_submodule(name)
        assert isinstance(layer, nn.Conv2d)
        assert layer.bias is not None
        value = layer._conv_forward(value, layer.weight, None)
        biases.append(layer.bias.detach()[None, :, None, None].expand(value.shape).clone().requires_grad_())
        value = F.relu(value + biases[-1])
    scores = net.get_submodule("head")(value.flatten(1))
    gradients = torch.autograd.grad(scores[range(len(classes)), classes].sum(), [inputs, *biases])
    result = torch.zeros_like(pictures[:, 0], dtype=torch.float64)
    for bias, gradient in zip((inputs, *biases), gradients, strict=True):
        for index, channel in np.ndindex(*bias.shape[:2]):
            part = (bias * gradient)[index, channel].detach().abs()
            if part.max() == part.min():
                continue  # a channel that is closed everywhere
            part = (part - part.min()) / (part.max() - part.min())
            fine = F.interpolate(part[None, None], pictures.shape[2:], mode="bilinear", align_corners=False)
            result[index] += fine[0, 0]
    return result


def test_equals_a_float64_oracle() -> None:
    pictures = images(2, 12)
    _, program = captured(Varied, 12)
    assert close_to(ours(program, pictures, CLASSES), oracle_64(pictures, CLASSES)) < 1e-5


def peer(module: nn.Module, pictures: Tensor, class_id: int, factor: float) -> Tensor:
    """pytorch-grad-cam's map, from 0 to 1, of a network whose logits are `factor` times as large."""
    twin = peer_copy(module)
    head = [part for part in twin.modules() if isinstance(part, nn.Linear)][-1]
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(factor)
    with PeerFullGrad(twin, []) as method:
        return torch.from_numpy(method(pictures, [ClassifierOutputTarget(class_id)]))


@pytest.mark.parametrize(("build", "size"), [(Varied, 12), (small_resnet, 64)], ids=["varied", "resnet"])
def test_equals_pytorch_grad_cam(build: Callable[[], nn.Module], size: int) -> None:
    """Where its epsilon of 1e-7 does not matter; psi knows no scale, yet its answer changes with that of the logits."""
    net, program = captured(build, size)
    pictures = images(1, size)
    answer, theirs = minmax(ours(program, pictures, [1])), peer(net, pictures, 1, factor=1e5)
    assert close_to(answer, theirs) < 1e-5
    assert close_to(peer(net, pictures, 1, factor=1e-3), theirs) > 1e-2


def test_serves_networks_that_it_does_not_decompose_in_full() -> None:
    """A layer norm's shift is left out: the parts don't add up, and the map is finite and not zero."""
    net = with_statistics(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 4, stride=4), nn.Flatten(), nn.LayerNorm(36), nn.GELU(), nn.Linear(36, 7))
    )
    program, pictures = program_of(net, 12), images(2, 12)
    one = trace(program, pictures, CLASSES)
    placed, placeless = parts(one)
    assert close_to(totals([*placed, *placeless]), one.score) > 0.1
    answer = ours(program, pictures, CLASSES)
    assert answer.shape == (2, 12, 12)
    assert answer.isfinite().all()
    assert answer.amax(dim=(1, 2)).min() > 0


def test_a_picture_alone_equals_the_same_in_a_batch() -> None:
    _, program = captured(Residual, 12)
    pictures = images(3, 12)
    alone = torch.cat([ours(program, pictures[[index]], [index]) for index in range(3)])
    assert close_to(ours(program, pictures, [0, 1, 2]), alone) < 1e-5
