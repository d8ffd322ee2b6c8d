"""Captured programs equal the eager network; cuts recompose exactly; the guided rewrite; what is refused and why."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from service.errors import ModelLoadError
from service.models.layers import LayerTable
from service.models.program import Program, capture
from tests.nets import (
    SMALL,
    Dense,
    Residual,
    Sizes,
    Varied,
    capture_to,
    close_to,
    deep,
    images,
    program_of,
    seeded,
    table,
)

TINY: list[Callable[[], nn.Module]] = [Varied, Residual, Dense, Sizes]


def of(*layers: nn.Module) -> nn.Module:
    """A small classifier of four classes for pictures of 8 x 8 that ends in `layers`."""
    return seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Flatten(), nn.Linear(64, 4), *layers))


def scores_of(program: Program, node_name: str, pictures: Tensor) -> Tensor:
    row = next(row for row in table(program).rows if row.name == node_name)
    assert row.node is not None
    split = program.split(row.node)
    values = split.head(pictures)
    scores: Tensor = split.tail(*values) if isinstance(values, tuple) else split.tail(values)
    return scores


@pytest.mark.parametrize("build", TINY)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_captured_forward_is_the_eager_one_bit_for_bit(build: Callable[[], nn.Module], count: int) -> None:
    module = seeded(build)
    pictures = images(count, 12)
    assert torch.equal(program_of(module, 12).forward(pictures), module(pictures))


@pytest.mark.parametrize("build", TINY)
def test_a_cut_at_any_layer_recomposes_exactly(build: Callable[[], nn.Module]) -> None:
    module = seeded(build)
    program = program_of(module, 12)
    names = [row.name for row in table(program).rows if row.grid is not None]
    assert len(names) >= 2
    for count in (1, 3):
        pictures = images(count, 12)
        for name in names:
            assert torch.equal(scores_of(program, name, pictures), module(pictures)), name


@pytest.mark.parametrize("network", ["resnet18", "densenet121", "swin_t"])
def test_a_cut_of_a_deep_network_recomposes_exactly(network: str) -> None:
    module, program = deep(network)
    pictures = images(2, SMALL)
    scores = module(pictures)
    assert torch.equal(program.forward(pictures), scores)
    names = [row.name for row in table(program).rows if row.grid is not None]
    for name in names[:: len(names) // 3]:
        assert torch.equal(scores_of(program, name, pictures), scores), name


def test_parallel_branches_cross_the_cut() -> None:
    program = program_of(seeded(Dense), 12)
    crossing = {
        row.name: len(program.crossing(row.node)) for row in table(program).rows if row.grid and row.node is not None
    }
    # All that follows the first convolution hangs on it; beside the second and the third run the ReLUs before them.
    assert crossing == {"first": 0, "second": 1, "third": 2}


def test_the_tail_depends_on_the_activation_alone() -> None:
    """Adding to the activation changes the scores as it does in the eager network."""
    module = seeded(Dense)
    program = program_of(module, 12)
    pictures = images(2, 12)
    split = program.split(next(row.node for row in table(program).rows if row.name == "second" and row.node))
    activation, *crossing = split.head(pictures)
    shift = images(2, 12, seed=1).mean(dim=1, keepdim=True)
    handle = module.get_submodule("second").register_forward_hook(lambda _module, _inputs, output: output + shift)
    shifted = module(pictures)
    handle.remove()
    assert torch.equal(split.tail(activation + shift, *crossing), shifted)
    assert not torch.equal(shifted, module(pictures))


class Chain(nn.Module):
    """y = sum(w * act(v * act(u * x))) of one pixel's channels, with numbers for a hand-made backward."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.activation = activation
        self.u = nn.Parameter(torch.tensor([1.0, -1.0, 2.0])[:, None, None])
        self.v = nn.Parameter(torch.tensor([1.0, 1.0, 1.0])[:, None, None])
        self.w = nn.Parameter(torch.tensor([[3.0, 5.0, 7.0], [-3.0, -5.0, -7.0]]))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.activation(self.u * x)
        return self.activation(self.v * inner).mean(dim=(2, 3)) @ self.w.T


def guided_gradient(activation: Callable[[Tensor], Tensor], pixel: list[float], class_id: int) -> list[float]:
    program = program_of(Chain(activation).eval().requires_grad_(False), 1)
    pictures = torch.tensor(pixel)[None, :, None, None].requires_grad_()
    (gradient,) = torch.autograd.grad(program.guided()(pictures)[0, class_id], pictures)
    flat: list[float] = gradient.flatten().tolist()
    return flat


RELUS: list[Callable[[Tensor], Tensor]] = [nn.ReLU(), nn.ReLU(inplace=True), F.relu, torch.relu, F.relu_]


@pytest.mark.parametrize("relu", RELUS)
def test_guided_follows_the_papers_rule_at_a_relu(relu: Callable[[Tensor], Tensor]) -> None:
    """relu(g) 1[x > 0]: closed where the input was negative, and where the output's gradient is."""
    # u x = 2, -1, 6: the second is closed by the forward pass. u v w: 1 * 1 * 3 and 2 * 1 * 7.
    assert guided_gradient(relu, [2.0, 1.0, 3.0], 0) == [3.0, 0.0, 14.0]
    assert guided_gradient(relu, [2.0, 1.0, 3.0], 1) == [0.0, 0.0, 0.0]


RELU6S: list[Callable[[Tensor], Tensor]] = [nn.ReLU6(), nn.ReLU6(inplace=True), F.relu6]


@pytest.mark.parametrize("relu6", RELU6S)
def test_guided_has_the_same_gate_at_a_relu6(relu6: Callable[[Tensor], Tensor]) -> None:
    # u x = 2, -1, 8: the third is cut off at 6.
    assert guided_gradient(relu6, [2.0, 1.0, 4.0], 0) == [3.0, 0.0, 0.0]
    assert guided_gradient(relu6, [2.0, 1.0, 4.0], 1) == [0.0, 0.0, 0.0]


SMOOTH: list[Callable[[Tensor], Tensor]] = [F.silu, F.gelu, F.hardswish, F.leaky_relu, F.elu, nn.SiLU(inplace=True)]


@pytest.mark.parametrize("smooth", SMOOTH)
def test_guided_gates_the_output_gradient_of_every_other_activation(smooth: Callable[[Tensor], Tensor]) -> None:
    pixel = [0.5, 1.0, 0.3]
    inner = (torch.tensor([1.0, -1.0, 2.0]) * torch.tensor(pixel)).requires_grad_()
    middle = smooth(inner * 1.0)
    leaf = middle.detach().requires_grad_()
    (outer,) = torch.autograd.grad(smooth(leaf * 1.0).sum(), leaf)
    gradient = (torch.tensor([3.0, 5.0, 7.0]) * outer).clamp(min=0)
    (gradient,) = torch.autograd.grad(middle, inner, gradient)
    expected = gradient * torch.tensor([1.0, -1.0, 2.0])
    assert guided_gradient(smooth, pixel, 0) == pytest.approx(expected.tolist(), rel=1e-5)
    # Every output gradient is negative: nothing passes.
    assert guided_gradient(smooth, pixel, 1) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("plain", [torch.sigmoid, F.hardsigmoid, torch.tanh])
def test_guided_leaves_gates_and_squashing_functions_alone(plain: Callable[[Tensor], Tensor]) -> None:
    assert min(guided_gradient(plain, [0.5, 1.0, 0.3], 1)) < 0


def test_guided_scores_are_the_plain_ones() -> None:
    module = seeded(Residual)
    program = program_of(module, 12)
    pictures = images(3, 12)
    assert torch.equal(program.guided()(pictures), module(pictures))


@pytest.mark.parametrize(
    ("activation", "layers"),
    [
        ("softmax", [nn.Softmax(dim=1)]),
        ("softmax", [nn.LogSoftmax(dim=1)]),
        ("sigmoid", [nn.Sigmoid()]),
        ("logits", []),
    ],
)
def test_a_trailing_softmax_or_sigmoid_is_cut_off(activation: str, layers: list[nn.Module]) -> None:
    pictures = images(3, 8)
    assert torch.equal(program_of(of(*layers), 8, activation).forward(pictures), of()(pictures))


@pytest.mark.parametrize(
    ("activation", "layers", "reason"),
    [
        ("logits", [nn.Softmax(dim=1)], "ends in softmax, but output.activation says 'logits'"),
        ("logits", [nn.LogSoftmax(dim=1)], "ends in softmax, but output.activation says 'logits'"),
        ("logits", [nn.Sigmoid()], "ends in sigmoid, but output.activation says 'logits'"),
        ("softmax", [], "ends in logits, but output.activation says 'softmax'"),
        ("sigmoid", [nn.Softmax(dim=1)], "ends in softmax, but output.activation says 'sigmoid'"),
    ],
)
def test_another_ending_than_the_declared_one_is_refused(activation: str, layers: list[nn.Module], reason: str) -> None:
    with pytest.raises(ModelLoadError, match=reason):
        program_of(of(*layers), 8, activation)


class Twice(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.mean(dim=(2, 3)), x.amax(dim=(2, 3))


class Mixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(0, 2, 3))[None]


class Choosing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3)) if x.sum() > 0 else x.amax(dim=(2, 3))


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Twice(), "more than one value"),
        (Mixed(), "batch does not pass through"),
        (Choosing(), "torch.export cannot capture the network: .*data-dependent"),
    ],
)
def test_what_is_no_classifier_is_refused_with_a_reason(module: nn.Module, reason: str) -> None:
    with pytest.raises(ModelLoadError, match=reason) as caught:
        program_of(module.eval(), 8)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("module", [nn.Conv2d(3, 4, 3).eval(), nn.Flatten(0)])
def test_an_output_that_is_no_batch_of_scores_is_refused(module: nn.Module) -> None:
    with pytest.raises(ModelLoadError):
        program_of(module, 8)


@pytest.mark.parametrize("build", [Residual, Dense])
def test_a_kept_program_reloads_equal_with_its_layers(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    fresh, again = capture_to(tmp_path, seeded(build), 12)
    pictures = images(3, 12)
    assert torch.equal(fresh.forward(pictures), again.forward(pictures))
    one, other = LayerTable(fresh), LayerTable(again)
    shown = [
        [(row.name, row.type, row.output_shape, row.parameters, row.grid, row.reason, of.relu(row)) for row in of.rows]
        for of in (one, other)
    ]
    assert shown[0] == shown[1]
    assert (one.default, one.recommended) == (other.default, other.recommended)
    assert torch.equal(fresh.guided()(pictures), again.guided()(pictures))
    assert list(tmp_path.iterdir()) == [tmp_path / "net.pt2"]


def test_the_gradient_through_a_cut_is_the_eager_one() -> None:
    module = seeded(Residual)
    program = program_of(module, 12)
    pictures = images(2, 12)
    kept: list[Tensor] = []
    handle = module.get_submodule("norm").register_forward_hook(
        lambda _module, _inputs, output: kept.append(output.requires_grad_())
    )
    (eager,) = torch.autograd.grad(module(pictures)[:, 1].sum(), kept)
    handle.remove()
    split = program.split(next(row.node for row in table(program).rows if row.name == "norm" and row.node))
    activation, *crossing = split.head(pictures)
    (ours,) = torch.autograd.grad(split.tail(activation.requires_grad_(), *crossing)[:, 1].sum(), activation)
    assert close_to(ours, eager) < 1e-6


def test_a_kept_program_that_cannot_be_read_or_written_costs_a_capture_alone(tmp_path: Path) -> None:
    module, pictures = seeded(Residual), images(3, 12)
    for file in (tmp_path / "torn.pt2", tmp_path / "nowhere" / "program.pt2"):
        if file.parent.exists():
            file.write_bytes(b"torn")
        program = Program(capture(module, torch.zeros(2, 3, 12, 12), file))
        assert torch.equal(program.forward(pictures), module(pictures))
