"""Whose turn it is among quick and dear work: which passes which, and that nothing waits for ever."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest

from service.workers.priced import DEAR_S, LONGEST_S, PricedExecutor

WAIT_S = 30.0


class Bench:
    """Two threads, of which both are held until they are let go."""

    def __init__(self) -> None:
        self.executor = PricedExecutor(2, "test")
        self.order: list[str] = []
        self.release = threading.Event()
        self.begun = threading.Semaphore(0)

    def note(self, name: str) -> None:
        self.order.append(name)

    def hold(self) -> None:
        self.begun.release()
        assert self.release.wait(WAIT_S)

    def occupy(self, seconds: float) -> None:
        """Let a thread work until it is released."""
        self.executor.submit(seconds, self.hold)
        assert self.begun.acquire(timeout=WAIT_S)


@pytest.fixture
def bench() -> Iterator[Bench]:
    one = Bench()
    yield one
    one.release.set()
    one.executor.close()


def test_quick_work_passes_dear_work_that_waits(bench: Bench) -> None:
    bench.occupy(2 * DEAR_S)
    bench.occupy(0)
    for name, seconds in (("dearest", 3.0), ("dear", 2 * DEAR_S - 0.1), ("first", 0.0), ("second", 0.0)):
        bench.executor.submit(seconds, partial(bench.note, name))
    bench.release.set()
    bench.executor.close()
    assert bench.order.index("first") < bench.order.index("second") < len(bench.order)
    assert bench.order.index("dear") < bench.order.index("dearest")


def test_one_thread_is_left_to_quick_work(bench: Bench) -> None:
    bench.occupy(2 * DEAR_S)
    done = threading.Event()
    bench.executor.submit(2 * DEAR_S, bench.hold)  # would take the other thread
    bench.executor.submit(0, done.set)
    assert done.wait(WAIT_S)
    assert not bench.begun.acquire(blocking=False)
    bench.release.set()
    assert bench.begun.acquire(timeout=WAIT_S), "it begins when the other one has ended"


def test_dear_work_is_not_passed_for_ever(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.occupy(0)
    bench.occupy(0)
    bench.executor.submit(4.0, partial(bench.note, "dear"))
    later = time.monotonic() + LONGEST_S + 1
    monkeypatch.setattr(time, "monotonic", lambda: later)
    bench.executor.submit(0, partial(bench.note, "quick"))
    assert bench.executor._take() is not None  # what the next free thread would take
    assert [line[2].args for line in bench.executor._quick] == [("quick",)]  # type: ignore[attr-defined]


def test_it_ends_when_everything_is_done() -> None:
    executor = PricedExecutor(2, "test")
    done: list[int] = []
    for number in range(20):
        executor.submit(number % 2, partial(done.append, number))
    executor.close()
    assert sorted(done) == list(range(20))
