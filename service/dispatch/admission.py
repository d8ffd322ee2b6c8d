"""Who is let in: the bounds of the queue in requests, pictures and bytes, and what can be done in its time."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from service.errors import BodyTooLarge, DeadlineTooShort, QueueFull, TooManyPictures
from service.settings import Settings
from service.workers.messages import BATCH_DELAY_S, Answer, Job
from service.workers.pool import Pool
from service.workers.worker import Worker

LEAST_RETRY_S = 1.0


@dataclass(eq=False)
class Ticket:
    """An accepted request: its job, its answer slot, and where it is."""

    job: Job
    size_bytes: int
    answer: asyncio.Future[Answer]
    accepted: float
    started: float | None = None
    worker: Worker | None = None
    losses: int = 0
    suspect: bool = False
    """A worker crashed or hung that did nothing else."""
    cost: float = 0.0
    """Seconds of device work, as far as they can be told beforehand."""

    @property
    def pictures(self) -> int:
        return len(self.job.request.pictures)

    @property
    def turn(self) -> float:
        """The waiting request with the least has the next turn.

        One that takes long and lost its worker holds up everybody when it is tried again, for it is alone then.
        """
        may_wait = self.job.request.priority == "batch" or (self.losses > 0 and self.job.passable)
        return self.accepted + (BATCH_DELAY_S if may_wait else 0.0)

    def left(self, now: float) -> float:
        """Seconds of device work that are left, if the device has worked for it since it was handed over."""
        return self.cost if self.started is None else max(0.0, self.cost - (now - self.started))


Size = Callable[[Ticket], int]


class Admission:
    """Looks at what is accepted and unanswered, in the order of its arrival, and changes nothing.

    Requests that others may pass get half of the queue, so that a flood of them refuses nobody else.
    """

    def __init__(self, settings: Settings, pool: Pool, tickets: Mapping[int, Ticket]) -> None:
        self._settings = settings
        self._pool = pool
        self._tickets = tickets

    def check_room(self, pictures: int, size_bytes: int, passable: bool) -> None:
        """Raise QueueFull where there is no room now, TooManyPictures or BodyTooLarge where there never is."""
        settings = self._settings
        if pictures > settings.max_queue_pictures:
            raise TooManyPictures(_never("pictures", pictures, settings.max_queue_pictures))
        if size_bytes > settings.max_queue_bytes:
            raise BodyTooLarge(_never("bytes", size_bytes, settings.max_queue_bytes))
        self._check_unit("requests", 1, lambda _ticket: 1, settings.max_queue, passable)
        self._check_unit("pictures", pictures, lambda ticket: ticket.pictures, settings.max_queue_pictures, passable)
        self._check_unit("bytes", size_bytes, lambda ticket: ticket.size_bytes, settings.max_queue_bytes, passable)

    def check_time(self, cost: float, timeout_s: float, passable: bool) -> None:
        """Refuse at once what takes `cost` seconds of device work and cannot be answered in its time.

        Raises DeadlineTooShort where it takes longer than that alone, QueueFull where too much is before it.
        """
        if cost > timeout_s:
            raise DeadlineTooShort(
                f"The request takes about {_seconds(cost)} of the device's time and has {_seconds(timeout_s)}; "
                "give it a longer timeout_s, or ask for less."
            )
        wait = self._wait(ticket for ticket in self._tickets.values() if passable or not ticket.job.passable)
        if wait + cost > timeout_s:
            raise QueueFull(
                f"What waits before it takes about {_seconds(wait)} and the request itself {_seconds(cost)}; "
                f"it has {_seconds(timeout_s)}.",
                retry_after=wait + cost - timeout_s,
            )

    def _check_unit(self, unit: str, more: int, size: Size, limit: int, passable: bool) -> None:
        tickets = tuple(self._tickets.values())
        self._check_held(unit, more, size, limit, tickets)
        if passable:
            long = tuple(ticket for ticket in tickets if ticket.job.passable)
            self._check_held(f"{unit} that may wait", more, size, max(more, limit // 2), long)

    def _check_held(self, unit: str, more: int, size: Size, limit: int, tickets: tuple[Ticket, ...]) -> None:
        held = sum(map(size, tickets))
        if held + more <= limit:
            return
        freed = itertools.accumulate(map(size, tickets))
        needed = next(count for count, room in enumerate(freed, 1) if held - room + more <= limit)
        detail = f"The queue holds {held} {unit} of at most {limit}, and this request brings {more} more."
        raise QueueFull(detail, retry_after=max(LEAST_RETRY_S, self._wait(tickets[:needed])))

    def _wait(self, tickets: Iterable[Ticket]) -> float:
        """Seconds until the devices have done all this."""
        now = time.monotonic()
        slots = sum(worker.slots for worker in self._pool.workers)
        return sum(ticket.left(now) for ticket in tickets) / max(1, slots)


def _seconds(value: float) -> str:
    """Two digits, or whole seconds."""
    return f"{value:.2g} s" if value < 10 else f"{value:.0f} s"


def _never(unit: str, more: int, limit: int) -> str:
    return f"The request brings {more} {unit}; the queue never holds more than {limit}."
