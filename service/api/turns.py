"""Connections that have more to parse take turns: the event loop serves everybody else between two of them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable


class Turns:
    """A queue of callbacks of which one runs in each round of the event loop."""

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], None]] = deque()

    def wait(self, callback: Callable[[], None]) -> None:
        """Call it when its turn has come."""
        self._waiting.append(callback)
        if len(self._waiting) == 1:
            asyncio.get_running_loop().call_soon(self._next)

    def _next(self) -> None:
        if len(self._waiting) > 1:
            asyncio.get_running_loop().call_soon(self._next)
        self._waiting.popleft()()
