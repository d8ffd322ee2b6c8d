"""What other processes take of the machine meanwhile: on two cores one busy stranger doubles every time."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

import psutil

from benchmarks.table import Spread, Table, Target

QUIET = 0.1
"""Cores that others may take, in the median, in figures that are to be believed."""


@contextmanager
def watched(shares: list[float]) -> Iterator[None]:
    """Append the cores that processes other than this one and its children kept busy inside the block."""
    started, before = time.perf_counter(), _others()
    yield
    shares.append(max(0.0, (_others() - before) / (time.perf_counter() - started)))


def quiet(shares: Sequence[float]) -> bool:
    return Spread.of(shares).median <= QUIET


def judged(targets: Iterable[Target], shares: Sequence[float]) -> list[Target]:
    """The targets, marked where the rounds that they come from were disturbed."""
    return [replace(target, quiet=quiet(shares)) for target in targets]


def table(title: str, shares: Sequence[float]) -> Table:
    """Says whether the rounds were quiet."""
    verdict = "quiet" if quiet(shares) else "**not quiet: these figures prove nothing**"
    return Table(f"{title}: other processes meanwhile", ["cores taken", ""], [[str(Spread.of(shares)), verdict]])


def _others() -> float:
    """Seconds of all cores that went to others since the start of the machine."""
    machine = psutil.cpu_times()
    own = psutil.Process()
    busy = sum(getattr(machine, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq"))
    return busy - sum(map(_taken, [own, *own.children(recursive=True)]))


def _taken(process: psutil.Process) -> float:
    with suppress(psutil.Error):  # it may just have gone
        times = process.cpu_times()
        return float(times.user + times.system + times.children_user + times.children_system)
    return 0.0
