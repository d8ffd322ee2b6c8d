"""How the accepted requests ended: accepted = answered + failed + cancelled + timed out + those under way."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from service.errors import DeadlineExceeded


@dataclass
class Counts:
    """Requests since the start."""

    accepted: int = 0
    answered: int = 0
    failed: int = 0
    cancelled: int = 0
    timed_out: int = 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count one accepted request by the way in which the block is left."""
        self.accepted += 1
        try:
            yield
        except (TimeoutError, DeadlineExceeded):
            self.timed_out += 1
            raise
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        except BaseException:
            self.failed += 1
            raise
        self.answered += 1
