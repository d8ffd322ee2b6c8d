"""Networks and helpers that the tests of the engine share. What takes seconds to capture is made once per run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torchvision.models
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from service.explain.means import Means
from service.explain.trace import Pass, Trace
from service.imaging.geometry import Fit
from service.models.activations import ActivationCache
from service.models.heads import DTYPES, Heads
from service.models.layers import LayerTable, Target
from service.models.program import Program, capture
from service.models.resident import Model
from service.models.spec import InputSpec, ModelSpec, OutputSpec, Precision
from service.workers.compute import Explained
from service.workers.device import Device
from service.workers.messages import ExplainRequest
from service.workers.plan import make_plan

CPU = torch.device("cpu")
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
RAW = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}
"""With these the network sees the picture's own levels, 0 to 255, so that numbers can be worked out by hand."""


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A network in eval mode with reproducible weights and a head that is not zero: its last linear is normal(0.02)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = build()
        head = [part for part in module.modules() if isinstance(part, nn.Linear)][-1]
        nn.init.normal_(head.weight, std=0.02)
        return module.eval().requires_grad_(False)


def peer_copy(module: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A copy as peers want it: with gradients of its parameters and without in-place activation functions."""
    twin = copy.deepcopy(module).to(dtype).requires_grad_(True)
    for part in twin.modules():
        if hasattr(part, "inplace"):
            setattr(part, "inplace", False)  # noqa: B010 (no attribute of every module)
    return twin


def images(count: int, size: int | tuple[int, int], seed: int = 0) -> Tensor:
    """Normal noise, (N,3,H,W)."""
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def pictures(count: int, size: int | tuple[int, int], seed: int = 0) -> NDArray[np.uint8]:
    """Fitted pictures of smooth noise, uint8 (N,H,W,3)."""
    coarse = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    fine: Tensor = F.interpolate(coarse, size=size, mode="bicubic").clamp(0, 1)
    pixels: NDArray[np.uint8] = (255 * fine).to(torch.uint8).movedim(1, 3).numpy()
    return pixels


def program_of(module: nn.Module, size: int | tuple[int, int], activation: str = "logits") -> Program:
    height, width = (size, size) if isinstance(size, int) else size
    return Program(capture(module, torch.zeros(2, 3, height, width)), activation)


def model_of(
    program: Program,
    labels: tuple[str, ...] | None = None,
    activation: str = "logits",
    values: Mapping[str, tuple[float, float, float]] = RAW,
) -> Model:
    """A resident model around a program, without a folder."""
    height, width = program.images.meta["val"].shape[2:]
    spec = ModelSpec(
        architecture="python:tests:net",
        weights="random:0",
        input=InputSpec.model_validate({"size": (height, width), **values}),
        output=OutputSpec.model_validate({"activation": activation}),
    )
    names = labels or tuple(f"class {number}" for number in range(program.num_classes))
    fit = Fit(spec.input.size, spec.input.fit, spec.input.resize, spec.input.interpolation, spec.input.mean)
    return Model("net", spec, "sha256:0", names, program, LayerTable(program), Heads(program), CPU, fit)


def reduced(module: nn.Module, size: int, precision: Precision) -> tuple[Program, LayerTable]:
    """The network captured from a copy in reduced precision."""
    dtype = DTYPES[precision]
    program = Program(capture(copy.deepcopy(module).to(dtype), torch.zeros(2, 3, size, size, dtype=dtype)))
    return program, LayerTable(program)


def reduced_model(
    module: nn.Module,
    size: int,
    precision: Precision,
    values: dict[str, tuple[float, float, float]],
    activations: ActivationCache | None = None,
) -> Model:
    model = model_of(program_of(module, size), values=values)
    heads = Heads(model.program, precision, reduced(module, size, precision), activations)
    return replace(model, heads=heads)


def request(count: int = 1, *classes: tuple[int | str, ...], **fields: Any) -> ExplainRequest:
    """A request for `count` pictures; without `classes` each one's top class is explained."""
    return ExplainRequest("net", (b"",) * count, classes or ((),) * count, **fields)


def explain(
    model: Model, asked: ExplainRequest, fitted: NDArray[np.uint8], max_batch: int = 8, streams: int = 1
) -> list[Explained]:
    """What plan and compute make of a request, on a device of its own."""
    with closing(Device("cpu", streams, max_batch)) as device:
        return device.run(model, make_plan(asked, model), fitted)


def trace_of(
    program: Program, shown: Tensor, target: Target | None, classes: Sequence[int], means: Means | None = None
) -> Trace:
    """What a method reads of one class per picture at `target`, if it reads a layer."""
    one = Pass(program, shown, [target] if target else [], means=means)
    return one.backward(torch.tensor(classes)).trace(target)


def close_to(ours: Tensor | NDArray[Any], oracle: Tensor | NDArray[Any]) -> float:
    """The largest difference, relative to the largest absolute value of the oracle, which must not be zero."""
    ours, oracle = torch.as_tensor(ours).double(), torch.as_tensor(oracle).double()
    assert ours.shape == oracle.shape, (ours.shape, oracle.shape)
    largest = oracle.abs().max()
    assert largest > 0, "the oracle is all zero: it proves nothing"
    return float((ours - oracle).abs().max() / largest)


class Hand(nn.Module):
    """Numbers to work out by hand: channel 0 sees red, channel 1 green minus blue, and each place has its own weight.

    On `hand_picture()` the convolution gives [[1, 2], [3, 4]] and [[-2, 2], [2, -2]]. The logits after a ReLU are 9 and
    6. With `norm` channel 0 is doubled and channel 1 lessened by 1.
    """

    def __init__(self, activation: nn.Module | None = None, norm: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(2, eps=0.0) if norm else nn.Identity()
        self.act = activation or nn.Identity()
        self.head = nn.Linear(8, 2, bias=False)
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor([[1.0, 0, 0], [0, 1, -1]])[..., None, None])
            self.head.weight[0] = torch.tensor([1.0, 0, 0, 1, -20, 3, -1, 4])
            self.head.weight[1] = torch.tensor([-1.0, -1, -1, -1, 0, 8, 0, 0])
            if isinstance(self.norm, nn.BatchNorm2d):
                self.norm.load_state_dict(
                    {
                        "weight": torch.tensor([2.0, 2]),
                        "bias": torch.tensor([0.0, 1]),
                        "running_mean": torch.tensor([0.0, 2]),
                        "running_var": torch.tensor([1.0, 4]),
                        "num_batches_tracked": torch.tensor(1),
                    }
                )

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.act(self.norm(self.conv(x))).flatten(1))
        return scores


def hand(activation: nn.Module | None = None, norm: bool = False) -> Model:
    """The model around `Hand`, for pictures of 2 x 2."""
    return model_of(program_of(Hand(activation, norm).eval().requires_grad_(False), 2))


def hand_picture(last_red: int = 4) -> NDArray[np.uint8]:
    """One picture of 2 x 2, (1,2,2,3)."""
    red, green, blue = [[1, 2], [3, last_red]], [[0, 2], [2, 0]], [[2, 0], [0, 2]]
    return np.stack([red, green, blue], axis=-1).astype(np.uint8)[None]


class Varied(nn.Module):
    """Convolutions whose gradients differ from place to place: no pooling before the linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 5, 3, stride=2, padding=1)
        self.third = nn.Conv2d(5, 4, 3, padding=1)
        self.head = nn.Linear(4 * 36, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = F.relu(self.second(x))
        scores: Tensor = self.head(F.relu(self.third(x)).flatten(1))
        return scores


class Residual(nn.Module):
    """In-place ReLUs, one module called twice, a batch norm behind a convolution, dropout, and a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 8, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8 * 36, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        x = self.relu(self.norm(self.conv(x)) + x)
        x = self.drop(x)
        scores: Tensor = self.head(self.relu(self.last(x)).flatten(1))
        return scores


class Dense(nn.Module):
    """Densely connected: the outputs of all convolutions are concatenated, with functional ReLUs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.third = nn.Conv2d(8, 4, 3, padding=1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.first(x))
        b = F.relu(self.second(a))
        c = F.relu(self.third(torch.cat([a, b], 1)), inplace=True)
        scores: Tensor = self.head(torch.cat([a, b, c], 1).amax(dim=(2, 3)))
        return scores


class Sizes(nn.Module):
    """Reads the sizes of inner values, which no cut may carry across."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4 * 36, 5)

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x).relu()
        b = self.second(a)
        b = b.reshape(a.shape[0], b.shape[1], -1).view(b.size(0), *a.shape[1:])
        scores: Tensor = self.head((a + b).relu_().reshape(b.shape[0], -1))
        return scores


@cache
def varied() -> Program:
    return program_of(seeded(Varied), 12)


@cache
def residual() -> Program:
    return program_of(seeded(Residual), 12)


SMALL = 96
"""Height and width of what the deep networks below see."""


@cache
def deep(name: str) -> tuple[nn.Module, Program]:
    """A torchvision network with seeded weights, and its program for pictures of 96 x 96."""
    keywords = {"image_size": SMALL} if name.startswith("vit") else {}
    module = seeded(lambda: getattr(torchvision.models, name)(weights=None, **keywords))
    return module, program_of(module, SMALL)


@cache
def from_timm(name: str, size: tuple[int, int], resized: bool = False) -> tuple[nn.Module, Program]:
    """A timm network with seeded weights; `resized` ones are built for the size of their pictures."""
    keywords: dict[str, Any] = {"img_size": size} if resized else {}
    module = seeded(lambda: timm.create_model(name, **keywords))
    return module, program_of(module, size)


@cache
def table(program: Program) -> LayerTable:
    return LayerTable(program)


def capture_to(folder: Path, module: nn.Module, size: int) -> tuple[Program, Program]:
    """The program of a module as captured, and as read back from its file."""
    example = torch.zeros(2, 3, size, size)
    file = folder / "net.pt2"
    first = Program(capture(module, example, file))
    return first, Program(capture(nn.Identity(), example, file))
