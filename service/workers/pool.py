"""The workers together: one per device, started, watched and replaced.

Knows nothing of queues or HTTP: it tells a listener what arrived and what was lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import tempfile
import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from service.errors import ModelNotFound, echo, nearest
from service.models import kept
from service.models.repository import Entry, scan
from service.settings import Settings, SettingsError
from service.workers.messages import (
    BEAT_S,
    Beat,
    Done,
    Hello,
    Job,
    Load,
    Loaded,
    Loading,
    MethodInfo,
    ModelChanged,
    ModelInfo,
    ToParent,
    Unload,
)
from service.workers.worker import Capture, Worker, too_long

logger = logging.getLogger(__name__)

MAX_BACKOFF_S = 30.0
LEAVE_S = 30.0
"""What a dead worker was compiling has left by then."""
MAX_CAPTURES = 2
"""Tries to capture a model whose capturing process dies: somebody outside may have killed the first."""


class Listener(Protocol):
    """Who is told, on the event loop, what happens to jobs."""

    def done(self, job: Job, done: Done) -> None:
        """A job's outcome arrived."""

    def lost(self, job_ids: tuple[int, ...], crashed: bool) -> None:
        """A worker died under these jobs, in the order in which it got them. `crashed`: one of them did it."""

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
        self._deaths: dict[str, float] = {}  # when a worker died that loaded the model, which no other has loaded since
        self._given_up: dict[str, str] = {}  # the reasons
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._capture: Capture | None = None
        self._left: dict[Path, float] = {}
        self._starts: set[asyncio.Task[None]] = set()
        self._watch: asyncio.TimerHandle

    async def start(self, devices: tuple[str, ...], listener: Listener) -> None:
        """Start one worker per device, keep one there until `stop`, and tell `listener` what happens."""
        self._listener = listener
        self._temporary = kept.temporary_folder()
        for device in devices:
            await self._start_worker(device)
        self._look_after()

    def free_worker(self, model_id: str, passable: bool, closed: Collection[Worker] = ()) -> Worker | None:
        """The least busy worker, none of the `closed`, that has the model and room for a picture.

        None that is still to load a model under which one died: its next death must tell who it was.
        A request may have more pictures than there is room: were it to wait for more, small ones would always be first.
        """
        workers = (worker for worker in self.workers if worker not in closed and worker.has(model_id))
        safe = (worker for worker in workers if worker.models.keys() >= self._deaths.keys())
        free = [worker for worker in safe if worker.has_room(passable)]
        return min(free, key=lambda worker: worker.pictures, default=None)

    @property
    def _folder(self) -> Path | None:
        """Where all that is temporary is kept, if there is such a place."""
        return Path(self._temporary.name) if self._temporary else None

    async def load(self, model_id: str) -> str | None:
        """Have every worker read a model of the repository again, and return the reason where that failed.

        Raises ModelNotFound where the repository has no such folder.
        """
        async with self._administration:
            entries = await asyncio.to_thread(self._scan)
            if model_id not in entries:
                hint = nearest(model_id, entries)
                raise ModelNotFound(f"The repository has no folder {echo(model_id)}.{hint}")
            if model_id not in self.models or self.models[model_id].state != "ready":
                known = {**self.models, model_id: ModelInfo(model_id, state="loading")}
                self.models = dict(sorted(known.items()))
            for device in {worker.device for worker in self.workers}:
                if reason := await self._captured(entries[model_id], device):
                    self._fail(model_id, reason)
                    return reason
            self._entries[model_id] = entries[model_id]
            self._given_up.pop(model_id, None)
            reasons = await self._ask_all(Load(entries[model_id]), model_id)
        return next(filter(None, reasons), None)

    async def _captured(self, entry: Entry, device: str) -> str | None:
        """The reason why not."""
        reason = None
        for _ in range(MAX_CAPTURES):
            self._capture = capture = Capture(entry, device, self._folder, self._settings.load_timeout_s)
            try:
                reason = await asyncio.to_thread(capture.run)
            finally:
                self._capture = None
            if not capture.died:
                break
        return reason

    def _scan(self) -> dict[str, Entry]:
        try:
            return {entry.id: entry for entry in scan(self._settings.models)}
        except SettingsError:  # it has become unreadable, or empty
            return {}

    async def unload(self, model_id: str) -> None:
        """Have every worker let go of a model that no job is under way for."""
        async with self._administration:
            self.models[model_id] = replace(self.models[model_id], state="unloaded", reason=None)
            self._drop(model_id)
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
        if self._capture:
            self._capture.cancel()
        for task in self._starts:
            task.cancel()
        await asyncio.gather(*self._starts, return_exceptions=True)
        for worker in self.workers:
            worker.stop()
        await asyncio.to_thread(_wait_or_kill, tuple(self.workers), timeout_s)
        if self._temporary:
            self._temporary.cleanup()

    def kill(self) -> None:
        """End every process and remove their folder at once, whatever is under way. A signal handler may call it."""
        if self._capture:
            self._capture.cancel()
        for worker in self.workers:
            with contextlib.suppress(Exception):  # the threads that watch the process may be at it too
                worker.kill()
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)

    async def _start_worker(self, device: str) -> None:
        entries = tuple(self._entries.values())
        try:
            worker = Worker(device, self._settings, entries, self._folder, self._receive)
        except OSError:
            logger.exception("worker %s could not be prepared", device)
            self._start_again(device)
            return
        self.workers.append(worker)
        start = asyncio.ensure_future(asyncio.to_thread(worker.start))
        try:
            await asyncio.shield(start)
        except asyncio.CancelledError:  # `stop` must find a process that is there, or none
            await asyncio.wait([start])
            if start.exception():
                self.workers.remove(worker)
            raise
        except Exception:  # no memory, no process, no thread, or the process that forks is gone
            logger.exception("worker %s could not be started", device)
            self._replace(worker)
            return
        logger.info("worker %s started, pid %s", device, worker.process.pid)

    def _look_after(self) -> None:
        """Do what is due after each beat, now and again after the next one."""
        self._end_hanging()
        self._end_overdue_loads()
        self._clear_away()
        self._watch = asyncio.get_running_loop().call_later(BEAT_S, self._look_after)

    def _end_hanging(self) -> None:
        """Kill every worker that shows no progress; it is replaced like others."""
        for worker in self.workers:
            if worker.hangs(self._settings.hang_s):
                logger.error("worker %s shows no progress for %g s", worker.device, self._settings.hang_s)
                worker.end_hanging(self._settings.hang_s)

    def _end_overdue_loads(self) -> None:
        """Give up every model that takes too long to load, and kill the worker that does: its successor leaves it."""
        timeout_s = self._settings.load_timeout_s
        for worker in [worker for worker in self.workers if worker.overdue(timeout_s)]:
            if worker.loading is not None and worker.loading in self._entries:
                self._give_up(worker.loading, too_long(timeout_s))
            worker.process.kill()

    def _clear_away(self) -> None:
        """Remove the folders of dead workers, repeatedly: their compilers leave after them, and write until then."""
        now = time.monotonic()
        self._left = {folder: died for folder, died in self._left.items() if now - died < LEAVE_S}
        for folder in filter(Path.exists, self._left):
            asyncio.get_running_loop().run_in_executor(None, shutil.rmtree, folder, True)

    def _receive(self, worker: Worker, message: ToParent | None) -> None:
        worker.hear(message)
        match message:
            case Beat() | Loading():
                return
            case Done():
                if job := worker.jobs.pop(message.id, None):
                    self._listener.done(job, message)
            case Hello():
                self._check_serves(worker)
                self.methods = message.methods
            case Loaded():
                self._deaths.pop(message.model_id, None)
                if asked := worker.asked.pop(message.model_id, None):
                    asked.set_result(message.reason)
            case ModelChanged(info=info) if info.id in self._entries:
                self._change(worker, info)
            case None:
                self._replace(worker)
        self._listener.changed()

    def _change(self, worker: Worker, info: ModelInfo) -> None:
        self._deaths.pop(info.id, None)
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
        if worker not in self.workers:
            return
        self.workers.remove(worker)
        for model_id, reason in self._given_up.items():
            self._fail(model_id, reason)  # it may have been the last that served it
        jobs_may_be_to_blame = self._judge(worker)
        for model_id, asked in worker.asked.items():
            asked.set_result(self._given_up.get(model_id))
        if self._stopping:
            return
        if worker.folder:
            self._left[worker.folder] = time.monotonic()
        self.replaced += 1
        delay = self._start_again(worker.device)
        logger.error(
            "worker %s %s under %d jobs; a new one starts in %.0f s",
            worker.device,
            worker.ending,
            len(worker.jobs),
            delay,
        )
        self._listener.lost(tuple(sorted(worker.jobs)), jobs_may_be_to_blame)

    def _start_again(self, device: str) -> float:
        """Start a worker in so many seconds as it returns: the more, the more often this failed in a row."""
        failures = self._failures.get(device, 0)
        self._failures[device] = failures + 1
        delay = min(2.0 ** min(failures, 10) - 1, MAX_BACKOFF_S)
        task = asyncio.get_running_loop().create_task(self._start_later(device, delay))
        self._starts.add(task)
        task.add_done_callback(self._starts.discard)
        return delay

    def _judge(self, worker: Worker) -> bool:
        """Whether its jobs may be to blame for its end.

        A model is given up when a worker dies while it loads it, and another that began later too; but not where jobs
        ran beside the load that may have poisoned the device.
        """
        if worker.hung:
            return True
        model_id = worker.loading
        if model_id is None:
            return worker.crashed
        if model_id in self._entries and not (worker.poisoned and worker.jobs):
            died = self._deaths.setdefault(model_id, time.monotonic())
            if died < worker.loading_since:
                self._give_up(model_id, f"two workers in a row died while they loaded it; the last {worker.ending}")
        return False

    def _give_up(self, model_id: str, reason: str) -> None:
        self._drop(model_id)
        self._given_up[model_id] = reason
        self._fail(model_id, reason)

    def _drop(self, model_id: str) -> None:
        """No worker is to load it any more, or to be waited for because it has not yet."""
        self._entries.pop(model_id, None)
        self._deaths.pop(model_id, None)
        self._given_up.pop(model_id, None)
        for worker in self.workers:
            self._check_serves(worker)

    def _fail(self, model_id: str, reason: str) -> None:
        if self.models[model_id].state != "failed" and not any(worker.has(model_id) for worker in self.workers):
            logger.error("model %s is given up: %s", model_id, reason)
            self.models[model_id] = ModelInfo(model_id, state="failed", reason=reason)

    async def _start_later(self, device: str, delay: float) -> None:
        await asyncio.sleep(delay)
        await self._start_worker(device)


def _wait_or_kill(workers: Sequence[Worker], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    for worker in workers:
        if not worker.gone.wait(max(0.0, deadline - time.monotonic())):
            worker.process.kill()
            worker.gone.wait()
