"""How often one client may ask for work: so many requests per second and key, or address where there are no keys."""

from __future__ import annotations

import time
from collections import OrderedDict

from fastapi import Request

from service.errors import RateLimited

BURST_S = 2.0
ROUNDING_S = 1e-6
MAX_CLIENTS = 10_000


class Rate:
    """Token buckets: a full one holds the requests of two seconds, at least one. A rate of 0 limits nothing."""

    def __init__(self, per_second: float) -> None:
        self._per_second = per_second
        self._full_at: OrderedDict[str, float] = OrderedDict()  # when each client's bucket is full again

    async def check(self, request: Request) -> None:
        """The FastAPI dependency, for behind the check of the key. Raises RateLimited."""
        if not self._per_second:
            return
        key = getattr(request.state, "key_name", None)
        who = f"key {key!r}" if key else f"address {request.client.host if request.client else 'unknown'}"
        wait = self.take(who, time.monotonic())
        if wait > 0:
            detail = f"The {who} may send {self._per_second:g} requests per second; the next one in {wait:.1f} s."
            raise RateLimited(detail, retry_after=wait)

    def take(self, who: str, now: float) -> float:
        """Take a token and return 0; or take none, and return in how many seconds there is one."""
        interval = 1 / self._per_second
        before = max(now, self._full_at.pop(who, now))
        wait = before + interval - now - max(interval, BURST_S)
        wait = wait if wait > ROUNDING_S else 0.0
        self._full_at[who] = before if wait else before + interval
        if len(self._full_at) > MAX_CLIENTS:
            self._full_at.popitem(last=False)  # who asked the longest ago: this bucket is full, or nearly so
        return wait
