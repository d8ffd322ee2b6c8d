"""A head compiled by AOTInductor with its constants frozen: made and proven once, loaded in a fraction of a second.

A package checks nothing itself: a wrong layout, size or dtype gives wrong numbers without a word.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.package.package import load_package

from service.models.activations import Values
from service.models.program import as_tuple

SINGLE, SEVERAL = "single.pt2", "several.pt2"
FP32_TOLERANCE = 1e-4  # of the largest absolute value
REDUCED_CORRELATION = 0.99
RUNS = 5
NOISE_S = 1e-3
"""A package may be slower than eager by this much: less is not told from noise."""

logger = logging.getLogger(__name__)

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
    """The packages of a head: a static one for a single picture, one with a free batch size from 2 up.

    One that is slower than the eager head is not there.
    """

    def __init__(self, folder: Path, form: Form, slots: int) -> None:
        """Load what `compile_head` made; `slots` threads may run it at a time."""
        self.bytes = sum(file.stat().st_size for file in folder.glob("*.pt2"))
        self._form = form
        self._single = _load(folder / SINGLE, form, slots)
        self._several = _load(folder / SEVERAL, form, slots)

    def takes(self, count: int) -> bool:
        """Whether there is a package for a batch of `count`."""
        return self._package(count) is not None

    def _package(self, count: int) -> Callable[[Tensor], Tensor | list[Tensor]] | None:
        if not 1 <= count <= self._form.max_batch:
            return None
        return self._single if count == 1 else self._several

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
    """Compile `head` into `folder` and prove the packages there.

    Takes tens of seconds. Raises Disagreement, or whatever the compiler raises.
    """
    _compile(head, form.example(1), None, folder / SINGLE)
    if form.max_batch > 1:
        batch = torch.export.Dim("batch", min=2, max=form.max_batch) if form.max_batch > 2 else None
        _compile(head, form.example(2), batch, folder / SEVERAL)
    compiled = CompiledHead(folder, form, slots=1)
    prove(compiled, head, form, counts={1, 2, form.max_batch // 2 + 1, form.max_batch})
    _drop_slower(compiled, head, form, folder)


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


def _drop_slower(compiled: CompiledHead, head: fx.GraphModule, form: Form, folder: Path) -> None:
    """Remove what is slower than eager: a transformer's linear layers with a free batch size are."""
    for count, name in {form.max_batch: SEVERAL, 1: SINGLE}.items():
        if not compiled.takes(count):
            continue
        images = form.example(count)
        runs = [(_seconds(compiled, images), _seconds(head, images)) for _ in range(RUNS)]
        ours, eager = map(min, zip(*runs, strict=True))
        if ours > eager + NOISE_S:
            (folder / name).unlink()
            (folder / name).with_suffix(".slower").touch()
            logger.info("a batch of %d takes %.1f ms compiled, %.1f ms eager", count, 1e3 * ours, 1e3 * eager)


def _seconds(head: Callable[[Tensor], Any], images: Tensor) -> float:
    started = time.perf_counter()
    with torch.no_grad():
        as_tuple(head(images))[0].cpu()  # a CUDA device answers when it is done
    return time.perf_counter() - started


def _load(file: Path, form: Form, slots: int) -> Callable[[Tensor], Tensor | list[Tensor]] | None:
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
