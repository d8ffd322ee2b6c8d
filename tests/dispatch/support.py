"""The real pool over workers without a process: a test says what they tell the server, and sees what they are told."""

from __future__ import annotations

import asyncio
import functools
import math
import threading
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, ParamSpec, cast
from unittest import mock

from service.dispatch.dispatcher import Dispatcher
from service.errors import ServiceError
from service.models.repository import Entry
from service.settings import Settings
from service.workers import pool as pool_module
from service.workers.messages import (
    Answer,
    Beat,
    Done,
    ExplainRequest,
    Hello,
    Job,
    Loaded,
    Loading,
    MethodInfo,
    ModelChanged,
    ModelInfo,
    Parked,
    Timings,
    ToChild,
    ToParent,
)
from service.workers.pool import Pool
from service.workers.worker import Worker

P = ParamSpec("P")

METHOD = MethodInfo("grad_cam", "cam", 1, "paper", "description", "1", {"type": "object"})
SLOW = MethodInfo("score_cam", "cam", 1, "paper", "description", "2048", {"type": "object"}, alone=True)
PATIENCE_S = 60.0


def on_loop(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Run a test on an event loop of its own."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), PATIENCE_S))

    return run


async def settle() -> None:
    """Let every task do what it can without waiting for anything outside."""
    for _ in range(10):
        await asyncio.sleep(0)


def request(model_id: str = "tiny", pictures: int = 1) -> ExplainRequest:
    return ExplainRequest(model_id, pictures=(b"",) * pictures, target_classes=((),) * pictures)


def answer(queue: float = 0.0) -> Answer:
    return Answer("tiny", "sha256:00", (), Timings(queue=queue, decode=0.5, compute=0.25, render=0.125))


class FakeProcess:
    """A process that has ended."""

    pid = 1234
    exitcode = 1

    def __init__(self) -> None:
        self.calls: list[str] = []

    def join(self, timeout: float | None = None) -> None:
        self.calls.append("join")

    def kill(self) -> None:
        self.calls.append("kill")


class FakeWorker(Worker):
    """A worker whose process is the test."""

    def __init__(
        self,
        device: str,
        receive: Callable[[Worker, ToParent | None], None],
        started: Callable[..., None],
        folder: Path = Path("none"),
    ) -> None:
        self.device = device
        self.jobs = {}
        self.models = {}
        self.capacity = 0
        self.slots = 1
        self.stalled_s = 0.0
        self.heard = math.inf
        self.hung = False
        self.parked = set()
        self.loading = None
        self.loading_since = 0.0
        self.asked = {}
        self.sent: list[ToChild] = []
        self.told = asyncio.Event()
        self.serves = False
        self.gone = threading.Event()
        self.process = cast(Any, FakeProcess())
        self.given: list[Job] = []
        self.cancelled: list[int] = []
        self.stopped = False
        self._tell = receive
        self._started = started
        self._folder = folder

    def start(self) -> None:
        self._started(self)

    def submit(self, job: Job) -> None:
        self.jobs[job.id] = job
        self.given.append(job)

    def send(self, message: ToChild) -> None:
        self.sent.append(message)
        self.told.set()

    def cancel(self, job_id: int) -> None:
        if job_id in self.jobs:
            self.cancelled.append(job_id)

    def stop(self) -> None:
        self.stopped = True
        self.gone.set()

    @property
    def ids(self) -> list[int]:
        """The jobs that it was given, in this order."""
        return [job.id for job in self.given]

    def hello(self, capacity: int = 1) -> None:
        self._tell(self, Hello(self.device, capacity, 1, (METHOD, SLOW)))

    def tell(self, *infos: ModelInfo) -> None:
        for info in infos:
            self._tell(self, ModelChanged(info))

    def serve(self, *model_ids: str, capacity: int = 1) -> None:
        """Become ready with these models."""
        self.hello(capacity)
        self.tell(*(ModelInfo(model_id, "ready", type="classification") for model_id in model_ids))

    def finish(self, job_id: int, outcome: Answer | ServiceError | None = None, spent: float = 0.0) -> None:
        self._tell(self, Done(job_id, outcome or answer(), spent))

    def loaded(self, model_id: str, reason: str | None = None) -> None:
        self._tell(self, Loaded(model_id, reason))

    def load(self, model_id: str | None) -> None:
        """Say that it begins to, or that it has survived that."""
        self._tell(self, Loading(model_id))

    def beat(self, stalled_s: float = 0.0) -> None:
        self._tell(self, Beat(stalled_s))

    def park(self, job_id: int, parked: bool) -> None:
        """Say that a job waits for its turn to decode, or that this has come."""
        self._tell(self, Parked(job_id, parked))

    def die(self, exit_code: int = -9) -> None:
        cast(Any, self.process).exitcode = exit_code
        self._tell(self, None)


class Bench:
    """A dispatcher over the real pool over fake workers; `async with` starts and stops them."""

    def __init__(self, *model_ids: str, devices: int = 1, **settings: Any) -> None:
        self.settings = Settings(**settings)
        self.pool = Pool(self.settings, tuple(Entry(one, Path(one)) for one in model_ids or ("tiny",)))
        self.dispatcher = Dispatcher(self.settings, self.pool)
        self._devices = tuple(f"cuda:{index}" for index in range(devices))
        self.capture = mock.Mock(**{"return_value.run.return_value": None, "return_value.died": False})
        self._patch = mock.patch.multiple(pool_module, Worker=self._make, Capture=self.capture)

    async def __aenter__(self) -> Bench:
        self._loop = asyncio.get_running_loop()
        self._started: asyncio.Queue[FakeWorker] = asyncio.Queue()
        self._patch.start()
        await self.pool.start(self._devices, self.dispatcher)
        self.workers = [await self.started() for _ in self._devices]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.pool.stop(1)
        self._patch.stop()

    def _make(
        self,
        device: str,
        settings: Settings,
        entries: tuple[Entry, ...],
        folder: Path,
        receive: Callable[[Worker, ToParent | None], None],
    ) -> FakeWorker:
        def started(worker: FakeWorker) -> None:
            self._loop.call_soon_threadsafe(self._started.put_nowait, worker)

        return FakeWorker(device, receive, started, folder)

    @property
    def worker(self) -> FakeWorker:
        return self.workers[0]

    async def started(self) -> FakeWorker:
        """The next worker that the pool starts."""
        return await self._started.get()

    async def ask(
        self, model_id: str = "tiny", pictures: int = 1, size_bytes: int = 1, timeout_s: float = 60.0, **fields: Any
    ) -> asyncio.Task[Answer]:
        """A request that has got as far as it can."""
        work = self.dispatcher.explain(replace(request(model_id, pictures), **fields), size_bytes, timeout_s)
        task = asyncio.create_task(work)
        await settle()
        return task
