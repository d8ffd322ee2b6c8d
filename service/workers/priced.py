"""Threads for work of which it is known roughly how long it takes: quick work passes what takes long."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

DEAR_S = 0.25
"""Work that takes longer is dear."""
PATIENCE, LONGEST_S = 10.0, 5.0
"""Work of one second has its turn as if it had come PATIENCE seconds later, but never more than LONGEST_S."""

Work = Callable[[], None]


class PricedExecutor:
    """Runs work in the order of its turns. At least one thread is left to quick work, whatever dear work waits."""

    def __init__(self, threads: int, name: str) -> None:
        """`threads`: at least two."""
        self._most_dear = threads - 1
        self._running_dear = 0
        self._quick: list[tuple[float, int, Work]] = []
        self._dear: list[tuple[float, int, Work]] = []
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._executor = ThreadPoolExecutor(threads, name)

    def submit(self, seconds: float, work: Work) -> None:
        """Have `work`, which takes about so many seconds and raises nothing, done by one of the threads."""
        line = self._dear if seconds > DEAR_S else self._quick
        with self._lock:
            heapq.heappush(line, (time.monotonic() + min(PATIENCE * seconds, LONGEST_S), next(self._numbers), work))
        self._executor.submit(self._work)

    def close(self) -> None:
        """Finish what waits, and leave no thread."""
        self._executor.shutdown()

    def _work(self) -> None:
        """Work until nothing waits that may run now: dear work that could not begin waits for the end of other."""
        while taken := self._take():
            work, dear = taken
            try:
                work()
            finally:
                with self._lock:
                    self._running_dear -= dear

    def _take(self) -> tuple[Work, bool] | None:
        with self._lock:
            lines = [line for line in (self._quick, self._may_begin()) if line]
            if not lines:
                return None
            line = min(lines)
            dear = line is self._dear
            self._running_dear += dear
            return heapq.heappop(line)[2], dear

    def _may_begin(self) -> list[tuple[float, int, Work]]:
        """The dear work, if another of it may run."""
        return self._dear if self._running_dear < self._most_dear else []
