"""A head compiled by AOTInductor with its constants frozen: made and proven once, loaded in a fraction of a second.

A package checks nothing itself: a wrong layout, size or dtype gives wrong numbers without a word.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, fx
from torch._inductor.package.package import load_package

from service.models.activations import Values
from service.models.program import as_tuple

SINGLE, SEVERAL = "single.pt2", "several.pt2"
FP32_TOLERANCE = 1e-4  # of the largest absolute value
REDUCED_CORRELATION = 0.99

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
    """The two packages of a head: a static one for a single picture, one with a free batch size from 2 up."""

    def __init__(self, folder: Path, form: Form, slots: int) -> None:
        """Load what `compile_head` made; `slots` threads may run it at a time."""
        self.max_batch = form.max_batch
        self.bytes = sum(file.stat().st_size for file in folder.glob("*.pt2"))
        self._form = form
        self._single = _load(folder / SINGLE, form, slots)
        self._several = _load(folder / SEVERAL, form, slots) if form.max_batch > 1 else self._single

    def __call__(self, images: Tensor) -> Values:
        """The head's values for images of the form. Raises ValueError for any other tensor."""
        form = self._form
        if images.dtype != form.dtype or images.device != form.device or images.shape[1:] != form.shape:
            raise ValueError(f"compiled for {form}, not for {tuple(images.shape)} {images.dtype} on {images.device}")
        if not 1 <= len(images) <= form.max_batch:
            raise ValueError(f"compiled for batches of 1 to {form.max_batch}, not of {len(images)}")
        run = self._single if len(images) == 1 else self._several
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
    prove(CompiledHead(folder, form, slots=1), head, form, counts={1, 2, form.max_batch // 2 + 1, form.max_batch})


def prove(compiled: CompiledHead, head: fx.GraphModule, form: Form, counts: set[int]) -> None:
    """Compare with the eager head at each of these batch sizes that the form has. Raises Disagreement."""
    for count in sorted(count for count in counts if count <= form.max_batch):
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


def _load(file: Path, form: Form, slots: int) -> Callable[[Tensor], Tensor | list[Tensor]]:
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
