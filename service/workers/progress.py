"""How long the threads of a worker have been at one step: a step without an end is a worker that hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Progress:
    """Since when (`time.monotonic`) each thread that works has been at its present step."""

    def __init__(self) -> None:
        self._since: dict[int, float] = {}

    @contextmanager
    def working(self) -> Iterator[None]:
        """The calling thread works inside. Not to be nested."""
        self.step()
        try:
            yield
        finally:
            del self._since[threading.get_ident()]

    def step(self) -> None:
        """The calling thread, which works, begins its next step."""
        self._since[threading.get_ident()] = time.monotonic()

    def stalled_s(self) -> float:
        """Seconds that the longest of the present steps has taken; 0 where nobody works."""
        now = time.monotonic()
        return now - min(tuple(self._since.values()), default=now)
