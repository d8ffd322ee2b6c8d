"""Captured programs equal the eager network; cuts recompose exactly; the guided rewrite; what is refused and why."""

import hashlib
import itertools
import logging
import multiprocessing
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional as F

from service.errors import ModelLoadError
from service.explain.trace import Pass, Trace
from service.models.layers import LayerTable, Target
from service.models.program import Program, as_tuple, capture
from service.models.proof import proven_layers
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
    peer_copy,
    program_of,
    seeded,
    table,
    trace_of,
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
    assert torch.equal(program_of(module, 12).split().head(pictures), module(pictures))


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
    assert torch.equal(program.split().head(pictures), scores)
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
    (gradient,) = torch.autograd.grad(program.network("guided")(pictures)[0, class_id], pictures)
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


SMOOTH: list[Callable[[Tensor], Tensor]] = [
    F.silu,
    F.gelu,
    F.hardswish,
    F.leaky_relu,
    F.elu,
    nn.SiLU(inplace=True),
    torch.sigmoid,
    torch.tanh,
]


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


def test_guided_scores_are_the_plain_ones() -> None:
    module = seeded(Residual)
    program = program_of(module, 12)
    pictures = images(3, 12)
    assert torch.equal(program.network("guided")(pictures), module(pictures))


class Squeezed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.squeeze(-1)


class Clamped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(1e-4, 1 - 1e-4)


class Ending(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize(
    ("activation", "layers"),
    [
        ("sigmoid", [Ending(lambda s: s[:, :, None, None].sigmoid()[:, :, 0, 0])]),
        ("sigmoid", [Ending(torch.special.expit)]),
        ("sigmoid", [Ending(lambda s: s.t().sigmoid().t())]),
        ("softmax", [Ending(lambda s: torch.special.softmax(s, 1))]),
        ("softmax", [Ending(lambda s: s[:, :, None, None].softmax(1)[:, :, 0, 0])]),
        ("softmax", [Ending(lambda s: s.softmax(1).clamp(min=0.3))]),
        ("softmax", [nn.Softmax(dim=1)]),
        ("softmax", [nn.LogSoftmax(dim=1)]),
        ("sigmoid", [nn.Sigmoid()]),
        ("softmax", [nn.Unflatten(1, (4, 1, 1)), nn.Softmax(dim=1), nn.Flatten()]),
        ("softmax", [nn.Softmax(dim=-1), nn.Unflatten(1, (2, 2)), nn.Flatten()]),
        ("softmax", [nn.Unflatten(1, (4, 1)), nn.LogSoftmax(dim=-2), Squeezed()]),
        ("sigmoid", [nn.Sigmoid(), Clamped()]),
        ("sigmoid", [nn.Unflatten(1, (4, 1, 1)), nn.Sigmoid(), Clamped(), nn.Flatten()]),
        ("logits", []),
    ],
)
def test_a_trailing_softmax_or_sigmoid_is_cut_off(activation: str, layers: list[nn.Module]) -> None:
    pictures = images(3, 8)
    assert torch.equal(program_of(of(*layers), 8, activation).split().head(pictures), of()(pictures))


@pytest.mark.parametrize(
    ("activation", "layers", "reason"),
    [
        ("logits", [nn.Softmax(dim=1)], "ends in softmax, but output.activation says 'logits'"),
        ("logits", [nn.LogSoftmax(dim=1)], "ends in softmax, but output.activation says 'logits'"),
        ("logits", [nn.Sigmoid()], "ends in sigmoid, but output.activation says 'logits'"),
        ("softmax", [], "ends in logits, but output.activation says 'softmax'"),
        ("sigmoid", [nn.Softmax(dim=1)], "ends in softmax, but output.activation says 'sigmoid'"),
        ("logits", [nn.Softmax(dim=1), nn.Unflatten(1, (2, 2)), nn.Flatten()], "ends in softmax, but .* says 'logits'"),
        ("softmax", [nn.Softmax(dim=0)], "softmax runs over the batch"),
        ("softmax", [nn.Softmax(dim=-2), nn.Flatten()], "softmax runs over the batch"),
    ],
)
def test_another_ending_than_the_declared_one_is_refused(activation: str, layers: list[nn.Module], reason: str) -> None:
    with pytest.raises(ModelLoadError, match=reason):
        program_of(of(*layers), 8, activation)


@pytest.mark.parametrize("activation", ["logits", "softmax", "sigmoid"])
@pytest.mark.parametrize(
    ("ending", "told"),
    [
        (lambda s: (s.softmax(1) + (2 * s).softmax(1)) / 2, "softmax"),
        (lambda s: torch.stack([s.softmax(1), (2 * s).softmax(1)]).mean(0), "softmax"),
        (lambda s: s.softmax(1).log(), "log"),
        (lambda s: s.softmax(1) * 100, "mul"),
        (lambda s: s.sigmoid() * 2 - 1, "sigmoid"),
    ],
)
def test_probabilities_that_cannot_be_undone_have_one_reason(
    ending: Callable[[Tensor], Tensor], told: str, activation: str
) -> None:
    with pytest.raises(ModelLoadError, match=f"probabilities made by .*{told}.*; let it return logits"):
        program_of(of(Ending(ending)), 8, activation)


def test_a_softmax_of_which_classes_are_left_out_is_refused() -> None:
    with pytest.raises(ModelLoadError, match="let it return logits"):
        program_of(of(Ending(lambda s: s.softmax(1)[:, 1:])), 8, "softmax")


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
    assert torch.equal(fresh.split().head(pictures), again.split().head(pictures))
    one, other = LayerTable(fresh), LayerTable(again)
    shown = [
        [(row.name, row.type, row.output_shape, row.parameters, row.grid, row.reason, of.relu(row)) for row in of.rows]
        for of in (one, other)
    ]
    assert shown[0] == shown[1]
    assert (one.default, one.recommended) == (other.default, other.recommended)
    assert torch.equal(fresh.network("guided")(pictures), again.network("guided")(pictures))
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
        assert torch.equal(program.split().head(pictures), module(pictures))


def test_a_kept_program_with_a_flipped_bit_is_captured_anew(tmp_path: Path) -> None:
    file = tmp_path / "net.pt2"
    capture_to(tmp_path, seeded(Residual), 12)
    whole = file.read_bytes()
    for place in range(32, len(whole), len(whole) // 7):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        Program(capture(seeded(Residual), torch.zeros(2, 3, 12, 12), file))
        assert file.read_bytes()[:32] == hashlib.sha256(file.read_bytes()[32:]).digest(), "it was captured anew"


def _capture_with_little_room(folder: Path) -> None:
    """Capture two networks where no file has room, and exit with the number of what is logged."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("service").addHandler(handler)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
    for name in ("one", "two"):
        graph = capture(seeded(Residual), torch.zeros(2, 3, 12, 12), folder / f"{name}.pt2")
        proven_layers(Program(graph), folder / f"{name}.layers.json")
    sys.exit(sum("are not kept" in message for message in said))


def test_without_room_for_files_networks_are_captured_and_that_is_said_once(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_capture_with_little_room, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 1, "torch's writer would abort the process"
    assert list(tmp_path.iterdir()) == []


class Forked(nn.Module):
    """Numbers to work out by hand: s is red, l = 2 s, r = -3 s, j = l + 10 r; the scores weigh the places of j + s."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 1, 1, bias=False)
        self.left = nn.Conv2d(1, 1, 1, bias=False)
        self.right = nn.Conv2d(1, 1, 1, bias=False)
        self.join = nn.Conv2d(2, 1, 1, bias=False)
        self.head = nn.Linear(4, 2, bias=False)
        with torch.no_grad():
            self.stem.weight.copy_(torch.tensor([1.0, 0, 0]).reshape(1, 3, 1, 1))
            self.left.weight.fill_(2)
            self.right.weight.fill_(-3)
            self.join.weight.copy_(torch.tensor([1.0, 10]).reshape(1, 2, 1, 1))
            self.head.weight.copy_(torch.tensor([[1.0, 2, 3, 4], [-1, 0, 0, 5]]))

    def forward(self, x: Tensor) -> Tensor:
        stem = self.stem(x)
        scores: Tensor = self.head((self.join(torch.cat([self.left(stem), self.right(stem)], 1)) + stem).flatten(1))
        return scores


@cache
def forked() -> Program:
    return program_of(Forked().eval().requires_grad_(False), 2)


def targets_of(program: Program, names: Sequence[str]) -> list[Target]:
    return [table(program).target(name, use_conv_only=True) for name in names]


def traces_of(of: Pass, classes: Sequence[int]) -> dict[str, Trace]:
    backward = of.backward(torch.tensor(classes))
    return {target.name: backward.trace(target) for target in of.targets}


CUTS: list[tuple[list[str], list[str], list[str], list[str]]] = [
    # targets, and on paper: roots, later, crossing
    (["left"], ["left"], [], ["stem", "right"]),
    (["join"], ["join"], [], ["stem"]),
    (["stem", "join"], ["stem"], ["join"], []),
    (["left", "right"], ["left", "right"], [], ["stem"]),
    (["left", "join"], ["left"], ["join"], ["stem", "right"]),
    (["left", "right", "join"], ["left", "right"], ["join"], ["stem"]),
    (["stem", "left", "right", "join"], ["stem"], ["left", "right", "join"], []),
    ([], [], [], ["head"]),
]


@pytest.mark.parametrize(("names", "roots", "later", "crossing"), CUTS)
def test_what_a_cut_consists_of_on_paper(
    names: list[str], roots: list[str], later: list[str], crossing: list[str]
) -> None:
    called = {row.node: row.name for row in table(forked()).rows}

    def layers(nodes: tuple[fx.Node, ...]) -> list[str]:
        return [called[node] for node in nodes]

    nodes = [target.node for target in targets_of(forked(), names)]
    split = forked().split(*nodes)
    assert (layers(split.roots), layers(split.later), layers(split.crossing)) == (roots, later, crossing)
    assert forked().split(*reversed(nodes), *nodes) is split, "neither their order nor their number makes another cut"


@pytest.mark.parametrize("names", [cut[0] for cut in CUTS[:-1]])
def test_values_and_gradients_at_several_targets_on_paper(names: list[str]) -> None:
    red = torch.tensor([[1.0, 2], [3, -4]])
    shown = torch.stack([torch.stack([red, 7 * red, -red]), torch.stack([-red, red, red])])
    values = {"stem": red, "left": 2 * red, "right": -3 * red, "join": -28 * red}
    weights = {0: torch.tensor([[1.0, 2], [3, 4]]), 1: torch.tensor([[-1.0, 0], [0, 5]])}
    of = Pass(forked(), shown, targets_of(forked(), names))
    # -27 s weighed by 1, 2, 3, 4 and by -1, 0, 0, 5; s is 1, 2, 3, -4, and -1, -2, -3, 4
    assert of.logits.tolist() == [[-27 * (1 + 4 + 9 - 16), -27 * (-1 - 20)], [-27 * (-1 - 4 - 9 + 16), -27 * (1 + 20)]]
    for classes in ([0, 1], [1, 1]):
        for name, trace in traces_of(of, classes).items():
            factor = {"stem": 1 + 2 - 30, "left": 1, "right": 10, "join": 1}[name]
            assert trace.activation.tolist() == [[values[name].tolist()], [(-values[name]).tolist()]], name
            assert trace.gradient.tolist() == [[(factor * weights[number]).tolist()] for number in classes], name


@pytest.mark.parametrize("build", [*TINY, Forked])
def test_a_cut_at_several_layers_recomposes_exactly_and_has_the_gradients_of_each_alone(
    build: Callable[[], nn.Module],
) -> None:
    module = seeded(build)
    program = program_of(module, 2 if build is Forked else 12)
    pictures = images(3, program.images.meta["val"].shape[2:])
    names = [row.name for row in table(program).rows if row.grid is not None]
    alone = {target.name: trace_of(program, pictures, target, [1, 0, 1]) for target in targets_of(program, names)}
    for together in [*itertools.combinations(names, 2), names]:
        of = Pass(program, pictures, targets_of(program, together))
        assert torch.equal(of.logits, module(pictures)), together
        for name, trace in traces_of(of, [1, 0, 1]).items():
            assert torch.equal(trace.activation, alone[name].activation), (together, name)
            assert close_to(trace.gradient, alone[name].gradient) < 1e-6, (together, name)


@pytest.mark.parametrize(
    ("network", "names"),
    [
        ("resnet18", ["layer2.0.downsample.0", "layer2.0.conv2", "layer3", "layer4.1.conv1", "layer4"]),
        ("densenet121", ["features.denseblock3.denselayer2.conv2", "features.denseblock3", "features.norm5"]),
    ],
)
def test_several_layers_of_a_deep_network_have_the_gradients_of_each_alone(network: str, names: list[str]) -> None:
    module, program = deep(network)
    pictures = images(2, SMALL)
    of = Pass(program, pictures, targets_of(program, names))
    assert torch.equal(of.logits, module(pictures))
    for name, trace in traces_of(of, [3, 999]).items():
        (target,) = targets_of(program, [name])
        alone = trace_of(program, pictures, target, [3, 999])
        assert torch.equal(trace.activation, alone.activation), name
        assert close_to(trace.gradient, alone.gradient) < 1e-6, name


class Woven(nn.Module):
    """A shortcut, dense connections and parallel branches, with one in-place ReLU called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.left = nn.Conv2d(4, 4, 1)
        self.right = nn.Conv2d(4, 4, 3, padding=1)
        self.last = nn.Conv2d(12, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(4 * 36, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        y = self.relu(self.norm(self.conv(x)) + x)
        left, right = self.left(y), self.right(y - x)
        last = self.last(torch.cat([left, F.relu(right, inplace=True), x], 1))
        scores: Tensor = self.head(self.relu(last + y).flatten(1))
        return scores


# Each target, and the targets that it depends on, on paper. `conv` is the convolution with its batch norm folded in.
WOVEN: dict[str, set[str]] = {
    "stem": set(),
    "relu@0": {"stem"},
    "conv": {"stem", "relu@0"},
    "relu@1": {"stem", "relu@0", "conv"},
    "left": {"stem", "relu@0", "conv", "relu@1"},
    "right": {"stem", "relu@0", "conv", "relu@1"},
    "last": {"stem", "relu@0", "conv", "relu@1", "left", "right"},
    "relu": {"stem", "relu@0", "conv", "relu@1", "left", "right", "last"},
}


@cache
def woven() -> tuple[nn.Module, Program]:
    module = seeded(Woven)
    return module, program_of(module, 6)


@cache
def woven_in_float64(class_id: int) -> dict[str, tuple[Tensor, Tensor]]:
    """What each target of `Woven` gives, and its gradient, in the eager network."""
    twin = peer_copy(woven()[0], torch.float64)
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., Tensor]:
        calls = itertools.count()

        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
            kept[f"{name}@{next(calls)}"] = kept[name] = output
            return output.clone()  # what follows may write into it

        return hook

    for name in ("stem", "norm", "left", "right", "last", "relu"):
        twin.get_submodule(name).register_forward_hook(keep(name))
    total = twin(images(2, 6).double())[:, class_id].sum()
    kept["conv"] = kept["norm"]
    gradients = torch.autograd.grad(total, [kept[name] for name in WOVEN])
    return {name: (kept[name].detach(), found) for name, found in zip(WOVEN, gradients, strict=True)}


@settings(max_examples=60, deadline=None)
@given(names=st.lists(st.sampled_from(sorted(WOVEN)), min_size=1), class_id=st.integers(0, 4))
def test_any_targets_of_a_woven_network_are_those_of_the_eager_one_in_float64(names: list[str], class_id: int) -> None:
    module, program = woven()
    targets = {name: table(program).target(name, use_conv_only=True) for name in names}
    split = program.split(*(target.node for target in targets.values()))
    assert {name for name in names if targets[name].node in split.roots} == {
        name for name in names if WOVEN[name].isdisjoint(names)
    }
    assert set(split.roots) | set(split.later) == {target.node for target in targets.values()}
    assert not set(split.roots) & set(split.later)
    pictures = images(2, 6)
    scores, *_ = as_tuple(split.tail(*as_tuple(split.head(pictures))))
    assert torch.equal(scores, module(pictures))
    of = Pass(program, pictures, list(targets.values()))
    assert torch.equal(of.logits, scores)
    for name, trace in traces_of(of, [class_id, class_id]).items():
        value, gradient = woven_in_float64(class_id)[name]
        assert close_to(trace.activation, value) < 1e-5, name
        assert close_to(trace.gradient, gradient) < 1e-5, name


class Blocked(nn.Module):
    """The scores depend on all four layers; no gradient reaches `counted`, and that of `shut` is closed by a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 2, 1)
        self.shut = nn.Conv2d(2, 2, 1)
        self.counted = nn.Conv2d(2, 2, 1)
        self.open = nn.Conv2d(2, 2, 1)
        self.head = nn.Linear(8, 3)
        self.alone = True

    def forward(self, x: Tensor) -> Tensor:
        stem = self.stem(x)
        found = (self.counted(stem) > 0).float()
        if not self.alone:
            found = found + F.relu(-self.shut(stem).square() - 1) + self.open(stem)
        scores: Tensor = self.head(found.flatten(1))
        return scores


def blocked(alone: bool) -> nn.Module:
    module = seeded(Blocked)
    assert isinstance(module, Blocked)
    module.alone = alone
    return module


@pytest.mark.parametrize(
    "names", [["counted"], ["counted", "shut"], ["counted", "shut", "open"], ["stem", "counted", "shut", "open"]]
)
def test_a_target_through_which_no_gradient_flows_has_zeros(names: list[str]) -> None:
    module, pictures = blocked(alone=False), images(2, 2)
    program = program_of(module, 2)
    of = Pass(program, pictures, targets_of(program, names))
    assert torch.equal(of.logits, module(pictures))
    for name, trace in traces_of(of, [0, 2]).items():
        assert trace.gradient.shape == (2, 2, 2, 2)
        assert bool(trace.gradient.any()) == (name in ("stem", "open")), name
    if "open" in names:
        weights = module.get_parameter("head.weight")[[0, 2]].reshape(2, 2, 2, 2)
        assert torch.equal(traces_of(of, [0, 2])["open"].gradient, weights)


def test_scores_that_let_no_gradient_through_at_all_give_zeros_at_every_target() -> None:
    module, pictures = blocked(alone=True), images(2, 2)
    program = program_of(module, 2)
    of = Pass(program, pictures, targets_of(program, ["stem", "counted"]))
    assert torch.equal(of.logits, module(pictures))
    for trace in traces_of(of, [0, 1]).values():
        assert trace.activation.any()
        assert trace.gradient.tolist() == torch.zeros(2, 2, 2, 2).tolist()
