"""A device and its slots: threads on which waiting pictures are computed in batches, each under a stream of its own."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TypeVar

import numpy as np
import torch

from service.errors import DeadlineExceeded, ServiceError
from service.explain.means import is_poisoned
from service.models.resident import Model
from service.workers.compute import Explained, Pixels, explain
from service.workers.messages import BATCH_DELAY_S
from service.workers.plan import Plan, Task
from service.workers.progress import Progress

logger = logging.getLogger(__name__)

E = TypeVar("E", bound=Exception)


@dataclass(eq=False)
class Order:
    """What the pictures of one request have in common.

    `gone`: whether nobody waits for them any more. `since`: from when on the request waits for its turn.
    `spent`: the seconds that a slot has worked for it.
    """

    model: Model
    tasks: tuple[Task, ...]
    gone: Callable[[], bool]
    batch: bool = False
    since: float = field(default_factory=time.perf_counter)
    spent: float = 0.0

    @property
    def alone(self) -> bool:
        """Whether its pictures share no batch."""
        return any(task.method.alone for task in self.tasks)

    @property
    def turn(self) -> float:
        """The request with the least has the next turn."""
        return self.since + (BATCH_DELAY_S if self.batch else 0.0)


@dataclass(frozen=True)
class Computed:
    """What the network said of a picture, and when (`time.perf_counter`) the batch that it was in was computed."""

    explained: Explained
    started: float
    ended: float


@dataclass(frozen=True, eq=False)
class Item:
    """A fitted picture (H,W,3) that waits for a slot, its classes (none: the top class), and where the result goes."""

    order: Order
    pixels: Pixels
    classes: tuple[int, ...]
    result: Future[Computed] = field(default_factory=Future)

    def suits(self, other: Item) -> bool:
        """Whether the two may share a batch. Their classes may differ, not how many: a hundred would hold up one."""
        if self.order.alone:
            return self is other
        return (
            self.order.model is other.order.model
            and (self.order is other.order or self.order.tasks == other.order.tasks)
            and (len(self.classes) or 1) == (len(other.classes) or 1)
        )


class Device:
    """A device and its slots: threads that own one long-lived CUDA stream each, or a share of the CPU's cores.

    A free slot takes the request that has waited longest, with whatever else waits and suits it, up to `max_batch`
    pictures. Nothing waits for a fuller batch, and a request with more pictures gets its next turn after the others.
    A request of many passes lets a batch of quick ones pass between any two of its steps.
    """

    def __init__(self, name: str, streams: int | None, max_batch: int) -> None:
        self.device = torch.device(name)
        self.slots = streams or (2 if self.device.type == "cuda" else 1)
        self.max_batch = max_batch
        self.threads = max(1, cores() // self.slots)
        self.progress = Progress()
        self.on_poisoned: Callable[[], None] = lambda: None
        self._waiting: list[Item] = []
        self._lock = threading.Lock()
        self._slot = threading.local()
        self._streams: SimpleQueue[torch.cuda.Stream | None] = SimpleQueue()
        for _ in range(self.slots):
            self._streams.put(self._open_stream())
        self._executor = ThreadPoolExecutor(self.slots, "compute", initializer=self._open_slot)
        torch.backends.cudnn.allow_tf32 = False

    def put(self, items: list[Item]) -> None:
        """Let pictures wait for a slot, all at once, so that they may share a batch.

        Each one's `result` is set on the slot's thread: DeadlineExceeded where its order was gone before its turn,
        OutOfDeviceMemory, or whatever the model or the method raised, which is logged.
        """
        with self._lock:
            self._waiting += items
        for _ in items:  # enough for batches of one; where they were larger, the last of these find nothing
            self._executor.submit(self._work)

    def run(
        self, model: Model, plan: Plan, pictures: Pixels, gone: Callable[[], bool] = lambda: False
    ) -> list[Explained]:
        """Explain pictures (N,H,W,3) while the caller waits. Raises what `put` says."""
        order = Order(model, plan.tasks, gone)
        items = [Item(order, pixels, classes) for pixels, classes in zip(pictures, plan.classes, strict=True)]
        self.put(items)
        return [item.result.result().explained for item in items]

    def enter(self) -> None:
        """Make the device the calling thread's own, for what is loaded and captured there."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def close(self) -> None:
        """Finish what waits, and leave no thread."""
        self._executor.shutdown()

    def _open_slot(self) -> None:
        # Backward stays in this thread: autograd's own thread per device would put requests in one line.
        torch.autograd.set_multithreading_enabled(False)
        torch.set_num_threads(self.threads)
        self._slot.stream = self._streams.get()

    def _open_stream(self) -> torch.cuda.Stream | None:
        return torch.cuda.Stream(self.device) if self.device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def _work(self) -> None:
        if batch := self._take():
            with torch.cuda.stream(self._slot.stream), self.progress.working():
                self._compute(batch)

    def _take(self, quick: bool = False) -> list[Item]:
        """The next batch, or the next of quick requests. What nobody waits for any more is refused on the way."""
        with self._lock:
            gone = {item for item in self._waiting if item.order.gone()}
            ready = (item for item in self._waiting if item not in gone and not (quick and _passable(item.order)))
            line = sorted(ready, key=lambda item: item.order.turn)
            batch = [item for item in line if item.suits(line[0])][: self.max_batch]
            taken = gone.union(batch)
            self._waiting = [item for item in self._waiting if item not in taken]
            now = time.perf_counter()
            for item in batch:
                item.order.since = now
        for item in gone:
            item.result.set_exception(abandoned())
        return batch

    def _compute(self, batch: list[Item]) -> None:
        """Set the result of each item. What fails in company is tried again request by request: one alone is guilty."""
        orders = dict.fromkeys(item.order for item in batch)
        passable = all(map(_passable, orders))
        begun = False
        passed = 0.0  # seconds that others took between the steps

        def check() -> None:
            nonlocal begun, passed
            if all(order.gone() for order in orders):
                raise abandoned()
            if passable and begun:
                passed += self._let_pass()
            begun = True
            self.progress.step()

        started = time.perf_counter()
        outcome = self._explain(batch, check)
        ended = time.perf_counter()
        with self._lock:
            for item in batch:
                item.order.spent += (ended - started - passed) / len(batch)
        if isinstance(outcome, list):
            for item, one in zip(batch, outcome, strict=True):
                item.result.set_result(Computed(one, started, ended))
        elif len(orders) == 1:
            for item in batch:
                item.result.set_exception(outcome)
        else:
            for order in orders:
                self._compute([item for item in batch if item.order is order])

    def _explain(self, batch: list[Item], check: Callable[[], None]) -> list[Explained] | Exception:
        order = batch[0].order
        try:
            pixels = np.stack([item.pixels for item in batch])
            classes = tuple(item.classes for item in batch)
            return explain(order.model, order.tasks, pixels, classes, self.max_batch, check)
        except Exception as error:
            if not isinstance(error, ServiceError):
                logger.exception("a batch of %d pictures failed", len(batch))
            if is_poisoned(error):
                self.on_poisoned()
            return bare(error)

    def _let_pass(self) -> float:
        """Compute one batch of quick requests, if any waits, and return the seconds that it took."""
        started = time.perf_counter()
        if batch := self._take(quick=True):
            with torch.enable_grad():  # the step that waits may have none
                self._compute(batch)
        return time.perf_counter() - started


def _passable(order: Order) -> bool:
    """Whether others may pass it between its steps."""
    return order.batch or order.alone


def abandoned() -> DeadlineExceeded:
    """The error of a request that was cancelled, or whose deadline has passed."""
    return DeadlineExceeded("Nobody waits for this request any more.")


def bare(error: E) -> E:
    """The error without the frames that it came through, which would keep a batch's tensors alive."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
