"""A device and its slots: threads on which batches are computed, each under a stream of its own."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from service.models.resident import Model
from service.workers.compute import Explained, Pixels, explain
from service.workers.plan import Plan


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
            return explain(model, plan, pictures[chunk], plan.classes[chunk], check), started
