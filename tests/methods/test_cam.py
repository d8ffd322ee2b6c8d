"""Class activation mapping against numbers worked out by hand, Grad-CAM and the logit; and whom it refuses, and why."""

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from service.errors import MethodNotSupported
from service.methods.cam import Cam
from service.models.program import Program
from service.workers.plan import make_plan
from tests.methods.cams import eager_64, modular, raw
from tests.nets import (
    SMALL,
    close_to,
    deep,
    explain,
    hand_picture,
    images,
    model_of,
    program_of,
    request,
    seeded,
    table,
)

NAME = "cam"
CLASSES = [3, 4]
SIZE = 6
Build = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    """A convolution, and behind it whatever a test wants."""

    def __init__(self, then: Build) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.inner = nn.Linear(4, 4)
        self.head = nn.Linear(4, 5)
        self.drop = nn.Dropout()
        self.matrix = nn.Parameter(torch.randn(4, 5))
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 5))
        self.then = then

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self, self.conv(x))


SERVED: dict[str, Build] = {
    "a mean that keeps its dimensions": lambda net, a: net.head(net.drop(a.mean((-1, -2), keepdim=True).flatten(1))),
    "adaptive pooling, squeezes, addmm": lambda net, a: torch.addmm(
        net.head.bias, F.adaptive_avg_pool2d(a, 1).squeeze(-1).squeeze(-1), net.matrix
    ),
    "channels last, a bare product": lambda net, a: a.movedim(1, 3).mean((1, 2)) @ net.matrix,
    "a weight that is computed": lambda net, a: net.normed(a.mean((2, 3)).reshape(-1, 4)),
}
REFUSED: dict[str, tuple[Build, str]] = {
    "a ReLU": (lambda net, a: net.head(a.mean((2, 3)).relu()), "relu in 'nets.0' does"),
    "means one by one": (lambda net, a: net.head(a.mean(3).mean(2)), "mean in 'nets.1' does"),
    "pooling to 2 x 2": (
        lambda net, a: net.head(F.adaptive_avg_pool2d(a, 2).mean((2, 3))),
        "adaptive_avg_pool2d in 'nets.2' does",
    ),
    "two linear layers": (lambda net, a: net.head(net.inner(a.mean((2, 3)))), "linear in 'nets.3.inner' does"),
    "two paths": (
        lambda net, a: net.head(a.mean((2, 3)) + a.amax((2, 3))),
        "2 paths lead on from conv2d in 'nets.4.conv'",
    ),
}
REFUSED_ALONE: dict[str, tuple[Build, str]] = {
    "no linear layer": (lambda _net, a: a.mean((2, 3)), "no linear layer does"),
    "a scaled sum": (lambda net, a: torch.addmm(net.head.bias, a.mean((2, 3)), net.matrix, beta=2), "addmm does"),
}
NEEDS = "only global average pooling and one linear layer may stand between the layer and the scores"


@pytest.mark.parametrize("then", SERVED.values(), ids=SERVED)
def test_equals_grad_cam_times_the_number_of_places(then: Build) -> None:
    net = seeded(lambda: Net(then))
    program, pictures = program_of(net, SIZE), images(2, SIZE)
    ours = raw(NAME, program, "conv", pictures, CLASSES)
    activation, gradient, _ = eager_64(net, "conv", pictures, CLASSES)
    assert close_to(ours, (gradient * SIZE**2 * activation).sum(dim=1)) < 1e-5


class Beside(nn.Module):
    """Many a `Net` beside one another, so that one capture does for all."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(Net(then) for then, _ in REFUSED.values())

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([net(x) for net in self.nets]).sum(dim=0)


@cache
def beside() -> Program:
    return program_of(seeded(Beside), SIZE)


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_stands_between_and_says_it(case: str) -> None:
    layer = f"nets.{list(REFUSED).index(case)}.conv"
    reason = Cam().refusal(beside(), table(beside()).target(layer, True))
    assert reason == f"{NEEDS}, but {REFUSED[case][1]}"


@pytest.mark.parametrize(("then", "why"), REFUSED_ALONE.values(), ids=REFUSED_ALONE)
def test_refuses_another_end(then: Build, why: str) -> None:
    program = program_of(seeded(lambda: Net(then)), SIZE)
    assert Cam().refusal(program, table(program).target("conv", True)) == f"{NEEDS}, but {why}"


class Tokens(nn.Module):
    """Patches as tokens, with a class token or without, averaged."""

    def __init__(self, prefix: bool) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 4, 2, stride=2)
        self.token = nn.Parameter(torch.randn(1, 1, 4)) if prefix else None
        self.block = nn.Linear(4, 4)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).mT
        if self.token is not None:
            tokens = torch.cat([self.token.expand(x.shape[0], -1, -1), tokens], dim=1)
        scores: Tensor = self.head(self.block(tokens).mean(1))
        return scores


def test_serves_tokens_that_are_averaged_unless_one_has_no_place() -> None:
    net, pictures = seeded(lambda: Tokens(prefix=False)), images(2, SIZE)
    activation, gradient, _ = eager_64(net, "block", pictures, CLASSES)
    oracle = (9 * gradient * activation).sum(dim=2).reshape(2, 3, 3)
    assert close_to(raw(NAME, program_of(net, SIZE), "block", pictures, CLASSES), oracle) < 1e-5
    program = program_of(seeded(lambda: Tokens(prefix=True)), SIZE)
    reason = Cam().refusal(program, table(program).target("block", True))
    assert reason is not None
    assert reason.endswith("but its class token has no place in the picture")


class Pooled(nn.Module):
    """The convolution of `Hand`, a ReLU, pooling, and a linear layer with a bias that CAM leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1, bias=False)
        self.head = nn.Linear(2, 2)
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor([[1.0, 0, 0], [0, 1, -1]])[..., None, None])
            self.head.weight.copy_(torch.tensor([[2.0, -3], [-1, 1]]))
            self.head.bias.fill_(100.0)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.conv(x).relu().mean((2, 3)))
        return scores


def test_equals_the_weighted_sum_on_paper() -> None:
    # Behind the ReLU: [[1, 2], [3, 4]] and [[0, 2], [2, 0]], which weigh 2 and -3, then -1 and 1.
    model = model_of(program_of(Pooled().eval().requires_grad_(False), 2))
    asked = request(1, (0, 1), methods=(NAME,), gen_params={"use_conv_only": False})
    (answer,) = explain(model, asked, hand_picture())
    first, second = (one.values for one in answer.maps)
    np.testing.assert_allclose(first, [[2, -2], [0, 8]], rtol=0, atol=1e-5 * 8)
    np.testing.assert_allclose(second, [[-1, 0], [-1, -4]], rtol=0, atol=1e-5 * 4)
    # The sentence that the client reads:
    with pytest.raises(MethodNotSupported) as refused:
        make_plan(request(1, (0,), methods=(NAME,)), model)
    assert refused.value.detail == (
        "cam cannot explain the model 'net' at 'conv': only global average pooling and one linear layer may stand "
        "between the layer and the scores, but relu does."
    )


def test_a_refusal_sends_to_the_recommended_layer_where_that_can_be_explained() -> None:
    model = model_of(deep("resnet18")[1])

    def detail(**gen_params: object) -> str:
        with pytest.raises(MethodNotSupported) as refused:
            make_plan(request(1, methods=(NAME,), gen_params=gen_params), model)
        return refused.value.detail

    hint = "target_conv_layer 'recommended', which is 'layer4', can be explained."
    assert detail() == (
        "cam cannot explain the model 'net' at 'layer4.1.conv2': only global average pooling and one linear layer may "
        f"stand between the layer and the scores, but add in 'layer4.1' does. {hint}"
    )
    make_plan(request(1, methods=(NAME,), gen_params={"target_conv_layer": "recommended"}), model)
    # The recommended layer is no convolution:
    assert "recommended" not in detail(target_conv_layer="conv1", use_conv_only=False)


def test_explains_the_logit_of_a_deep_network_and_is_grad_cam_there() -> None:
    """The mean of the map is the logit without its bias; Grad-CAM is the map over its nine places."""
    net, program = deep("resnet18")
    pictures = images(2, SMALL)
    ours = raw(NAME, program, "layer4", pictures, CLASSES)
    logits = (net(pictures) - net.get_submodule("fc").bias)[range(2), CLASSES]
    assert close_to(ours.mean(dim=(1, 2)), logits) < 1e-4
    assert close_to(ours / 9, raw("grad_cam", program, "layer4", pictures, CLASSES)) < 1e-4
    assert close_to(raw(NAME, program, "layer4", pictures[1:], CLASSES[1:]), ours[1:]) < 1e-4


@pytest.mark.parametrize(
    ("network", "layer"), [("resnet18", "layer4.1.conv2"), ("resnet18", "layer3"), ("modular", "3")]
)
def test_refuses_inner_layers(network: str, layer: str) -> None:
    program = modular()[1] if network == "modular" else deep(network)[1]
    assert Cam().refusal(program, table(program).target(layer, True)) is not None
