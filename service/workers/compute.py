"""From fitted pictures to scores and raw maps on one device, a chunk at a time, each under a stream of its own."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from service.errors import OutOfDeviceMemory
from service.explain import Pass, Trace
from service.models.resident import Model
from service.workers.plan import Plan, Task

Pixels = NDArray[np.uint8]

CPU_OUT_OF_MEMORY = "can't allocate memory"


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
    ) -> list[Explained]:
        """Explain pictures (N,H,W,3) in chunks of at most `max_batch`.

        `check` is called between the steps and raises where nobody waits any more. Raises OutOfDeviceMemory.
        """
        explained: list[Explained] = []
        for start in range(0, len(pictures), max_batch):  # one at a time: other requests get their turn in between
            chunk = slice(start, start + max_batch)
            explained += self._executor.submit(self._chunk, model, plan, pictures, chunk, check).result()
        return explained

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
    ) -> list[Explained]:
        stream: torch.cuda.Stream | None = self._slot.stream
        with torch.cuda.stream(stream):
            return _explain(model, plan, pictures[chunk], plan.classes[chunk], check)


def _explain(
    model: Model, plan: Plan, pictures: Pixels, classes: tuple[tuple[int, ...], ...], check: Callable[[], None]
) -> list[Explained]:
    """Explain one chunk; on too little memory its halves, one after the other."""
    check()
    try:
        return _explain_at_once(model, plan, pictures, classes, check)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and CPU_OUT_OF_MEMORY not in str(error):
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
    rounds = [
        torch.tensor([wanted[min(turn, len(wanted) - 1)] for wanted in chosen], device=images.device)
        for turn in range(max(map(len, chosen)))
    ]
    traces = {node: [one.trace(targets) for targets in rounds] for node, one in passes.items()}
    maps = [_maps(task, traces[task.target.node], chosen, check) for task in plan.tasks]
    confidences = model.confidences(logits).cpu().numpy()
    return [
        Explained(confidences[index], tuple(raw for of_task in maps for raw in of_task[index]))
        for index in range(len(pictures))
    ]


def _maps(
    task: Task, traces: list[Trace], chosen: list[tuple[int, ...]], check: Callable[[], None]
) -> list[list[RawMap]]:
    """A task's maps of each picture, in the order of its classes: trace k has class k of every picture that has one."""
    maps: list[list[RawMap]] = [[] for _ in chosen]
    for turn, trace in enumerate(traces):
        check()
        values = task.method.heatmap(trace, task.params).float().cpu().numpy()
        for index, wanted in enumerate(chosen):
            if turn < len(wanted):
                maps[index].append(RawMap(task, wanted[turn], values[index]))
    return maps
