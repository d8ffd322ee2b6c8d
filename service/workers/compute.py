"""From fitted pictures to scores and raw maps on one device, a chunk at a time, each under a stream of its own."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from service.errors import OutOfDeviceMemory
from service.explain import Pass
from service.models.resident import Model
from service.workers.plan import Plan, Task

Pixels = NDArray[np.uint8]

OUT_OF_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "_ALLOC_FAILED")


@dataclass(frozen=True)
class RawMap:
    """One heatmap before it is laid over its picture: float32 (h,w), or signed (H,W,3)."""

    task: Task
    class_id: int
    values: NDArray[np.float32]


@dataclass(frozen=True)
class Explained:
    """What the network said of one picture. `confidences` has one entry per class."""

    confidences: NDArray[np.float32]
    maps: tuple[RawMap, ...]


class Device:
    """A device and its slots: threads that own one long-lived CUDA stream each, or a share of the CPU's cores."""

    def __init__(self, name: str, streams: int | None) -> None:
        self.device = torch.device(name)
        self.slots = streams or (2 if self.device.type == "cuda" else 1)
        self._slot = threading.local()
        self._executor = ThreadPoolExecutor(self.slots, "compute", initializer=self._open_slot)
        torch.backends.cudnn.allow_tf32 = False

    def run(
        self, model: Model, plan: Plan, pictures: Pixels, check: Callable[[], None], max_batch: int
    ) -> tuple[list[Explained], float]:
        """Explain pictures (N,H,W,3) in chunks of at most `max_batch`; also the seconds waited for a slot.

        `check` is called between the steps and raises where nobody waits any more. Raises OutOfDeviceMemory.
        """
        explained: list[Explained] = []
        waited = 0.0
        for start in range(0, len(pictures), max_batch):  # one at a time: other requests get their turn in between
            chunk = slice(start, start + max_batch)
            asked = time.perf_counter()
            part, started = self._executor.submit(self._chunk, model, plan, pictures, chunk, check).result()
            explained += part
            waited += started - asked
        return explained, waited

    def enter(self) -> None:
        """Make the device the calling thread's own, for what is loaded and captured there."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def close(self) -> None:
        self._executor.shutdown(cancel_futures=True)

    def _open_slot(self) -> None:
        # Backward stays in this thread: autograd's own thread per device would put requests in one line.
        torch.autograd.set_multithreading_enabled(False)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // self.slots))
        self._slot.stream = self._open_stream()

    def _open_stream(self) -> torch.cuda.Stream | None:
        return torch.cuda.Stream(self.device) if self.device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def _chunk(
        self, model: Model, plan: Plan, pictures: Pixels, chunk: slice, check: Callable[[], None]
    ) -> tuple[list[Explained], float]:
        started = time.perf_counter()
        stream: torch.cuda.Stream | None = self._slot.stream
        with torch.cuda.stream(stream):
            return _explain(model, plan, pictures[chunk], plan.classes[chunk], check), started


def _explain(
    model: Model, plan: Plan, pictures: Pixels, classes: tuple[tuple[int, ...], ...], check: Callable[[], None]
) -> list[Explained]:
    """Explain one chunk; on too little memory its halves, one after the other."""
    check()
    try:
        return _explain_at_once(model, plan, pictures, classes, check)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not any(sign in str(error) for sign in OUT_OF_MEMORY):
            raise
    # Only here are the failed tensors free: the exception's traceback held them.
    if len(pictures) == 1:
        raise OutOfDeviceMemory("The device has no memory for one picture through this model with this method.")
    half = len(pictures) // 2
    return [
        *_explain(model, plan, pictures[:half], classes[:half], check),
        *_explain(model, plan, pictures[half:], classes[half:], check),
    ]


def _explain_at_once(
    model: Model, plan: Plan, pictures: Pixels, classes: tuple[tuple[int, ...], ...], check: Callable[[], None]
) -> list[Explained]:
    images = model.normalise(pictures)
    passes: dict[fx.Node | None, Pass] = {}
    for task in plan.tasks:
        if task.target.node not in passes:
            passes[task.target.node] = Pass(model.program, images, task.target)
    if not passes:
        passes[None] = Pass(model.program, images)
    logits = next(iter(passes.values())).logits
    top = logits.argmax(dim=1).tolist()
    chosen = [wanted or (best,) for wanted, best in zip(classes, top, strict=True)]
    maps = _maps(plan.tasks, passes, chosen, check)
    confidences = model.confidences(logits).cpu().numpy()
    return [Explained(confidences[index], maps[index]) for index in range(len(pictures))]


def _maps(
    tasks: tuple[Task, ...],
    passes: dict[fx.Node | None, Pass],
    chosen: list[tuple[int, ...]],
    check: Callable[[], None],
) -> list[tuple[RawMap, ...]]:
    """The maps of each picture, tasks outer, classes inner; `chosen` has each picture's classes.

    Computed a class at a time, so that no more than one class's gradients are in memory.
    """
    found: list[list[list[RawMap]]] = [[[] for _ in tasks] for _ in chosen]
    for turn in range(max(map(len, chosen))):
        targets = torch.tensor([wanted[min(turn, len(wanted) - 1)] for wanted in chosen])
        traces = {node: one.trace(targets.to(one.images.device)) for node, one in passes.items()}
        for place, task in enumerate(tasks):
            check()
            values = task.method.heatmap(traces[task.target.node], task.params).float().cpu().numpy()
            for index, wanted in enumerate(chosen):
                if turn < len(wanted):
                    found[index][place].append(RawMap(task, wanted[turn], values[index]))
    return [tuple(raw for of_task in of_picture for raw in of_task) for of_picture in found]
