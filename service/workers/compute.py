"""From a batch of fitted pictures to scores and raw maps."""

from __future__ import annotations

from collections.abc import Callable
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


def explain(
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
        *explain(model, plan, pictures[:half], classes[:half], check),
        *explain(model, plan, pictures[half:], classes[half:], check),
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
