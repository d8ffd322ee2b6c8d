"""Activation functions are told by what they compute: against an independent float64 backward with one gate each."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from service.errors import MethodNotSupported
from service.models.program import deconv_relu
from service.workers.plan import make_plan
from tests.nets import close_to, images, model_of, program_of, request, seeded

Function = Callable[[Tensor], Tensor]

WAYS: dict[str, Function] = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": lambda x: torch.sigmoid(x) * x,
    "softplus": F.softplus,
    "softplus_by_hand": lambda x: torch.log(1 + torch.exp(x)),
    "log_sigmoid_of_minus": lambda x: -F.logsigmoid(-x),
    "tanh": torch.tanh,
    "tanh_by_hand": lambda x: (x.exp() - (-x).exp()) / (x.exp() + (-x).exp()),
    "sigmoid": torch.sigmoid,
    "clamp": lambda x: x.clamp(min=0),
    "negative_clamp": lambda x: -(-x).clamp(max=0),
    "relu_by_two_clamps": lambda x: x.clamp(min=0).clamp(max=2),
    "maximum": lambda x: torch.maximum(x, torch.zeros_like(x)),
    "threshold": lambda x: F.threshold(x, 0.1, 0.0),
    "where": lambda x: torch.where(x > 0, x, 0),
    "masked": lambda x: x.masked_fill(x < 0, 0.0),
    "mask_times": lambda x: x * (x > 0),
    "leaky_by_sum": lambda x: 0.1 * x + 0.9 * F.relu(x),
    "rrelu": nn.RReLU().eval(),
    "hard_swish": lambda x: x * F.relu6(x + 3) / 6,
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "mish": lambda x: x * torch.tanh(F.softplus(x)),
    "softsign": F.softsign,
    "tanhshrink": F.tanhshrink,
    "softshrink": F.softshrink,
    "absolute": torch.abs,
    "square": lambda x: x * x,
    "absolute_by_alias": torch.absolute,
    "sigmoid_by_alias": torch.special.expit,
    "arctan_by_alias": torch.arctan,
    "erf_by_alias": torch.special.erf,
    "normal_distribution": torch.special.ndtr,
    "clip": lambda x: torch.clip(x, min=0),
    "silu_by_alias": lambda x: torch.multiply(x, torch.special.expit(x)),
    "tanhshrink_by_alias": lambda x: torch.subtract(x, torch.tanh(x)),
    "softsign_by_alias": lambda x: torch.divide(x, 1 + x.abs()),
    "square_by_addcmul": lambda x: torch.addcmul(torch.ones(1), x, x),
    "square_by_lerp": lambda x: torch.lerp(x.new_zeros(()), x, x),
    "max": lambda x: torch.max(x, torch.zeros_like(x)),
    "maximum_of_a_constant": lambda x: torch.maximum(x, torch.tensor([[0.0]])),
    "maximum_of_new_zeros": lambda x: torch.maximum(x, x.new_zeros(())),
    "maximum_of_zeros_like_it": lambda x: torch.maximum(x, torch.zeros(x.shape)),
    "where_full": lambda x: torch.where(x > 0, x, x.new_full((), 0.0)),
    "bounded": lambda x: F.hardtanh(20 * x, 0, 20),
}


class Net(nn.Module):
    """Two linear operations around each call of a function of one value."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.head = nn.Linear(4 * 16, 5)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.function(self.second(self.function(self.first(x)))).flatten(1))
        return scores


class Gate(torch.autograd.Function):
    """The identity whose gradient is clipped at 0."""

    @staticmethod
    def forward(_ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_ctx: object, *gradients: Tensor) -> Tensor:
        return gradients[0].clamp(min=0)


def gated(function: Function) -> Function:
    """The same function with the guided rule's gate at its end."""
    return lambda x: Gate.apply(function(x))


def gradient(network: Callable[[Tensor], Tensor], pictures: Tensor) -> Tensor:
    inputs = pictures.detach().requires_grad_()
    (found,) = torch.autograd.grad(network(inputs)[:, 3].sum(), inputs)
    return found


def oracle(net: Net, pictures: Tensor, function: Function) -> Tensor:
    twin = seeded(lambda: Net(function)).double()
    twin.load_state_dict(net.state_dict())
    return gradient(twin, pictures.double())


@pytest.mark.parametrize("name", WAYS)
def test_a_function_of_one_value_has_one_gate_at_its_end(name: str) -> None:
    net = seeded(lambda: Net(WAYS[name]))
    assert isinstance(net, Net)
    pictures = 3 * images(2, 8)
    program = program_of(net, 8)
    expected = oracle(net, pictures, gated(WAYS[name]))
    plain = oracle(net, pictures, WAYS[name])
    assert close_to(expected, plain) > 0.01, "the rule must differ from the plain gradient"
    assert program.nonlinearities.unknown is None
    assert close_to(gradient(program.network("guided"), pictures), expected) < 1e-5
    assert torch.equal(program.network("guided")(pictures), net(pictures))


class Opened(torch.autograd.Function):
    """The ReLU of a deconvolution network."""

    @staticmethod
    def forward(_ctx: object, x: Tensor) -> Tensor:
        return x.clamp(min=0)

    @staticmethod
    def backward(_ctx: object, *gradients: Tensor) -> Tensor:
        return gradients[0].clamp(min=0)


@pytest.mark.parametrize(
    "name",
    [
        *("clamp", "maximum", "where", "masked", "mask_times", "clip", "max", "where_full"),
        *("maximum_of_a_constant", "maximum_of_new_zeros", "maximum_of_zeros_like_it"),
    ],
)
def test_deconv_passes_a_relu_however_it_is_written(name: str) -> None:
    net = seeded(lambda: Net(WAYS[name]))
    assert isinstance(net, Net)
    pictures = images(2, 8)
    expected = oracle(net, pictures, Opened.apply)
    assert close_to(gradient(program_of(net, 8).network("deconv"), pictures), expected) < 1e-5


ALMOST: dict[str, Function] = {
    "bounded_by_20": lambda x: F.hardtanh(x, 0, 20),
    "bounded_by_100000": lambda x: x.clamp(0, 1e5),
    "threshold": lambda x: F.threshold(x, 0.1, 0.0),
    "low_threshold": lambda x: F.threshold(x, 0.002, 0.0),
}


@pytest.mark.parametrize("name", ALMOST)
def test_deconv_changes_no_score_and_takes_nothing_else_for_a_relu(name: str) -> None:
    net = seeded(lambda: Net(ALMOST[name]))
    assert isinstance(net, Net)
    pictures = 100 * images(2, 8)
    network = program_of(net, 8).network("deconv")
    assert torch.equal(network(pictures), net(pictures))
    assert close_to(gradient(network, pictures), oracle(net, pictures, gated(ALMOST[name]))) < 1e-5


@pytest.mark.parametrize("name", ["clamp", "mask_times", "maximum_of_a_constant"])
def test_a_deconvolution_network_has_the_scores_of_the_network(name: str) -> None:
    net = seeded(lambda: Net(WAYS[name]))
    pictures = 100 * images(2, 8)
    assert torch.equal(program_of(net, 8).network("deconv")(pictures), net(pictures))


def test_a_rule_gives_the_value_that_the_network_computed() -> None:
    argument, value = torch.tensor([-1.0, 2.0], requires_grad=True), torch.tensor([3.0, 4.0])
    shown = deconv_relu(argument, value)
    assert torch.equal(shown, value)
    (found,) = torch.autograd.grad(shown, argument, torch.tensor([5.0, -6.0]))
    assert found.tolist() == [5, 0]


NONE: dict[str, Function] = {
    "softmax_by_hand": lambda x: (x - x.amax(1, keepdim=True)).exp() / x.exp().sum(1, keepdim=True),
    "squeeze_and_excitation": lambda x: x * torch.sigmoid(1.5 * x.mean((2, 3), keepdim=True)),
    "hard_squeeze_and_excitation": lambda x: x * (F.relu6(3 * x.mean((2, 3), keepdim=True) + 3) / 6),
    "spatial_gate_of_several": lambda x: (
        x * torch.sigmoid(torch.stack([x.amax(1, keepdim=True), x.mean(1, keepdim=True)]).sum(0))
    ),
    "global_maximum_of_parts": lambda x: x - torch.cat([x, x.flip(1)], 1).amax(1, keepdim=True),
    "maximum_over_places_of_a_stack": lambda x: x - torch.stack([x, x.flip(1)]).amax((3, 4), keepdim=True).sum(0),
    "spatial_gate": lambda x: x * torch.sigmoid(x.amax(1, keepdim=True)),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[1:]),
    "layer_norm_by_hand": lambda x: (
        (x - x.mean(1, keepdim=True)) * ((x - x.mean(1, keepdim=True)).pow(2).mean(1, keepdim=True) + 1e-5).rsqrt()
    ),
    "rms_norm": lambda x: x * (x.pow(2).mean(1, keepdim=True) + 1e-5).rsqrt(),
    "normalize": lambda x: F.normalize(x, dim=1),
    "gated_linear_unit": lambda x: x.flip(1) * torch.sigmoid(x),
    "glu": lambda x: F.glu(torch.cat([x, x], 1), 1),
    "dropout_and_constants": lambda x: F.dropout(x, 0.5, False) / 3 + 1,
    "residual": lambda x: x + 0.5 * x,
    "mixture": lambda x: torch.lerp(x, x.flip(1), 0.3),
    "affine_by_addcmul": lambda x: torch.addcmul(x, x, x.new_full((1,), 0.5)),
    "affine_by_addcdiv": lambda x: torch.addcdiv(x.new_ones(1), x, x.new_full((1,), 3.0)),
    "affine_by_lerp": lambda x: torch.lerp(x.new_ones(1), x.new_full((1,), 3.0), x),
    "highway": lambda x: torch.lerp(x, x.flip(1), torch.sigmoid(x.roll(1, 1))),
    "highway_by_addcmul": lambda x: torch.addcmul(x, x.flip(1), torch.sigmoid(x.roll(1, 1))),
    "local_response_norm": nn.LocalResponseNorm(2, alpha=1.0),
    "deviation_norm": lambda x: x / (x.pow(2).std(1, keepdim=True) + 1),
    "gate_in_chunks": lambda x: x * torch.cat(torch.sigmoid(x.flip(1)).chunk(2, 1)[::-1], 1),
    "gate_upsampled": lambda x: x * F.interpolate(torch.sigmoid(F.avg_pool2d(x, 2)), x.shape[2:]),
    "gate_upsampled_smoothly": lambda x: (
        x * F.interpolate(torch.sigmoid(F.avg_pool2d(x, 2)), x.shape[2:], mode="bilinear")
    ),
    "gate_of_a_slice": lambda x: x * torch.sigmoid(x.flip(1))[:, :1],
    "gate_of_a_channel": lambda x: x * torch.sigmoid(x.flip(1))[:, 0].unsqueeze(1),
    "gate_padded": lambda x: x * F.pad(torch.sigmoid(x[..., 1:]), (1, 0)),
    "gate_repeated": lambda x: x * torch.sigmoid(x.mean(1, keepdim=True)).repeat(1, x.shape[1], 1, 1),
    "gate_flattened": lambda x: x * torch.sigmoid(x.flip(1)).flatten(2).squeeze().reshape(x.shape),
    "global_response_norm": lambda x: torch.addcmul(x, x.mean((2, 3), keepdim=True), x),
}


@pytest.mark.parametrize("name", NONE)
def test_gates_of_other_values_norms_and_affine_functions_keep_the_gradient(name: str) -> None:
    net = seeded(lambda: Net(NONE[name]))
    program = program_of(net, 8)
    assert program.nonlinearities.unknown is None
    assert not program.nonlinearities.gated
    pictures = images(2, 8)
    assert torch.equal(gradient(program.network("guided"), pictures), gradient(program.network(), pictures))


def indexed(x: Tensor) -> Tensor:
    x = x.clone()
    x[x < 0] = 0
    return x


def leaking(x: Tensor) -> Tensor:
    inner = torch.sigmoid(x)
    return F.avg_pool2d(x * inner, 1) + F.avg_pool2d(inner, 1)


@torch.library.custom_op("heatmap_test::opaque", mutates_args=())
def opaque(x: Tensor) -> Tensor:
    return x.clamp(min=0)


@opaque.register_fake
def _shape(x: Tensor) -> Tensor:
    return torch.empty_like(x)


REFUSED: dict[str, tuple[Function, str]] = {
    "index_put": (indexed, "index_put"),
    "own_operation": (lambda x: opaque(x), "opaque"),
    "two_values": (lambda x: torch.maximum(x, x.flip(1)), "maximum"),
    "chosen_by_another": (lambda x: torch.where(x.flip(1) > 0, x, 0), "where"),
    "read_twice": (leaking, "mul"),
    "amax_of_a_stack": (lambda x: torch.stack([x, torch.zeros_like(x)]).amax(0), "amax"),
    "max_of_a_stack": (lambda x: torch.stack([torch.zeros_like(x), x], -1).max(-1).values, "max"),
    "amax_of_a_stack_by_hand": (lambda x: torch.cat([x[None], torch.zeros_like(x[None])]).clone().amax(0), "amax"),
    "middle_of_a_stack": (lambda x: torch.stack([x, 0 * x, 6 + 0 * x], 1).median(1).values, "median"),
    "greatest_of_a_stack": (lambda x: torch.stack([x, torch.zeros_like(x)]).topk(1, 0).values[0], "topk"),
    "softplus_of_a_stack": (lambda x: torch.stack([x, torch.zeros_like(x)]).logsumexp(0), "logsumexp"),
    "not_listed": (lambda x: torch.renorm(x, 2, 0, 1.0), "renorm"),
}
RULED = [
    ("guided_backprop", {}),
    ("deconvnet", {}),
    ("guided_grad_cam", {}),
    ("saliency", {"backprop_modifier": "guided"}),
    ("grad_cam", {"backprop_modifier": "rectified"}),
]


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_understood_makes_the_rule_refuse_the_network(name: str) -> None:
    function, told = REFUSED[name]
    model = model_of(program_of(seeded(lambda: Net(function)), 8))
    for method, params in RULED:
        with pytest.raises(MethodNotSupported, match=rf"aten\.{told}|{told}") as caught:
            make_plan(request(1, methods=(method,), gen_params=params), model)
        assert [problem.pointer for problem in caught.value.errors] == ["/method"]
    for method in ("saliency", "grad_cam"):
        make_plan(request(1, methods=(method,)), model)
