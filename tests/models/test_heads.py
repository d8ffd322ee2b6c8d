"""Heads: one for each cut, in the model's precision or in fp32 where that loses what the network says."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from service.models.activations import ActivationCache
from service.models.heads import DTYPES, Head, Heads
from service.models.layers import LayerTable, Target
from service.models.program import MAX_SPLITS, Program
from service.models.spec import Precision
from service.workers.compute import Explained
from tests.nets import (
    IMAGENET,
    RAW,
    Varied,
    close_to,
    explain,
    images,
    model_of,
    pictures,
    program_of,
    reduced,
    reduced_model,
    request,
    seeded,
)

REDUCED: list[Precision] = ["bf16", "fp16"]


def targets(program: Program, *names: str, use_conv_only: bool = True) -> list[Target]:
    table = LayerTable(program)
    return [table.target(name, use_conv_only) for name in names]


class Nested(nn.Module):
    """Three names end in the value of the last block, two in the first convolution with its batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.block = nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()))
        self.head = nn.Linear(4 * 36, 5)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.block(self.stem(x)).flatten(1))
        return scores


def test_there_is_one_head_for_each_cut() -> None:
    program = program_of(seeded(Nested), 6)
    heads = Heads(program)
    block, inner, relu = (heads.at(*targets(program, name)) for name in ("block", "block.0", "block.0.1"))
    assert block is inner is relu
    assert heads.at(*targets(program, "block.0.0", use_conv_only=False)) is block, "the ReLU fused with it"
    convolution, norm = (heads.at(*targets(program, name)) for name in ("stem.0", "stem.1"))
    assert convolution is norm
    stem = heads.at(*targets(program, "stem"))
    assert len({block, convolution, stem, heads.at(*targets(program, "block.0.0"))}) == 4
    assert heads.at(*targets(program, "stem", "block")) is stem, "what comes later is computed behind the cut"
    assert heads.at(*targets(program, "block", "stem.2", "stem")) is stem
    assert (stem.name, stem.targets) == ("stem", tuple(targets(program, "stem")))
    assert Heads(program).at(*targets(program, "stem")) is not stem


def test_a_convolution_and_its_relu_have_names_of_their_own() -> None:
    program = program_of(seeded(Nested), 6)
    heads = Heads(program)
    names = [heads.at(*targets(program, "stem.0", use_conv_only=use_conv_only)).name for use_conv_only in (True, False)]
    assert names == ["stem.0", "stem.0 (ReLU)"]


class Many(nn.Module):
    """More layers than heads are kept of."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*[nn.Conv2d(3, 3, 1) for _ in range(MAX_SPLITS + 1)])
        self.head = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.body(x).flatten(1))
        return scores


def test_the_head_used_longest_ago_is_dropped() -> None:
    program = program_of(seeded(Many), 2)
    heads, wanted = Heads(program), targets(program, *[f"body.{number}" for number in range(MAX_SPLITS + 1)])
    made = [heads.at(target) for target in wanted[:-1]]
    assert heads.at(wanted[0]) is made[0]
    heads.at(wanted[-1])
    assert heads.at(wanted[0]) is made[0]
    assert heads.at(wanted[2]) is made[2]
    assert heads.at(wanted[1]) is not made[1]


def test_every_use_is_told() -> None:
    program = program_of(seeded(Nested), 6)
    heads = Heads(program, activations=ActivationCache(1 << 20))
    used: list[Head] = []
    heads.on_use = used.append
    head, fitted = heads.at(*targets(program, "stem")), pictures(1, 6)
    for _ in range(2):
        heads.values(head, torch.from_numpy(fitted).movedim(3, 1).float(), fitted)
    assert used == [head, head], "also one whose values are kept"


@pytest.mark.parametrize("precision", REDUCED)
@pytest.mark.parametrize("layer", ["first", "second", "third"])
def test_a_reduced_head_is_the_reduced_module_raised_to_fp32(precision: Precision, layer: str) -> None:
    module, shown, dtype = seeded(Varied), images(3, 12), DTYPES[precision]
    program = program_of(module, 12)
    head = Heads(program, precision, reduced(module, 12, precision)).at(*targets(program, layer))
    assert (head.precision, head.dtype) == (precision, dtype)
    (value,) = head(shown)
    assert value.dtype == torch.float32
    assert not value.requires_grad
    twin, kept = copy.deepcopy(module).to(dtype), []
    twin.get_submodule(layer).register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    twin(shown.to(dtype))
    assert torch.equal(value, kept[0].float()), "bit for bit"
    exact = Heads(program).at(*targets(program, layer))
    assert 0 < close_to(value, exact(shown)[0]) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("precision", REDUCED)
def test_what_follows_a_reduced_head_runs_in_fp32(precision: Precision) -> None:
    """The logits and the map are those of the raised activation, in float64."""
    module, fitted = seeded(Varied), pictures(2, 12)
    model = reduced_model(module, 12, precision, IMAGENET)
    asked = request(2, (1,), (4,), methods=("grad_cam",), gen_params={"target_conv_layer": "second"})
    answers = explain(model, asked, fitted)
    (value,) = model.heads.at(model.layers.target("second", True))(model.normalise(fitted))
    assert torch.equal(value, value.to(DTYPES[precision]).float())
    activation, twin = value.double().requires_grad_(), copy.deepcopy(module).double()
    logits = twin.get_submodule("head")(F.relu(twin.get_submodule("third")(F.relu(activation))).flatten(1))
    (gradient,) = torch.autograd.grad(logits[0, 1] + logits[1, 4], activation)
    oracle = (gradient.mean(dim=(2, 3), keepdim=True) * activation).sum(dim=1).detach()
    plain = module(model.normalise(fitted)).softmax(dim=1)
    for index, answer in enumerate(answers):
        assert answer.precision == precision
        assert close_to(answer.maps[0].values, oracle[index]) < 1e-5
        assert close_to(answer.confidences, logits[index].detach().softmax(dim=0)) < 1e-6
        assert close_to(answer.confidences, plain[index]) < 4 * torch.finfo(DTYPES[precision]).eps


@pytest.mark.parametrize("precision", REDUCED)
def test_the_exact_network_is_untouched_by_its_reduced_copy(precision: Precision) -> None:
    module, untouched = seeded(Varied), seeded(Varied).state_dict()
    program = program_of(module, 12)
    heads = Heads(program, precision, reduced(module, 12, precision))
    heads.at(*targets(program, "second"))(shown := images(2, 12))
    for state in (module.state_dict(), dict(program.source.state_dict())):
        assert state.keys() == untouched.keys()
        for name, weight in state.items():
            assert weight.dtype == torch.float32
            assert torch.equal(weight, untouched[name]), name
    assert torch.equal(program.split().head(shown), seeded(Varied)(shown))


class Fickle(nn.Module):
    """In reduced precision the second layer has another shape, the third is left out, and a shortcut is added."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.third = nn.Conv2d(4, 4, 3, padding=1)
        self.fourth = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        exact = x.dtype == torch.float32
        first = self.first(x)
        x = self.second(F.relu(first if exact else first[:, :, ::2]))
        x = self.fourth(F.relu(self.third(x) if exact else x))
        if not exact:
            x = x + F.interpolate(first, size=(3, 6))
        scores: Tensor = self.head(x.mean(dim=(2, 3)))
        return scores


@pytest.mark.parametrize(
    ("layer", "why"), [("second", "another shape"), ("third", "is missing"), ("fourth", "more values cross")]
)
def test_where_the_reduced_network_is_another_one_the_head_is_exact(
    layer: str, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    module, fitted = seeded(Fickle), pictures(2, 6)
    model = reduced_model(module, 6, "bf16", IMAGENET)
    head, exact = model.heads.at(model.layers.target(layer, True)), Heads(model.program)
    assert (head.precision, head.dtype) == ("fp32", torch.float32), why
    assert "the bf16 network has no such cut at" in caplog.text
    shown = model.normalise(fitted)
    assert torch.equal(head(shown)[0], exact.at(model.layers.target(layer, True))(shown)[0])
    asked = request(2, (1,), (2,), methods=("grad_cam",), gen_params={"target_conv_layer": layer})
    plain = model_of(model.program, values=IMAGENET)
    for answer, same in zip(explain(model, asked, fitted), explain(plain, asked, fitted), strict=True):
        assert answer.precision == "fp32"
        assert same.maps[0].values.any()
        np.testing.assert_array_equal(answer.maps[0].values, same.maps[0].values)
    assert model.heads.at(model.layers.target("first", True)).precision == "bf16", "before they part they agree"


class Extreme(nn.Module):
    """The last layer gives `up` times the red. The scores are `down` times its places, weighed 1, 2, 3, 4 and back."""

    def __init__(self, up: float, down: float) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 1, 1, bias=False)
        self.last = nn.Conv2d(1, 1, 1, bias=False)
        self.head = nn.Linear(4, 2, bias=False)
        with torch.no_grad():
            self.stem.weight.copy_(torch.tensor([min(1, up**0.5), 0, 0]).reshape(1, 3, 1, 1))
            self.last.weight.fill_(max(up, up**0.5))
            self.head.weight.copy_(down * torch.tensor([[1.0, 2, 3, 4], [4, 3, 2, 1]]))

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.last(self.stem(x)).flatten(1))
        return scores


@cache
def extreme(up: float, down: float) -> nn.Module:
    return Extreme(up, down).eval().requires_grad_(False)


def reds(*levels: int) -> NDArray[np.uint8]:
    """Pictures of 2 x 2 whose red is 1, 1, 1, 0 times each level."""
    fitted = np.zeros((len(levels), 2, 2, 3), np.uint8)
    for picture, level in zip(fitted, levels, strict=True):
        picture[..., 0] = [[level, level], [level, 0]]
    return fitted


LIMITS = [
    # up and down, the reds that fp16 loses, and reds that it doesn't: they are powers of two
    pytest.param(2.0**10, 2.0**-14, (64, 128), (1, 16), id="overflow"),  # 65536 is infinite
    pytest.param(2.0**-26, 2.0**20, (1,), (16, 128), id="underflow"),  # half of the smallest number is 0
]


@pytest.mark.parametrize(("up", "down", "lost", "kept"), LIMITS)
@pytest.mark.parametrize("max_bytes", [0, 1 << 20])
def test_what_reduced_precision_loses_is_computed_again_and_its_mates_are_not(
    up: float, down: float, lost: tuple[int, ...], kept: tuple[int, ...], max_bytes: int
) -> None:
    levels = [kept[0], *lost, kept[1], lost[0]]
    asked = request(len(levels), *[(0, 1)] * len(levels), methods=("grad_cam",))
    model = reduced_model(extreme(up, down), 2, "fp16", RAW, ActivationCache(max_bytes))
    plain = model_of(model.program, values=RAW)
    for _ in range(2):  # also with what was kept of the first time
        answers = explain(model, asked, reds(*levels))
        exact = explain(plain, asked, reds(*levels))
        assert [answer.precision for answer in answers] == ["fp32" if level in lost else "fp16" for level in levels]
        for level, answer, same in zip(levels, answers, exact, strict=True):
            assert same.precision == "fp32"
            on_paper = np.array([[level, level], [level, 0]]) * up * down * 2.5  # the mean of 1, 2, 3, 4
            scores = level * up * down * np.array([1 + 2 + 3, 4 + 3 + 2])
            for raw in (*answer.maps, *same.maps):
                np.testing.assert_allclose(raw.values, on_paper, rtol=1e-6)
            np.testing.assert_allclose(answer.confidences, np.exp(scores) / np.exp(scores).sum(), rtol=1e-5)


def test_a_map_that_is_truly_zero_is_zero_in_fp32_too() -> None:
    model = reduced_model(extreme(1.0, 1.0), 2, "fp16", RAW)
    answers = explain(model, request(2, (0,), (0,), methods=("grad_cam",)), reds(0, 8))
    assert [answer.precision for answer in answers] == ["fp32", "fp16"]
    assert answers[0].maps[0].values.tolist() == [[0, 0], [0, 0]]
    assert answers[1].maps[0].values.tolist() == [[20, 20], [20, 0]]


def test_confidences_alone_are_computed_again_where_they_are_not_numbers() -> None:
    model = reduced_model(extreme(2.0**10, 2.0**-14), 2, "fp16", RAW)
    lost, kept = explain(model, request(2), reds(64, 16))
    assert (lost.precision, kept.precision) == ("fp32", "fp16")
    for answer, level in ((lost, 64), (kept, 16)):
        odds = np.exp(level / 16 * 3)  # the scores are 6 and 9 sixteenths of the level
        np.testing.assert_allclose(answer.confidences, [1 / (1 + odds), odds / (1 + odds)], rtol=1e-5)


def test_the_picture_of_another_precision_is_never_taken_for_this_one() -> None:
    """One cache serves models of the same network in three precisions."""
    module, cache_of_all, fitted = seeded(Varied), ActivationCache(1 << 20), pictures(1, 12)
    asked = request(1, (2,), methods=("grad_cam",))
    precisions: list[Precision] = ["bf16", "fp16"]
    models = [reduced_model(module, 12, precision, IMAGENET, cache_of_all) for precision in precisions]
    fresh: list[Callable[[], list[Explained]]] = [
        lambda precision=precision: explain(reduced_model(module, 12, precision, IMAGENET), asked, fitted)  # type: ignore[misc]
        for precision in precisions
    ]
    seen = []
    for _ in range(2):
        for model, alone in zip(models, fresh, strict=True):
            (answer,), (same,) = explain(model, asked, fitted), alone()
            np.testing.assert_array_equal(answer.maps[0].values, same.maps[0].values)
            seen.append(answer.maps[0].values.tobytes())
    assert len(set(seen)) == 2
