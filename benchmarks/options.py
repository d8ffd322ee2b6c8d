"""What a run of the benchmarks is told."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.networks import Network, Workplace


@dataclass(frozen=True)
class Options:
    """`seconds` is what each variant gets per round in the engine's sections, `service_seconds` in the service's.

    `cache` is a folder in which compiled packages are kept from run to run.
    """

    networks: tuple[Network, ...]
    device: str
    rounds: int
    seconds: float
    service_seconds: float
    workplace: Workplace
    cache: Path
    png_level: int

    def say(self, line: str) -> None:
        """Progress, apart from the tables."""
        print(line, file=sys.stderr, flush=True)
