"""Threads that a test starts: they end with its block, also when the test fails."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


@contextlib.contextmanager
def repeating(work: Callable[[], T], threads: int = 1) -> Iterator[list[T]]:
    """Call `work` again and again in threads until the block ends; the list gets what it returns.

    Raises what `work` raised, unless the block itself failed.
    """
    results: list[T] = []
    stop = threading.Event()

    def repeat() -> None:
        while not stop.is_set():
            results.append(work())

    with ThreadPoolExecutor(threads) as pool:
        running = [pool.submit(repeat) for _ in range(threads)]
        try:
            yield results
        finally:
            stop.set()
        for one in running:
            one.result()
