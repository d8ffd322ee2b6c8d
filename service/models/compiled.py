"""A head compiled by AOTInductor with its constants frozen: made and proven once, loaded in a fraction of a second.

A package checks nothing itself: a wrong layout, size or dtype gives wrong numbers without a word.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, fx
from torch._inductor.package.package import load_package

from service.models.activations import Values
from service.models.program import as_tuple

SINGLE, SEVERAL, FULL = "single.pt2", "several.pt2", "full.pt2"
SINGLY = "several.singly"
"""A file that stands for the second package where one picture at a time is faster."""
FP32_TOLERANCE = 1e-4  # of the largest absolute value
REDUCED_CORRELATION = 0.99
RUNS, LOOK_S = 5, 0.5
NOISE_S = 1e-3
"""A package may be slower than eager by this much: less is not told from noise."""

logger = logging.getLogger(__name__)

Package = Callable[[Tensor], Tensor | Sequence[Tensor]]

_loading = threading.Lock()


class Disagreement(Exception):
    """A compiled head computes something else than the eager one."""


@dataclass(frozen=True)
class Form:
    """What a head is compiled for: images (N,*shape) of `dtype` on `device`, N from 1 to `max_batch`."""

    shape: tuple[int, int, int]
    dtype: torch.dtype
    device: torch.device
    max_batch: int

    def example(self, count: int) -> Tensor:
        """Normal noise, the same each time."""
        generator = torch.Generator().manual_seed(count)
        return torch.randn(count, *self.shape, generator=generator).to(self.device, self.dtype)


class CompiledHead:
    """The packages of a head: a static one for a single picture, one with a free batch size from 2 up, and on a CPU a
    static one for the largest batch, which a busy server and the methods of many passes are full of.

    One that is slower than the eager head is not there. Without the second a batch may go through the first singly.
    """

    def __init__(self, folder: Path, form: Form, slots: int) -> None:
        """Load what `compile_head` made; `slots` threads may run it at a time."""
        self.bytes = sum(file.stat().st_size for file in folder.glob("*.pt2"))
        self._form = form
        self._single = _load(folder / SINGLE, form, slots)
        self._several = _load(folder / SEVERAL, form, slots)
        if self._single and (folder / SINGLY).exists():
            self._several = partial(_singly, self._single)
        self._full = _load(folder / FULL, form, slots) or self._several

    def takes(self, count: int) -> bool:
        """Whether there is a package for a batch of `count`."""
        return self._package(count) is not None

    def _package(self, count: int) -> Package | None:
        if not 1 <= count <= self._form.max_batch:
            return None
        if count == 1:
            return self._single
        return self._full if count == self._form.max_batch else self._several

    def __call__(self, images: Tensor) -> Values:
        """The head's values for images of the form. Raises ValueError for any other tensor."""
        form = self._form
        if images.dtype != form.dtype or images.device != form.device or images.shape[1:] != form.shape:
            raise ValueError(f"compiled for {form}, not for {tuple(images.shape)} {images.dtype} on {images.device}")
        run = self._package(len(images))
        if run is None:
            raise ValueError(f"not compiled for a batch of {len(images)}")
        with torch.no_grad():
            return as_tuple(run(images.contiguous()))


def compile_head(head: fx.GraphModule, form: Form, folder: Path) -> None:
    """Compile `head` into `folder`, keep the packages that are worth it, and prove them.

    Takes tens of seconds. Raises Disagreement, or whatever the compiler raises.
    """
    _compile(head, form.example(1), None, folder / SINGLE)
    if form.max_batch > 1:
        batch = torch.export.Dim("batch", min=2, max=form.max_batch) if form.max_batch > 2 else None
        _compile(head, form.example(2), batch, folder / SEVERAL)
        if batch and form.device.type == "cpu":
            _compile(head, form.example(form.max_batch), None, folder / FULL)
    _choose(folder, head, form)
    prove(CompiledHead(folder, form, slots=1), head, form, {1, 2, form.max_batch // 2 + 1, form.max_batch})


def prove(compiled: CompiledHead, head: fx.GraphModule, form: Form, counts: set[int]) -> None:
    """Compare with the eager head at each of these batch sizes that it takes. Raises Disagreement."""
    for count in sorted(count for count in counts if compiled.takes(count)):
        images = form.example(count)
        with torch.no_grad():
            pairs = zip(compiled(images), as_tuple(head(images)), strict=True)
        for place, (ours, eager) in enumerate(pairs):
            if not _agree(ours, eager):
                raise Disagreement(f"value {place} of a batch of {count} differs from the eager head's")


def _compile(head: fx.GraphModule, example: Tensor, batch: torch.export.Dim | None, file: Path) -> None:
    with torch.no_grad():  # constants are frozen, and weights packed for the processor, in inference only
        program = torch.export.export(head, (example,), dynamic_shapes=({0: batch},) if batch else None)
        torch._inductor.aoti_compile_and_package(program, package_path=str(file), inductor_configs={"freezing": True})


def _choose(folder: Path, head: fx.GraphModule, form: Form) -> None:
    """Remove what is slower than eager, or than one picture at a time: with a free batch size a transformer's linear
    layers are, and more so in bf16."""
    single, several, full = (_load(folder / name, form, 1) for name in (SINGLE, SEVERAL, FULL))
    assert single is not None
    if not _is_fastest(single, [head], form.example(1)):
        _replace(folder / SINGLE, "single.slower")
    if several is None:
        return
    images, singly = form.example(form.max_batch), partial(_singly, single)
    if full and not _is_fastest(full, [head, singly, several], images):
        _replace(folder / FULL, "full.slower")
    if _is_fastest(several, [head, singly], images):
        return
    kept = (folder / SINGLE).exists() and _separable(single, head, form) and _is_fastest(singly, [head], images)
    _replace(folder / SEVERAL, SINGLY if kept else "several.slower")


def _replace(package: Path, note: str) -> None:
    logger.info("%s: %s", package.name, note)
    package.unlink()
    (package.parent / note).touch()


def _separable(single: Package, head: fx.GraphModule, form: Form) -> bool:
    """Whether the values of a batch are those of its pictures, one behind the other."""
    images = form.example(2)
    with torch.no_grad():
        pairs = zip(as_tuple(_singly(single, images)), as_tuple(head(images)), strict=True)
    return all(_agree(ours, eager) for ours, eager in pairs)


def _is_fastest(package: Package, others: Sequence[Package], images: Tensor) -> bool:
    """Whether it is, by the quickest of some runs in turn: of many, where they are so short that others disturb all."""
    runs: list[list[float]] = []
    until = time.perf_counter() + LOOK_S
    while len(runs) < RUNS or time.perf_counter() < until:
        runs.append([_seconds(each, images) for each in (package, *others)])
    ours, *theirs = map(min, zip(*runs, strict=True))
    return bool(ours <= min(theirs) + NOISE_S)


def _singly(single: Package, images: Tensor) -> list[Tensor]:
    """A batch, one picture at a time."""
    values = [as_tuple(single(image[None])) for image in images]
    return [torch.cat(column) for column in zip(*values, strict=True)]


def _seconds(head: Package, images: Tensor) -> float:
    started = time.perf_counter()
    with torch.no_grad():
        as_tuple(head(images))[0].cpu()  # a CUDA device answers when it is done
    return time.perf_counter() - started


def _load(file: Path, form: Form, slots: int) -> Package | None:
    if not file.exists():
        return None
    index = form.device.index if form.device.type == "cuda" else -1
    with _loading:
        return load_package(str(file), num_runners=slots, device_index=index)


def _agree(ours: Tensor, eager: Tensor) -> bool:
    if ours.shape != eager.shape or ours.dtype != eager.dtype:
        return False
    ours, reference = ours.double(), eager.double()
    if eager.dtype == torch.float32 or not eager.is_floating_point():
        return bool((ours - reference).abs().max() <= FP32_TOLERANCE * reference.abs().max())
    return bool(torch.corrcoef(torch.stack([ours.flatten(), reference.flatten()]))[0, 1] >= REDUCED_CORRELATION)
