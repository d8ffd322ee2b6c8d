"""From a batch of fitted pictures to scores and raw maps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from service.errors import OutOfDeviceMemory
from service.explain.fusion import heatmap_of
from service.explain.means import Means, is_out_of_memory
from service.explain.trace import Backward, Pass
from service.models.resident import Model
from service.models.spec import Precision
from service.workers.plan import Task

Pixels = NDArray[np.uint8]
Numbers = list[float | None]


@dataclass(frozen=True)
class RawMap:
    """One heatmap before it is laid over its picture: float32 (h,w), or signed (H,W,3)."""

    task: Task
    class_id: int
    values: NDArray[np.float32]
    rounding_error: float | None = None
    completeness_error: float | None = None


@dataclass(frozen=True)
class Explained:
    """What the network said of one picture. `confidences` has one entry per class; `precision` is the head's."""

    confidences: NDArray[np.float32]
    maps: tuple[RawMap, ...]
    precision: Precision


def explain(
    model: Model,
    tasks: tuple[Task, ...],
    pictures: Pixels,
    classes: tuple[tuple[int, ...], ...],
    chunk: int,
    check: Callable[[], None],
) -> list[Explained]:
    """Explain one batch; on too little memory its halves, one after the other.

    `classes` has those of each picture, none for its top class. Methods that run often take `chunk` images at a time.
    `check` is called between the steps and may raise.
    Raises OutOfDeviceMemory where there is too little for one picture.
    """
    check()
    try:
        return _explain_at_once(model, tasks, pictures, classes, chunk, check)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    # Only here are the failed tensors free: the exception's traceback held them.
    if len(pictures) == 1:
        raise OutOfDeviceMemory("The device has no memory for one picture through this model with this method.")
    half = len(pictures) // 2
    return [
        *explain(model, tasks, pictures[:half], classes[:half], chunk, check),
        *explain(model, tasks, pictures[half:], classes[half:], chunk, check),
    ]


def _explain_at_once(
    model: Model,
    tasks: tuple[Task, ...],
    pictures: Pixels,
    classes: tuple[tuple[int, ...], ...],
    chunk: int,
    check: Callable[[], None],
) -> list[Explained]:
    images = model.normalise(pictures)
    by_node = {target.node: target for task in tasks for target in task.targets}
    targets = tuple(by_node.values()) or model.cut
    head = model.heads.at(*targets)
    means = Means(model.predict, chunk, check)
    one = Pass(model.program, images, targets, model.heads.values(head, images, pictures), means, head.eps)
    explained = _explain_pass(tasks, one, classes, head.precision)
    lost = [index for index, each in enumerate(explained) if head.precision != "fp32" and _underflowed(each)]
    if lost:
        exact = Pass(model.program, images[lost], targets, means=replace(means, predict=None))
        again = _explain_pass(tasks, exact, tuple(classes[index] for index in lost), "fp32")
        for index, each in zip(lost, again, strict=True):
            explained[index] = each
    return explained


def _underflowed(explained: Explained) -> bool:
    """Whether reduced precision may have lost what the network says."""
    numbers = [explained.confidences, *(raw.values for raw in explained.maps)]
    return any(not np.isfinite(values).all() or not values.any() for values in numbers)


def _explain_pass(
    tasks: tuple[Task, ...], one: Pass, classes: tuple[tuple[int, ...], ...], precision: Precision
) -> list[Explained]:
    top = one.logits.argmax(dim=1).tolist()
    chosen = [wanted or (best,) for wanted, best in zip(classes, top, strict=True)]
    maps = _maps(tasks, one, chosen)
    confidences = one.program.confidences(one.logits).cpu().numpy()
    return [Explained(confidences[index], maps[index], precision) for index in range(len(chosen))]


def _maps(tasks: tuple[Task, ...], one: Pass, chosen: list[tuple[int, ...]]) -> list[tuple[RawMap, ...]]:
    """The maps of each picture, tasks outer, classes inner; `chosen` has each picture's classes.

    Computed a class at a time, so that no more than one class's gradients are in memory.
    """
    found: list[list[list[RawMap]]] = [[[] for _ in tasks] for _ in chosen]
    for turn in range(max(map(len, chosen))):
        turns = torch.tensor([wanted[min(turn, len(wanted) - 1)] for wanted in chosen])
        backward = one.backward(turns.to(one.images.device))
        for place, task in enumerate(tasks):
            one.means.check()
            made = heatmap_of(task.method, backward, task.targets, task.params)
            rounding, incomplete = _errors(task, backward, made)
            values = made.float().cpu().numpy()
            for index, wanted in enumerate(chosen):
                if turn < len(wanted):
                    found[index][place].append(
                        RawMap(task, wanted[turn], values[index], rounding[index], incomplete[index])
                    )
    return [tuple(raw for of_task in of_picture for raw in of_task) for of_picture in found]


def _errors(task: Task, backward: Backward, made: Tensor) -> tuple[Numbers, Numbers]:
    """The rounding and completeness errors of each picture's map, as far as the method tells them.

    Of several layers, whose maps are each divided by their maximum, no rounding error is told.
    """
    trace = backward.trace(task.targets[0] if task.targets else None)
    rounding = task.method.rounding_error(trace, task.params) if len(task.targets) == 1 else None
    incomplete = task.method.completeness_error(trace, task.params, made)
    none: Numbers = [None] * len(made)
    shares = none if incomplete is None else incomplete.tolist()
    return none if rounding is None else rounding.tolist(), shares
