"""The parent's side of the workers: one spawned process per device, started, watched and replaced.

Knows nothing of queues or HTTP: it tells a listener what arrived and what was lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import queue
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Protocol

from service.models.repository import Entry
from service.settings import Settings
from service.workers import entry
from service.workers.messages import (
    Cancel,
    Done,
    Hello,
    Job,
    MethodInfo,
    ModelChanged,
    ModelInfo,
    Stop,
    ToChild,
    ToParent,
)

logger = logging.getLogger(__name__)

MAX_BACKOFF_S = 30.0
EXIT_S = 5.0


class Worker:
    """One process on one device. Two threads move messages, so that the event loop never waits for a pipe."""

    def __init__(
        self,
        device: str,
        settings: Settings,
        entries: tuple[Entry, ...],
        folder: Path,
        receive: Callable[[Worker, ToParent | None], None],
    ) -> None:
        """`receive` is called on the event loop with each message, and with None when the process is gone."""
        context = multiprocessing.get_context("spawn")
        self.device = device
        self.jobs: dict[int, int] = {}  # and the pictures of each
        self.models: dict[str, ModelInfo] = {}
        self.capacity = 0
        self.gone = threading.Event()
        self.serves = False
        self._receive = receive
        self._folder = folder
        self._loop = asyncio.get_running_loop()
        self._outbox: queue.SimpleQueue[ToChild | None] = queue.SimpleQueue()
        self._connection, self._child_end = context.Pipe(duplex=True)
        self.process = context.Process(
            target=entry.run, args=(self._child_end, device, settings, entries, folder), name=f"heatmap-{device}"
        )

    def start(self) -> None:
        """Start the process and the threads that talk to it. Blocks while the process is spawned."""
        self.process.start()
        self._child_end.close()
        threading.Thread(target=self._read, name=f"read-{self.device}", daemon=True).start()
        threading.Thread(target=self._write, name=f"write-{self.device}", daemon=True).start()

    def has(self, model_id: str) -> bool:
        """Whether this worker can explain with the model now."""
        return model_id in self.models and self.models[model_id].state == "ready"

    @property
    def pictures(self) -> int:
        """How many pictures it was given and has not answered."""
        return sum(self.jobs.values())

    def submit(self, job: Job) -> None:
        self.jobs[job.id] = len(job.request.pictures)
        self._outbox.put(job)

    def cancel(self, job_id: int) -> None:
        """Tell the worker that nobody waits for a job, if it still has it."""
        if job_id in self.jobs:
            self._outbox.put(Cancel(job_id))

    def stop(self) -> None:
        self._outbox.put(Stop())

    def _read(self) -> None:
        try:
            with contextlib.suppress(EOFError, OSError):
                while True:
                    self._post(self._connection.recv())
        finally:
            self._outbox.put(None)
            self.process.join(EXIT_S)
            if self.process.exitcode is None:
                self.process.kill()
                self.process.join()
            shutil.rmtree(self._folder / str(self.process.pid), ignore_errors=True)
            self.gone.set()
            self._post(None)

    def _post(self, message: ToParent | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._receive, self, message)

    def _write(self) -> None:
        with self._connection:  # closed when the reader has left it, and never under its hands
            while (message := self._outbox.get()) is not None:
                with contextlib.suppress(OSError):
                    self._connection.send(message)


class Listener(Protocol):
    """Who is told, on the event loop, what happens to jobs."""

    def done(self, done: Done) -> None:
        """A job's outcome arrived."""

    def lost(self, job_ids: tuple[int, ...]) -> None:
        """A worker died under these jobs, in the order in which it got them."""

    def changed(self) -> None:
        """A worker may have room, or a model more."""


class Pool:
    """All workers, and what is known of models and methods through them."""

    def __init__(self, settings: Settings, entries: tuple[Entry, ...]) -> None:
        self.workers: list[Worker] = []
        self.models: dict[str, ModelInfo] = {entry.id: ModelInfo(entry.id, state="loading") for entry in entries}
        self.methods: tuple[MethodInfo, ...] = ()
        self._listener: Listener
        self._settings = settings
        self._entries = entries
        self._stopping = False
        self._failures: dict[str, int] = {}
        self._folder: tempfile.TemporaryDirectory[str]
        self._starts: set[asyncio.Task[None]] = set()

    async def start(self, devices: tuple[str, ...], listener: Listener) -> None:
        """Start one worker per device, keep one there until `stop`, and tell `listener` what happens."""
        self._listener = listener
        self._folder = tempfile.TemporaryDirectory(prefix="heatmap-service-")
        for device in devices:
            await self._start_worker(device)

    def free_worker(self, model_id: str, closed: Collection[Worker] = ()) -> Worker | None:
        """The least busy worker, none of the `closed`, that has the model and room for a picture.

        A request may have more pictures than there is room: were it to wait for more, small ones would always be first.
        """
        workers = (worker for worker in self.workers if worker not in closed and worker.has(model_id))
        free = [worker for worker in workers if worker.pictures < worker.capacity]
        return min(free, key=lambda worker: worker.pictures, default=None)

    async def stop(self, timeout_s: float) -> None:
        """Let the workers finish what they do, for `timeout_s` seconds at most; afterwards none is left."""
        self._stopping = True
        for task in self._starts:
            task.cancel()
        await asyncio.gather(*self._starts, return_exceptions=True)
        for worker in self.workers:
            worker.stop()
        await asyncio.to_thread(_wait_or_kill, tuple(self.workers), timeout_s)
        self._folder.cleanup()

    async def _start_worker(self, device: str) -> None:
        worker = Worker(device, self._settings, self._entries, Path(self._folder.name), self._receive)
        self.workers.append(worker)
        start = asyncio.ensure_future(asyncio.to_thread(worker.start))
        try:
            await asyncio.shield(start)
        except asyncio.CancelledError:  # `stop` must find a process that is there, or none
            await asyncio.wait([start])
            raise
        except OSError:
            logger.exception("worker %s could not be started", device)
            self._replace(worker)
            return
        logger.info("worker %s started, pid %s", device, worker.process.pid)

    def _receive(self, worker: Worker, message: ToParent | None) -> None:
        match message:
            case Done():
                worker.jobs.pop(message.id, None)
                self._listener.done(message)
            case Hello():
                worker.capacity = message.capacity
                self.methods = message.methods
            case ModelChanged(info=info):
                worker.models[info.id] = info
                if info.state == "ready" or not any(other.has(info.id) for other in self.workers):
                    self.models[info.id] = info
                if worker.models.keys() >= self.models.keys():
                    worker.serves = True
                    self._failures[worker.device] = 0
            case None:
                self._replace(worker)
        self._listener.changed()

    def _replace(self, worker: Worker) -> None:
        self.workers.remove(worker)
        if self._stopping:
            return
        failures = self._failures.get(worker.device, 0)
        self._failures[worker.device] = failures + 1
        delay = min(2.0 ** min(failures, 10) - 1, MAX_BACKOFF_S)
        logger.error(
            "worker %s ended with exit code %s under %d jobs; a new one starts in %.0f s",
            worker.device,
            worker.process.exitcode,
            len(worker.jobs),
            delay,
        )
        self._listener.lost(tuple(sorted(worker.jobs)))
        task = asyncio.get_running_loop().create_task(self._start_later(worker.device, delay))
        self._starts.add(task)
        task.add_done_callback(self._starts.discard)

    async def _start_later(self, device: str, delay: float) -> None:
        await asyncio.sleep(delay)
        await self._start_worker(device)


def _wait_or_kill(workers: Sequence[Worker], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    for worker in workers:
        if not worker.gone.wait(max(0.0, deadline - time.monotonic())):
            worker.process.kill()
            worker.gone.wait()
