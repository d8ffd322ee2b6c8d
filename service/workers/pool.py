"""The parent's side of the workers: one spawned process per device, started, watched and replaced.

Knows nothing of queues or HTTP: it tells a listener what arrived and what was lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import multiprocessing
import queue
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path
from typing import Protocol

from service.errors import ModelNotFound, nearest
from service.models.repository import Entry, scan
from service.settings import Settings, SettingsError
from service.workers import entry
from service.workers.messages import (
    BEAT_S,
    Beat,
    Cancel,
    Done,
    Hello,
    Job,
    Load,
    Loaded,
    MethodInfo,
    ModelChanged,
    ModelInfo,
    Stop,
    ToChild,
    ToParent,
    Unload,
)

logger = logging.getLogger(__name__)

MAX_BACKOFF_S = 30.0
EXIT_S = 5.0
MAX_TEMPORARY = 70
"""Characters of the temporary folder's path, so that a socket's in it has no more than 107."""


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
        context = _context(device)
        self.device = device
        self.jobs: dict[int, Job] = {}
        self.models: dict[str, ModelInfo] = {}
        self.capacity = 0
        self.slots = 1
        self.asked: dict[str, asyncio.Future[str | None]] = {}
        self.stalled_s = 0.0
        self.heard = math.inf  # it has not begun
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
        self.heard = time.monotonic()
        self._child_end.close()
        threading.Thread(target=self._read, name=f"read-{self.device}", daemon=True).start()
        threading.Thread(target=self._write, name=f"write-{self.device}", daemon=True).start()

    def has(self, model_id: str) -> bool:
        """Whether this worker can explain with the model now."""
        return model_id in self.models and self.models[model_id].state == "ready"

    @property
    def pictures(self) -> int:
        """How many pictures it was given and has not answered."""
        return sum(len(job.request.pictures) for job in self.jobs.values())

    def has_room(self, passable: bool) -> bool:
        """Whether it takes another job. Those that others may pass leave a quarter of its room to these."""
        if self.pictures >= self.capacity:
            return False
        if not passable:
            return True
        taken = sum(len(job.request.pictures) for job in self.jobs.values() if job.passable)
        return taken < max(1, self.capacity * 3 // 4)

    def hangs(self, hang_s: float) -> bool:
        """Whether it has been silent, or at one step, for too long."""
        return max(time.monotonic() - self.heard, self.stalled_s) > hang_s

    def submit(self, job: Job) -> None:
        self.jobs[job.id] = job
        self.send(job)

    def send(self, message: ToChild) -> None:
        self._outbox.put(message)

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

    def done(self, job: Job, done: Done) -> None:
        """A job's outcome arrived."""

    def lost(self, job_ids: tuple[int, ...], exit_code: int | None) -> None:
        """A worker died under these jobs, in the order in which it got them. Negative: by that signal."""

    def changed(self) -> None:
        """A worker may have room, or a model more."""


class Pool:
    """All workers, and what is known of models and methods through them."""

    def __init__(self, settings: Settings, entries: tuple[Entry, ...]) -> None:
        self.workers: list[Worker] = []
        self.models: dict[str, ModelInfo] = {entry.id: ModelInfo(entry.id, state="loading") for entry in entries}
        self.methods: tuple[MethodInfo, ...] = ()
        self.replaced = 0
        self._listener: Listener
        self._settings = settings
        self._entries = {entry.id: entry for entry in entries}
        self._administration = asyncio.Lock()
        self._stopping = False
        self._failures: dict[str, int] = {}
        self._folder: tempfile.TemporaryDirectory[str]
        self._starts: set[asyncio.Task[None]] = set()
        self._watch: asyncio.TimerHandle

    async def start(self, devices: tuple[str, ...], listener: Listener) -> None:
        """Start one worker per device, keep one there until `stop`, and tell `listener` what happens."""
        self._listener = listener
        self._folder = tempfile.TemporaryDirectory(prefix="heatmap-service-")
        for device in devices:
            await self._start_worker(device)
        self._end_hanging()

    def free_worker(self, model_id: str, passable: bool, closed: Collection[Worker] = ()) -> Worker | None:
        """The least busy worker, none of the `closed`, that has the model and room for a picture.

        A request may have more pictures than there is room: were it to wait for more, small ones would always be first.
        """
        workers = (worker for worker in self.workers if worker not in closed and worker.has(model_id))
        free = [worker for worker in workers if worker.has_room(passable)]
        return min(free, key=lambda worker: worker.pictures, default=None)

    async def load(self, model_id: str) -> str | None:
        """Have every worker read a model of the repository again, and return the reason where that failed.

        Raises ModelNotFound where the repository has no such folder.
        """
        async with self._administration:
            entries = await asyncio.to_thread(self._scan)
            if model_id not in entries:
                hint = nearest(model_id, entries)
                raise ModelNotFound(f"The repository has no folder {model_id!r}.{hint}")
            self._entries[model_id] = entries[model_id]
            if model_id not in self.models or self.models[model_id].state != "ready":
                known = {**self.models, model_id: ModelInfo(model_id, state="loading")}
                self.models = dict(sorted(known.items()))
            for device in {worker.device for worker in self.workers}:
                await asyncio.to_thread(_capture, entries[model_id], device, Path(self._folder.name))
            reasons = await self._ask_all(Load(entries[model_id]), model_id)
        return next(filter(None, reasons), None)

    def _scan(self) -> dict[str, Entry]:
        try:
            return {entry.id: entry for entry in scan(self._settings.models)}
        except SettingsError:  # it has become unreadable, or empty
            return {}

    async def unload(self, model_id: str) -> None:
        """Have every worker let go of a model that no job is under way for."""
        async with self._administration:
            self._entries.pop(model_id, None)
            self.models[model_id] = replace(self.models[model_id], state="unloaded", reason=None)
            for worker in self.workers:
                worker.models.pop(model_id, None)
            await self._ask_all(Unload(model_id), model_id)

    async def _ask_all(self, message: Load | Unload, model_id: str) -> list[str | None]:
        """What each worker says when it has done so. One that dies meanwhile has a successor that does it anyway."""
        asked = []
        for worker in self.workers:
            worker.asked[model_id] = asyncio.get_running_loop().create_future()
            asked.append(worker.asked[model_id])
            worker.send(message)
        return await asyncio.gather(*asked)

    async def stop(self, timeout_s: float) -> None:
        """Let the workers finish what they do, for `timeout_s` seconds at most; afterwards none is left."""
        self._stopping = True
        self._watch.cancel()
        for task in self._starts:
            task.cancel()
        await asyncio.gather(*self._starts, return_exceptions=True)
        for worker in self.workers:
            worker.stop()
        await asyncio.to_thread(_wait_or_kill, tuple(self.workers), timeout_s)
        self._folder.cleanup()

    async def _start_worker(self, device: str) -> None:
        worker = Worker(device, self._settings, tuple(self._entries.values()), Path(self._folder.name), self._receive)
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

    def _end_hanging(self) -> None:
        """Kill every worker that shows no progress, now and again after the next beat; it is replaced like others."""
        for worker in self.workers:
            if worker.hangs(self._settings.hang_s):
                logger.error("worker %s shows no progress for %g s", worker.device, self._settings.hang_s)
                worker.process.kill()
        self._watch = asyncio.get_running_loop().call_later(BEAT_S, self._end_hanging)

    def _receive(self, worker: Worker, message: ToParent | None) -> None:
        worker.heard = time.monotonic()
        match message:
            case Beat():
                worker.stalled_s = message.stalled_s
                return
            case Done():
                if job := worker.jobs.pop(message.id, None):
                    self._listener.done(job, message)
            case Hello():
                worker.capacity, worker.slots = message.capacity, message.slots
                self._check_serves(worker)
                self.methods = message.methods
            case Loaded():
                if asked := worker.asked.pop(message.model_id, None):
                    asked.set_result(message.reason)
            case ModelChanged(info=info) if info.id in self._entries:
                self._change(worker, info)
            case None:
                self._replace(worker)
        self._listener.changed()

    def _change(self, worker: Worker, info: ModelInfo) -> None:
        worker.models[info.id] = info
        if info.state == "ready" or not any(other.has(info.id) for other in self.workers):
            self.models[info.id] = info
        self._check_serves(worker)

    def _check_serves(self, worker: Worker) -> None:
        """It serves when it has told of every model."""
        if worker.models.keys() >= self._entries.keys():
            worker.serves = True
            self._failures[worker.device] = 0

    def _replace(self, worker: Worker) -> None:
        self.workers.remove(worker)
        for asked in worker.asked.values():
            asked.set_result(None)
        if self._stopping:
            return
        failures = self._failures.get(worker.device, 0)
        self._failures[worker.device] = failures + 1
        self.replaced += 1
        delay = min(2.0 ** min(failures, 10) - 1, MAX_BACKOFF_S)
        logger.error(
            "worker %s ended with exit code %s under %d jobs; a new one starts in %.0f s",
            worker.device,
            worker.process.exitcode,
            len(worker.jobs),
            delay,
        )
        self._listener.lost(tuple(sorted(worker.jobs)), worker.process.exitcode)
        task = asyncio.get_running_loop().create_task(self._start_later(worker.device, delay))
        self._starts.add(task)
        task.add_done_callback(self._starts.discard)

    async def _start_later(self, device: str, delay: float) -> None:
        await asyncio.sleep(delay)
        await self._start_worker(device)


def _capture(model: Entry, device: str, folder: Path) -> None:
    process = _context(device).Process(target=entry.capture, args=(model, device, folder), daemon=True)
    process.start()
    process.join()


def _context(device: str) -> SpawnContext | ForkServerContext:
    """How a worker's process is made: on a CPU forked from one that has imported everything, in 0.02 s instead of 3.

    macOS's frameworks bear no fork, and CUDA none after its first call; and what forks is spoken to through a socket in
    the temporary folder, whose path must not be long.
    """
    if device != "cpu" or sys.platform != "linux" or len(tempfile.gettempdir()) > MAX_TEMPORARY:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["service.workers.preload"])
    return context


def _wait_or_kill(workers: Sequence[Worker], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    for worker in workers:
        if not worker.gone.wait(max(0.0, deadline - time.monotonic())):
            worker.process.kill()
            worker.gone.wait()
