"""How long a request's stages took, although they overlap."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from service.workers.messages import Timings

Span = tuple[float, float]


@dataclass
class Stages:
    """When each stage worked for a request: spans of `time.perf_counter`."""

    decode: list[Span] = field(default_factory=list)
    compute: list[Span] = field(default_factory=list)
    render: list[Span] = field(default_factory=list)

    def timings(self, total: float) -> Timings:
        """Parts that add up to `total` seconds: a moment counts for one stage, first of all for compute, and as queue
        where none worked."""
        compute = covered(self.compute)
        decode = covered([*self.compute, *self.decode]) - compute
        busy = covered([*self.compute, *self.decode, *self.render])
        return Timings(queue=max(0.0, total - busy), decode=decode, compute=compute, render=busy - decode - compute)


def covered(spans: Iterable[Span]) -> float:
    """The seconds that lie in at least one span."""
    seconds, reached = 0.0, -math.inf
    for start, end in sorted(spans):
        seconds += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return seconds
