"""The parent's side of one worker: its process, what it was given and what it has told."""

from __future__ import annotations

import asyncio
import contextlib
import math
import multiprocessing
import queue
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path

from service.models.repository import Entry
from service.settings import Settings
from service.workers import entry, wire
from service.workers.entry import SURVIVED
from service.workers.messages import (
    EXIT_POISONED,
    Beat,
    Cancel,
    Done,
    Hello,
    Job,
    Loading,
    ModelInfo,
    Parked,
    Stop,
    ToChild,
    ToParent,
)

CRASHES = frozenset({signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE})
"""Signals that a process brings upon itself; whoever sends SIGKILL has reasons of his own."""
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
        folder: Path | None,
        receive: Callable[[Worker, ToParent | None], None],
    ) -> None:
        """`receive` is called on the event loop with each message, and with None when the process is gone."""
        context = _context(device)
        self.device = device
        self.jobs: dict[int, Job] = {}
        self.parked: set[int] = set()
        """Jobs that wait for their turn to decode and take no room meanwhile."""
        self.models: dict[str, ModelInfo] = {}
        self.capacity = 0
        self.slots = 1
        self.loading: str | None = None
        self.loading_since = 0.0
        self.asked: dict[str, asyncio.Future[str | None]] = {}
        self.stalled_s = 0.0
        self.heard = math.inf  # it has not begun
        self.hung = False
        """Killed because a request's step did not end, or because it was silent while it loaded nothing."""
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
        """Start the process and the threads that talk to it. Blocks while the process is spawned.

        Raises what a machine without room for them says; no process is left then.
        """
        self.process.start()
        self.heard = time.monotonic()
        self._child_end.close()
        try:
            threading.Thread(target=self._write, name=f"write-{self.device}", daemon=True).start()
            threading.Thread(target=self._read, name=f"read-{self.device}", daemon=True).start()
        except RuntimeError:
            self._outbox.put(None)
            self.process.kill()
            raise

    def hear(self, message: ToParent | None) -> None:
        """Remember what the process tells of itself."""
        self.heard = time.monotonic()
        match message:
            case Beat():
                self.stalled_s = message.stalled_s
            case Hello():
                self.capacity, self.slots = message.capacity, message.slots
            case Loading():
                self.loading, self.loading_since = message.model_id, time.monotonic()
            case Parked(parked=True):
                self.parked.add(message.id)
            case Parked() | Done():
                self.parked.discard(message.id)

    def has(self, model_id: str) -> bool:
        """Whether this worker can explain with the model now."""
        return model_id in self.models and self.models[model_id].state == "ready"

    @property
    def pictures(self) -> int:
        """How many pictures it was given and has not answered."""
        return sum(len(job.request.pictures) for job in self.jobs.values())

    def has_room(self, passable: bool) -> bool:
        """Whether it takes another job. Those that others may pass leave a quarter of its room to these."""
        active = [job for job in self.jobs.values() if job.id not in self.parked]
        if sum(len(job.request.pictures) for job in active) >= self.capacity:
            return False
        if not passable:
            return True
        taken = sum(len(job.request.pictures) for job in active if job.passable)
        return taken < max(1, self.capacity * 3 // 4)

    def hangs(self, hang_s: float) -> bool:
        """Whether it has been silent, or at one step, for too long."""
        return max(time.monotonic() - self.heard, self.stalled_s) > hang_s

    def overdue(self, timeout_s: float) -> bool:
        """Whether it has been loading one model for longer than this."""
        return self.loading is not None and time.monotonic() - self.loading_since > timeout_s

    def end_hanging(self, hang_s: float) -> None:
        """Kill the process. Unlike a SIGKILL from outside, this counts against what it did."""
        self.hung = self.stalled_s > hang_s or self.loading is None
        self.process.kill()

    @property
    def crashed(self) -> bool:
        """Whether the process is gone by a signal that it brought upon itself."""
        return -(self.process.exitcode or 0) in CRASHES

    @property
    def poisoned(self) -> bool:
        """Whether the process left because its device was lost to it."""
        return self.process.exitcode == EXIT_POISONED

    @property
    def ending(self) -> str:
        """How the process ended."""
        return _ending(self.process.exitcode)

    @property
    def folder(self) -> Path | None:
        """Where the process keeps what is temporary, if there is such a place."""
        return self._folder and self._folder / str(self.process.pid)

    def submit(self, job: Job) -> None:
        self.jobs[job.id] = job
        self.send(job)

    def send(self, message: ToChild) -> None:
        self._outbox.put(message)

    def cancel(self, job_id: int) -> None:
        """Tell the worker that nobody waits for a job, if it still has it."""
        if job_id in self.jobs:
            self._outbox.put(Cancel(job_id))

    def kill(self) -> None:
        """End the process, where there is one."""
        if self.process.pid is not None:
            self.process.kill()

    def stop(self) -> None:
        self._outbox.put(Stop())

    def _read(self) -> None:
        try:
            with contextlib.suppress(EOFError, OSError):
                while True:
                    self._post(wire.receive(self._connection))
        finally:
            self._outbox.put(None)
            self.process.join(EXIT_S)
            if self.process.exitcode is None:
                self.process.kill()
                self.process.join()
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


class Capture:
    """A process that captures a model, which is not to stall what serves, nor to take it along."""

    def __init__(self, model: Entry, device: str, folder: Path | None, timeout_s: float) -> None:
        """`folder` is where workers find what is captured, if there is such a place."""
        self.died = False
        self._process = _context(device).Process(target=entry.capture, args=(model, device, folder), daemon=True)
        self._timeout_s = timeout_s
        self._cancelled = False

    def run(self) -> str | None:
        """Run it to its end. Returns the reason where it did not survive that; `died` then, unless we killed it."""
        self._process.start()
        self._process.join(0 if self._cancelled else self._timeout_s)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
            return too_long(self._timeout_s)
        if self._process.exitcode == SURVIVED:
            return None
        self.died = not self._cancelled
        return f"the process that captured it {_ending(self._process.exitcode)}"

    def cancel(self) -> None:
        """End it, also where it has not begun."""
        self._cancelled = True
        if self._process.is_alive():
            self._process.kill()


def too_long(timeout_s: float) -> str:
    """Why a model is given up whose load does not end."""
    return f"it was not loaded within {timeout_s:g} seconds"


def _ending(exit_code: int | None) -> str:
    if exit_code is None or exit_code >= 0:
        return f"ended with exit code {exit_code}"
    return f"was ended by signal {-exit_code} ({signal.strsignal(-exit_code)})"


def _context(device: str) -> SpawnContext | ForkServerContext:
    """How a worker's process is made: on a CPU forked from one that has imported everything, in 0.02 s instead of 3.

    macOS's frameworks bear no fork, and CUDA none after its first call; and what forks is spoken to through a socket in
    the temporary folder, which must be there, and whose path must not be long.
    """
    if device != "cpu" or sys.platform != "linux" or not _holds_sockets():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["service.workers.preload"])
    return context


def _holds_sockets() -> bool:
    try:
        return len(tempfile.gettempdir()) <= MAX_TEMPORARY
    except OSError:  # there is no temporary folder
        return False
