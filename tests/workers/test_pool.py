"""A real worker process from its hello to its end, and the pool over workers without processes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import tempfile
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, cast

import psutil
import pytest

from service.errors import PictureQuarantined, WorkerLost
from service.models.repository import Entry, scan
from service.settings import Settings
from service.workers import wire
from service.workers.messages import EXIT_POISONED, Answer, Done, ExplainRequest, Job, Load, ModelInfo, ToParent
from service.workers.pool import MAX_BACKOFF_S, MAX_CAPTURES, Pool, _wait_or_kill
from service.workers.worker import Worker
from tests.conftest import DATA, TINY_CODE, write_tiny
from tests.dispatch.support import METHOD, SLOW, Bench, FakeProcess, FakeWorker, answer, on_loop, settle

NO_DEADLINE = float("inf")


class Listening:
    """A listener that remembers, and lets a test wait for what comes."""

    def __init__(self) -> None:
        self.outcomes: asyncio.Queue[Done] = asyncio.Queue()
        self.losses: asyncio.Queue[tuple[tuple[int, ...], bool]] = asyncio.Queue()
        self._changed = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()

    def done(self, job: Job, done: Done) -> None:
        self.outcomes.put_nowait(done)

    def lost(self, job_ids: tuple[int, ...], crashed: bool) -> None:
        self.losses.put_nowait((job_ids, crashed))

    def changed(self) -> None:
        self._tasks.add(asyncio.ensure_future(self._notify()))

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def serving(self, pool: Pool) -> Worker:
        """The pool's only worker, once it serves."""
        async with self._changed:
            await self._changed.wait_for(lambda: any(worker.serves for worker in pool.workers))
        (worker,) = pool.workers
        return worker


@contextlib.asynccontextmanager
async def pool_of(models: Path, listener: Listening) -> AsyncIterator[Pool]:
    pool = Pool(Settings(models=models, compiled_heads=0), scan(models))
    await pool.start(("cpu",), listener)
    try:
        yield pool
    finally:
        await pool.stop(30)


def explain(job_id: int, pictures: int = 1) -> Job:
    data = ((DATA / "chelsea.png").read_bytes(),) * pictures
    return Job(job_id, ExplainRequest("tiny", data, ((),) * pictures, ("grad_cam",)), NO_DEADLINE)


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name in ("read-cpu", "write-cpu")}


@on_loop
async def test_a_real_worker_from_its_hello_to_its_end_with_a_death_in_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny(tmp_path / "models" / "tiny")
    (tmp_path / "models" / "broken").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    listener = Listening()
    async with pool_of(tmp_path / "models", listener) as pool:
        assert {info.state for info in pool.models.values()} == {"loading"}
        worker = await listener.serving(pool)
        assert pool.models["tiny"].state == "ready"
        assert pool.models["tiny"].classes == ("ant", "bee", "cat", "dog", "cat")
        assert (pool.models["broken"].state, pool.models["broken"].reason) == ("failed", "model.toml is missing")
        assert {"grad_cam", "guided_grad_cam"} <= {method.name for method in pool.methods}
        assert worker.capacity >= 1
        assert pool.free_worker("tiny", passable=False) is worker
        assert pool.free_worker("broken", passable=False) is None

        worker.submit(explain(1))
        done = await listener.outcomes.get()
        assert done.id == 1
        assert isinstance(done.outcome, Answer)
        assert done.outcome.results[0].heatmaps[0].method == "grad_cam"
        assert not worker.jobs

        for job_id in (7, 5):
            worker.submit(explain(job_id, pictures=64))
        worker.process.kill()
        assert await listener.losses.get() == ((5, 7), False)
        fresh = await listener.serving(pool)
        assert fresh is not worker
        assert fresh.process.pid != worker.process.pid
        assert worker.process.exitcode == -9
        processes = [psutil.Process(fresh.process.pid)]
        assert any((tmp_path / "temporary").glob("heatmap-service-*"))
    assert not [process for process in processes if process.is_running()]
    assert not any((tmp_path / "temporary").glob("heatmap-service-*"))
    assert fresh.process.exitcode == 0
    assert pool.workers in ([], [fresh])
    for thread in threading.enumerate():
        if thread.name in ("read-cpu", "write-cpu"):
            await asyncio.to_thread(thread.join, 60)
    assert threads() == set()


@on_loop
async def test_what_a_worker_said_before_its_death_is_heard(tmp_path: Path) -> None:
    heard: list[ToParent | None] = []
    worker = Worker("cpu", Settings(compiled_heads=0), (), tmp_path, lambda worker, message: heard.append(message))
    last_words = Done(1, answer())
    wire.send(worker._child_end, last_words)
    worker._child_end.close()
    worker.process = cast(Any, FakeProcess())
    worker.submit(explain(2))  # which cannot be sent any more
    writer = threading.Thread(target=worker._write, daemon=True)
    writer.start()
    await asyncio.to_thread(writer.join, 0.2)
    await asyncio.to_thread(worker._read)
    await settle()
    await asyncio.to_thread(writer.join)
    assert heard == [last_words, None]


# Without processes


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long each start was put off; the waiting itself is left out."""
    seen: list[float] = []
    real = asyncio.sleep

    async def sleep(delay: float) -> None:
        if delay:
            seen.append(delay)
        await real(0)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    return seen


async def die_at_once(bench: Bench, times: int) -> FakeWorker:
    worker = bench.worker
    for _ in range(times):
        worker.die()
        worker = await bench.started()
    return worker


@on_loop
async def test_a_worker_that_dies_at_once_is_started_again_after_ever_longer_waits(waits: list[float]) -> None:
    async with Bench() as bench:
        await die_at_once(bench, 8)
        assert waits == [1, 3, 7, 15, 30, 30, 30]  # the first start is not put off
        assert max(waits) == MAX_BACKOFF_S
        assert len(bench.pool.workers) == 1


@on_loop
async def test_a_worker_that_served_is_replaced_without_a_wait(waits: list[float]) -> None:
    async with Bench() as bench:
        fresh = await die_at_once(bench, 4)
        assert waits == [1, 3, 7]
        fresh.serve("tiny")
        fresh.die()
        await bench.started()
        assert waits == [1, 3, 7]


@on_loop
async def test_each_device_has_waits_of_its_own(waits: list[float]) -> None:
    async with Bench(devices=2) as bench:
        await die_at_once(bench, 3)
        assert waits == [1, 3]
        bench.workers[1].die()
        assert (await bench.started()).device == "cuda:1"
        assert waits == [1, 3]


@on_loop
async def test_it_is_tried_again_for_ever(waits: list[float]) -> None:
    async with Bench() as bench:
        bench.pool._failures[bench.worker.device] = 5000
        bench.worker.die()
        await asyncio.wait_for(bench.started(), 30)
        assert waits == [MAX_BACKOFF_S]


@pytest.mark.parametrize("error", [OSError(11, "Try again"), EOFError(), RuntimeError("can't start new thread")])
@on_loop
async def test_a_start_that_fails_is_repeated(
    error: Exception, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Bench() as bench:
        start = FakeWorker.start

        def fail_once(worker: FakeWorker) -> None:
            monkeypatch.setattr(FakeWorker, "start", start)
            raise error

        monkeypatch.setattr(FakeWorker, "start", fail_once)
        bench.worker.die()
        fresh = await asyncio.wait_for(bench.started(), 30)
        assert bench.pool.workers == [fresh]


@on_loop
async def test_a_worker_for_which_there_is_no_pipe_is_tried_again(
    waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Bench() as bench:
        init = FakeWorker.__init__

        def fail_once(worker: FakeWorker, *args: Any) -> None:
            monkeypatch.setattr(FakeWorker, "__init__", init)
            raise OSError(24, "Too many open files")

        monkeypatch.setattr(FakeWorker, "__init__", fail_once)
        bench.worker.die()
        fresh = await asyncio.wait_for(bench.started(), 30)
        assert bench.pool.workers == [fresh]


@on_loop
async def test_the_death_of_a_worker_is_told_with_its_jobs_in_order_and_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with Bench() as bench:
        bench.worker.serve("tiny", capacity=2)
        tasks = [await bench.ask() for _ in range(2)]
        with caplog.at_level(logging.ERROR):
            bench.worker.die()
        assert "under 2 jobs" in caplog.text
        fresh = await bench.started()
        fresh.serve("tiny", capacity=2)
        for job_id in (1, 2):
            fresh.finish(job_id)
            await settle()
        assert fresh.ids == [1, 2]
        await asyncio.gather(*tasks)


@on_loop
async def test_a_worker_serves_when_it_has_told_of_every_model() -> None:
    async with Bench("tiny", "other", "broken") as bench:
        bench.worker.hello()
        assert bench.pool.methods == (METHOD, SLOW)
        for info in (ModelInfo("tiny", "ready"), ModelInfo("broken", "failed")):
            bench.worker.tell(info)
            assert not bench.worker.serves
        bench.worker.tell(ModelInfo("other", "ready"))
        assert bench.worker.serves


@on_loop
async def test_free_is_the_least_busy_worker_with_the_model_and_room() -> None:
    async with Bench("tiny", "other", devices=3) as bench:
        one, two, three = bench.workers
        assert bench.pool.free_worker("tiny", passable=False) is None
        one.serve("tiny", capacity=3)
        two.serve("tiny", capacity=3)
        three.serve("other", capacity=3)
        one.jobs = {1: explain(1), 2: explain(2)}
        two.jobs = {3: explain(3)}
        assert bench.pool.free_worker("tiny", passable=False) is two
        two.jobs[4] = explain(4, pictures=2)
        assert bench.pool.free_worker("tiny", passable=False) is one
        one.jobs[5] = explain(5, pictures=64)  # more than there is room for
        assert bench.pool.free_worker("tiny", passable=False) is None
        assert bench.pool.free_worker("other", passable=False) is three
        assert bench.pool.free_worker("unknown", passable=False) is None


@on_loop
async def test_no_worker_is_started_once_it_stops() -> None:
    bench = Bench(devices=2)
    async with bench:
        one, two = bench.workers
        one.die()  # its replacement is on its way
    two.die()
    await settle()
    assert two.stopped
    assert len(bench.pool.workers) <= 1


@on_loop
async def test_it_stops_while_a_worker_is_being_started(monkeypatch: pytest.MonkeyPatch) -> None:
    entered, go = threading.Event(), threading.Event()

    class Unstarted(FakeProcess):
        def join(self, timeout: float | None = None) -> None:
            assert go.is_set(), "can only join a started process"  # as multiprocessing says

    def start(worker: FakeWorker) -> None:
        monkeypatch.setattr(worker, "process", Unstarted())
        entered.set()
        go.wait(30)

    bench = Bench()
    async with bench:
        folder = bench.pool._folder
        assert folder
        monkeypatch.setattr(FakeWorker, "start", start)
        bench.worker.die()
        await asyncio.to_thread(entered.wait, 30)
        asyncio.get_running_loop().call_later(0.05, go.set)
        try:
            await bench.pool.stop(1)
            assert not await asyncio.to_thread(folder.exists)
        finally:
            go.set()
            bench.pool.workers.clear()


def test_only_a_process_that_does_not_leave_in_time_is_killed() -> None:
    polite, stubborn = (FakeWorker("cpu", lambda worker, message: None, lambda worker: None) for _ in range(2))
    polite.gone.set()
    stubborn.process.kill = stubborn.gone.set  # type: ignore[method-assign]
    _wait_or_kill([polite, stubborn], 0)
    assert stubborn.gone.is_set()
    assert cast(Any, polite.process).calls == []


@pytest.mark.parametrize(("stalled_s", "silent_s", "killed"), [(3.0, 0.0, True), (0.0, 3.0, True), (1.0, 1.0, False)])
@on_loop
async def test_a_worker_without_progress_or_a_sign_of_life_is_killed(
    stalled_s: float, silent_s: float, killed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async with Bench(hang_s=2) as bench:
        bench.worker.serve("tiny")
        bench.worker.beat(stalled_s)
        bench.worker.heard -= silent_s
        with caplog.at_level(logging.ERROR):
            bench.pool._end_hanging()
        assert (cast(Any, bench.worker.process).calls == ["kill"]) is killed
        assert ("shows no progress for 2 s" in caplog.text) is killed
        bench.worker.beat()
        cast(Any, bench.worker.process).calls.clear()
        bench.pool._end_hanging()
        assert cast(Any, bench.worker.process).calls == [], "it goes on"


# A model whose load crashes


async def crash_loading(
    bench: Bench, model_id: str, worker: FakeWorker, exit_code: int = -signal.SIGSEGV
) -> FakeWorker:
    worker.hello()
    worker.load(model_id)
    worker.die(exit_code)
    return await bench.started()


@on_loop
async def test_a_model_that_crashes_two_workers_while_they_load_it_is_given_up() -> None:
    async with Bench("tiny", "deadly") as bench:
        fresh = await crash_loading(bench, "deadly", bench.worker)
        assert bench.pool.models["deadly"].state == "loading"
        fresh = await crash_loading(bench, "deadly", fresh)
        info = bench.pool.models["deadly"]
        assert info.state == "failed"
        assert "two workers in a row died" in (info.reason or "")
        assert "signal 11" in (info.reason or "")
        fresh.serve("tiny")
        assert fresh.serves


@pytest.mark.parametrize("exit_code", [-signal.SIGKILL, 70, 1, 0])
@on_loop
async def test_any_second_death_in_a_row_fails_the_model_and_no_first_one(exit_code: int, waits: list[float]) -> None:
    async with Bench("tiny", "deadly") as bench:
        fresh = await crash_loading(bench, "deadly", bench.worker, exit_code)
        assert bench.pool.models["deadly"] == ModelInfo("deadly", "loading")
        fresh = await crash_loading(bench, "deadly", fresh, exit_code)
        assert bench.pool.models["deadly"].state == "failed"
        fresh.serve("tiny")
        assert fresh.serves


@on_loop
async def test_a_device_that_jobs_may_have_poisoned_does_not_count_against_the_model_that_loads(
    waits: list[float],
) -> None:
    async with Bench("tiny", "large") as bench:
        worker = bench.worker
        for _ in range(3):
            worker.hello()
            worker.load("large")
            worker.jobs[1] = explain(1)
            worker.die(EXIT_POISONED)
            worker = await bench.started()
        assert bench.pool.models["large"].state == "loading"


@on_loop
async def test_a_load_that_is_given_up_is_not_answered_as_done() -> None:
    async with Bench("tiny", "endless", load_timeout_s=5) as bench:
        bench.worker.serve("tiny", "endless")
        answer = asyncio.ensure_future(bench.pool._ask_all(Load(Entry("endless", Path("endless"))), "endless"))
        await asyncio.sleep(0)
        bench.worker.load("endless")
        bench.worker.loading_since -= 6
        bench.pool._end_overdue_loads()
        bench.worker.die(-signal.SIGKILL)
        assert await answer == ["it was not loaded within 5 seconds"]


@on_loop
async def test_two_workers_that_are_killed_at_once_while_they_load_a_model_do_not_fail_it() -> None:
    async with Bench(devices=2) as bench:
        for worker in bench.workers:
            worker.load("tiny")
        for worker in bench.workers:
            worker.die(-signal.SIGKILL)
        assert bench.pool.models["tiny"].state == "loading"


@on_loop
async def test_a_load_that_takes_too_long_ends_its_worker_and_the_others_are_served() -> None:
    async with Bench("tiny", "endless", load_timeout_s=5) as bench:
        bench.worker.hello()
        bench.worker.load("endless")
        bench.pool._look_after()
        assert cast(Any, bench.worker.process).calls == []
        bench.worker.loading_since -= 6
        bench.pool._end_overdue_loads()
        assert cast(Any, bench.worker.process).calls == ["kill"]
        assert bench.pool.models["endless"].reason == "it was not loaded within 5 seconds"
        bench.worker.die()
        fresh = await bench.started()
        fresh.serve("tiny")
        assert fresh.serves
        assert bench.pool.models["tiny"].state == "ready", "it is not to blame"
        fresh.load(None)
        fresh.loading_since -= 6
        bench.pool._end_overdue_loads()
        assert cast(Any, fresh.process).calls == [], "it loads nothing"


@on_loop
async def test_a_model_that_is_given_up_fails_when_the_last_worker_that_served_it_is_gone() -> None:
    async with Bench("tiny", devices=2, load_timeout_s=5) as bench:
        serving, loading = bench.workers
        serving.serve("tiny")
        loading.load("tiny")
        loading.loading_since -= 6
        bench.pool._end_overdue_loads()
        assert bench.pool.models["tiny"].reason is None
        serving.die()
        assert bench.pool.models["tiny"].state == "failed"


@pytest.mark.parametrize(
    ("end", "state"),
    [
        (lambda worker: worker.serve("tiny"), "ready"),
        (lambda worker: worker.loaded("tiny", "its folder is gone"), "loading"),  # a reload that failed
    ],
)
@on_loop
async def test_a_load_in_between_absolves_it(end: Callable[[FakeWorker], None], state: str, waits: list[float]) -> None:
    async with Bench() as bench:
        fresh = bench.worker
        for _ in range(3):
            fresh = await crash_loading(bench, "tiny", fresh)
            fresh.load("tiny")
            fresh.load(None)
            end(fresh)
        fresh.die(-signal.SIGSEGV)  # not while it loads
        assert bench.pool.models["tiny"].state == state


@on_loop
async def test_two_models_that_cost_a_worker_each_are_both_loaded_again(waits: list[float]) -> None:
    async with Bench("first", "second") as bench:
        fresh = await crash_loading(bench, "first", bench.worker)
        fresh = await crash_loading(bench, "second", fresh)
        fresh.serve("first", "second")
        assert [model.state for model in bench.pool.models.values()] == ["ready", "ready"]


@pytest.mark.parametrize("served_before", [False, True])
@on_loop
async def test_on_a_busy_server_it_is_the_model_that_is_blamed(served_before: bool) -> None:
    """Which loads behind the one that serves; nothing else runs when it is tried again."""
    async with Bench("tiny", "deadly") as bench:
        bench.worker.serve("tiny", *["deadly"] * served_before)
        task = await bench.ask()
        bench.worker.load("deadly")
        bench.worker.die(-signal.SIGSEGV)
        again = await bench.started()
        again.serve("tiny")
        await settle()
        assert again.ids == [], "not before it is known what crashed"
        again.load("deadly")
        again.die(-signal.SIGSEGV)
        fresh = await bench.started()
        fresh.serve("tiny")
        await settle()
        assert bench.pool.models["deadly"].state == "failed"
        assert fresh.serves
        fresh.finish(1)
        await task


@on_loop
async def test_a_picture_that_crashes_a_worker_which_loads_costs_no_model(waits: list[float]) -> None:
    async with Bench("tiny", "other") as bench:
        worker = bench.worker
        worker.serve("tiny")
        task = await bench.ask()
        worker.load("other")
        worker.die(-signal.SIGSEGV)  # by the picture
        worker = await bench.started()
        worker.serve("tiny", "other")
        await settle()
        assert worker.ids == [1], "it was tried again when everything was loaded"
        worker.die(-signal.SIGSEGV)
        with pytest.raises(WorkerLost):
            await task
        worker = await bench.started()
        worker.serve("tiny", "other")
        task = await bench.ask()
        worker.die(-signal.SIGSEGV)
        (await bench.started()).serve("tiny", "other")
        with pytest.raises(PictureQuarantined):
            await task
        assert bench.pool.models["other"].state == "ready"


@on_loop
async def test_a_picture_that_crashed_a_worker_alone_is_alone_again_when_it_is_tried_again() -> None:
    async with Bench("tiny", "other") as bench:
        bench.worker.serve("tiny", "other")
        task = await bench.ask()
        bench.worker.die(-signal.SIGSEGV)
        fresh = await bench.started()
        fresh.serve("tiny")
        innocent = await bench.ask()
        assert fresh.ids == [2], "models are still being loaded"
        fresh.finish(2)
        await innocent
        fresh.tell(ModelInfo("other", "ready"))
        await settle()
        assert fresh.ids == [2, 1]
        fresh.die(-signal.SIGSEGV)
        with pytest.raises(PictureQuarantined):
            await task


@on_loop
async def test_a_worker_serves_when_the_last_model_that_it_loads_is_unloaded() -> None:
    async with Bench("tiny", "other") as bench:
        bench.worker.serve("tiny")
        assert not bench.worker.serves
        unload = asyncio.create_task(bench.pool.unload("other"))
        await settle()
        bench.worker.tell(ModelInfo("other", "ready"))
        bench.worker.loaded("other")
        await unload
        assert bench.worker.serves


@pytest.mark.parametrize("begun", [False, True])
@on_loop
async def test_a_stop_does_not_wait_for_a_model_that_takes_for_ever_to_load(begun: bool, tmp_path: Path) -> None:
    listener, began = Listening(), tmp_path / "began"
    write_tiny(tmp_path / "models" / "tiny")
    async with pool_of(tmp_path / "models", listener) as pool:
        await listener.serving(pool)
        write_tiny(tmp_path / "models" / "stuck")
        code = f"import time\n\n\ndef build():\n    open({str(began)!r}, 'w').close()\n    time.sleep(1000)\n"
        (tmp_path / "models" / "stuck" / "net.py").write_text(code)
        load = asyncio.create_task(pool.load("stuck"))
        while not (await asyncio.to_thread(began.exists) if begun else pool._capture):
            await settle()
    assert (await load) is not None


@pytest.mark.parametrize(
    ("reason", "died", "tries"),
    [(None, False, 1), ("it was not loaded within 5 seconds", False, 1), ("it was killed", True, MAX_CAPTURES)],
)
@on_loop
async def test_only_a_capture_that_dies_is_tried_again(reason: str | None, died: bool, tries: int) -> None:
    async with Bench() as bench:
        bench.capture.return_value.run.return_value, bench.capture.return_value.died = reason, died
        assert await bench.pool._captured(Entry("tiny", Path("tiny")), "cpu") == reason
        assert bench.capture.call_count == tries


@pytest.mark.parametrize("deaths", [1, 1000])
@on_loop
async def test_a_capture_that_dies_is_tried_once_more(deaths: int, tmp_path: Path) -> None:
    """Somebody outside may have killed the first, and not the second too."""
    listener, tries = Listening(), tmp_path / "tries"
    write_tiny(tmp_path / "models" / "tiny")
    async with pool_of(tmp_path / "models", listener) as pool:
        worker = await listener.serving(pool)
        write_tiny(tmp_path / "models" / "shaky")
        builder = f"""
import os, signal


def build():
    with open({str(tries)!r}, "a") as file:
        file.write("x")
    if os.path.getsize({str(tries)!r}) <= {deaths}:
        os.kill(os.getpid(), signal.SIGKILL)
    return made()
"""
        (tmp_path / "models" / "shaky" / "net.py").write_text(TINY_CODE.replace("def build", "def made") + builder)
        reason = await pool.load("shaky")
        assert pool.workers == [worker], "it did not die with it"
        if deaths == 1:
            assert (reason, pool.models["shaky"].state) == (None, "ready")
        else:
            assert tries.read_text() == "x" * MAX_CAPTURES == "xx"
            assert "signal 9" in (reason or "")
            assert pool.models["shaky"].state == "failed"


@on_loop
async def test_without_a_temporary_folder_workers_come_and_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    async with Bench() as bench:
        bench.worker.die()
        fresh = await bench.started()
        fresh.serve("tiny")
        assert fresh.serves
        assert fresh.folder is None
        bench.pool._clear_away()
        bench.pool.kill()


@on_loop
async def test_what_is_written_for_a_dead_worker_is_removed_again() -> None:
    async with Bench() as bench:
        folder = bench.worker.folder
        assert folder
        bench.worker.die()
        await bench.started()
        for _ in range(2):
            (folder / "inductor").mkdir(parents=True)
            bench.pool._clear_away()
            while await asyncio.to_thread(folder.exists):
                await settle()
