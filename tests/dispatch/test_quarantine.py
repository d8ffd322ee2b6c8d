"""Which exits of a worker count against the pictures that it had, and for how long."""

from __future__ import annotations

import signal
import time
import tracemalloc

import pytest

from service.dispatch.quarantine import Quarantine
from service.errors import PictureQuarantined, ServiceError, WorkerLost
from service.workers.messages import ExplainRequest
from tests.dispatch.support import Bench, on_loop, settle


def showing(*pictures: bytes | str) -> ExplainRequest:
    return ExplainRequest("tiny", pictures, ((),) * len(pictures))


def is_kept(quarantine: Quarantine, request: ExplainRequest) -> bool:
    try:
        quarantine.check(request)
    except PictureQuarantined:
        return True
    return False


def test_two_crashes_are_one_too_many() -> None:
    quarantine = Quarantine()
    quarantine.blame(showing(b"one"))
    assert not is_kept(quarantine, showing(b"one"))
    quarantine.blame(showing(b"one"))
    assert is_kept(quarantine, showing(b"one"))
    assert not is_kept(quarantine, showing(b"other"))


def test_a_known_picture_is_named_among_others() -> None:
    quarantine = Quarantine()
    for _ in range(2):
        quarantine.blame(showing("b25l"))
    with pytest.raises(PictureQuarantined) as refused:
        quarantine.check(showing(b"harmless", "b25l"))
    assert [place.pointer for place in refused.value.errors] == ["/images/1"]


def test_of_several_pictures_none_is_held_guilty_alone() -> None:
    quarantine = Quarantine()
    for _ in range(2):
        quarantine.blame(showing(b"one", b"two"))
    with pytest.raises(PictureQuarantined) as refused:
        quarantine.check(showing(b"one", b"two"))
    assert [place.pointer for place in refused.value.errors] == ["/images"]
    assert not is_kept(quarantine, showing(b"one"))
    assert not is_kept(quarantine, showing(b"two", b"one"))
    assert not is_kept(quarantine, showing(b"onetwo"))


class Seen(str):
    """A picture that tells how often it was read whole."""

    times = 0

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        self.times += 1
        return super().encode(encoding, errors)


@pytest.mark.parametrize(
    ("crashes", "others", "shown", "times"),
    [
        (1, (), "as long", 0),
        (2, (), "longer than it", 0),
        (2, (), "as much", 1),
        (2, ("other",), "as long", 0),
    ],
)
def test_a_picture_is_read_only_where_one_as_long_is_kept_and_once(
    crashes: int, others: tuple[str, ...], shown: str, times: int
) -> None:
    quarantine = Quarantine()
    for _ in range(crashes):
        quarantine.blame(showing("as long", *others))
    picture = Seen(shown)
    assert not is_kept(quarantine, showing(picture))
    assert picture.times == times


def test_no_picture_is_copied() -> None:
    quarantine, picture = Quarantine(), bytes(2**24)
    tracemalloc.start()
    try:
        for _ in range(2):
            quarantine.blame(showing(picture))
        assert is_kept(quarantine, showing(picture))
        assert tracemalloc.get_traced_memory()[1] < len(picture) / 10
    finally:
        tracemalloc.stop()


def test_it_is_forgotten_ten_minutes_after_the_last_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    quarantine, seconds = Quarantine(), 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: seconds)
    quarantine.blame(showing(b"one"))
    seconds = 1500.0
    quarantine.blame(showing(b"one"))
    seconds = 1500.0 + 599
    with pytest.raises(PictureQuarantined, match="try again in ten minutes"):
        quarantine.check(showing(b"one"))
    seconds = 1500.0 + 601
    assert not is_kept(quarantine, showing(b"one"))
    quarantine.blame(showing(b"one"))
    assert not is_kept(quarantine, showing(b"one")), "it starts anew"


@pytest.mark.parametrize(
    "exit_code", [-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT, -signal.SIGILL, -signal.SIGFPE]
)
@on_loop
async def test_a_signal_that_a_worker_brings_upon_itself_counts(exit_code: int) -> None:
    assert isinstance(await refusal_after(exit_code), PictureQuarantined)


@pytest.mark.parametrize("exit_code", [-signal.SIGKILL, -signal.SIGTERM, 0, 1, 70, 255, signal.SIGSEGV])
@on_loop
async def test_no_other_exit_counts(exit_code: int) -> None:
    assert isinstance(await refusal_after(exit_code), WorkerLost)


async def refusal_after(exit_code: int) -> ServiceError:
    """What a request is refused with when two workers ended under it in this way."""
    async with Bench() as bench:
        bench.worker.serve("tiny")
        task = await bench.ask()
        bench.worker.die(exit_code)
        fresh = await bench.started()
        fresh.serve("tiny")
        await settle()
        fresh.die(exit_code)
        with pytest.raises(ServiceError) as refused:
            await task
    return refused.value


@on_loop
async def test_what_crashed_in_company_and_then_alone_is_no_proof() -> None:
    async with Bench() as bench:
        bench.worker.serve("tiny", capacity=2)
        tasks = [await bench.ask() for _ in range(2)]
        bench.worker.die(-signal.SIGSEGV)
        for _ in tasks:
            fresh = await bench.started()
            fresh.serve("tiny", capacity=2)
            await settle()
            fresh.die(-signal.SIGSEGV)
        first, second = tasks
        with pytest.raises(WorkerLost):
            await first
        with pytest.raises(PictureQuarantined):  # the same bytes, which by now have crashed two workers alone
            await second


@pytest.mark.parametrize(
    ("stalled_s", "silent_s", "loading", "error"),
    [
        (3.0, 0.0, None, PictureQuarantined),
        (3.0, 0.0, "tiny", PictureQuarantined),
        (0.0, 3.0, None, PictureQuarantined),
        (0.0, 3.0, "tiny", WorkerLost),
    ],
)
@on_loop
async def test_a_picture_that_hangs_two_workers_alone_is_quarantined(
    stalled_s: float, silent_s: float, loading: str | None, error: type[ServiceError]
) -> None:
    """Where a worker was silent while it loaded a model, that may have been the reason."""
    async with Bench(hang_s=2) as bench:
        bench.worker.serve("tiny")
        task, worker = await bench.ask(), bench.worker
        for _ in range(2):
            worker.load(loading)
            worker.beat(stalled_s)
            worker.heard -= silent_s
            bench.pool._end_hanging()
            worker.die(-signal.SIGKILL)
            worker = await bench.started()
            worker.serve("tiny")
            await settle()
        with pytest.raises(error):
            await task


@on_loop
async def test_what_is_quarantined_reaches_no_worker() -> None:
    async with Bench() as bench:
        bench.worker.serve("tiny")
        for _ in range(2):
            bench.dispatcher._quarantine.blame(showing(b""))
        task = await bench.ask()
        assert bench.worker.ids == []
        with pytest.raises(PictureQuarantined):
            await task


@on_loop
async def test_a_hang_in_company_blames_nobody() -> None:
    async with Bench(hang_s=2) as bench:
        bench.worker.serve("tiny", capacity=2)
        tasks = [await bench.ask() for _ in range(2)]
        bench.worker.beat(3.0)
        bench.pool._end_hanging()
        bench.worker.die(-signal.SIGKILL)
        fresh = await bench.started()
        fresh.serve("tiny", capacity=2)
        for task, job_id in zip(tasks, (1, 2), strict=True):
            await settle()
            fresh.finish(job_id)
            await task
        assert not is_kept(bench.dispatcher._quarantine, showing(b""))
