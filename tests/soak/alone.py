"""Each attack alone on a fresh server: the probes, the server's memory and a quick client meanwhile."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from benchmarks.table import Table, percentile, rounded
from tests.conftest import write_tiny
from tests.server import Server, running
from tests.soak.attacks import Report, Target, attacking
from tests.soak.cases import TINY, Case, tiny_cases
from tests.soak.traffic import connected, send
from tests.soak.watch import memory_of, probing

PAUSE_S, SAMPLE_S = 0.2, 0.1
HEAD = ["attack", "bursts", "`/livez` ms: p50", "p99", "largest", "unanswered"]
HEAD += ["memory of the server, MiB more", "quick client, s: median", "largest", "not 200", "not survived"]


@dataclass
class Measured:
    """What was seen under one attack: seconds, MiB and statuses (0: no answer)."""

    report: Report = field(default_factory=Report)
    probes: list[float] = field(default_factory=list)
    unanswered: int = 0
    memory: list[float] = field(default_factory=list)
    quick: list[float] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)

    def row(self, name: str) -> list[str]:
        """A row of the table."""
        refused = [status for status in self.statuses if status != 200]
        cells = [
            str(sum(self.report.bursts.values())),
            *(rounded(1000 * seconds) for seconds in _spread(self.probes)),
            str(self.unanswered),
            rounded(max(self.memory) - self.memory[0]),
            *(rounded(seconds) for seconds in _spread(self.quick)[::2]),
            str(len(refused)),
            "; ".join(sorted({failure[:100] for failure in self.report.failures})[:2]) or "0",
        ]
        return [name, *cells]


def _spread(seconds: Sequence[float]) -> tuple[float, float, float]:
    """Median, p99 and largest."""
    return statistics.median(seconds), percentile(seconds, 99), max(seconds)


def measure_attack(name: str, folder: Path, seconds: float) -> Measured:
    """One attack for so long on a server of the tiny model, with its defaults, in `folder`."""
    write_tiny(folder / "models" / TINY)
    with running(folder, "--models", str(folder / "models")) as server:
        return asyncio.run(_measure(server, name, seconds))


async def _measure(server: Server, name: str, seconds: float) -> Measured:
    found, case = Measured(), tiny_cases()[0]
    async with connected(server.url) as http:
        for _ in range(3):  # the server is warm
            await send(http, case)
    until = time.monotonic() + seconds
    found.memory.append(memory_of(server).server)
    with probing(server.url) as probes, attacking(Target(server.url), [name], PAUSE_S) as found.report:
        await asyncio.gather(_ask(server.url, case, until, found), _sample(server, until, found))
    livez = [probe for probe in probes if probe.path == "/livez"]
    found.probes = [probe.seconds for probe in livez]
    found.unanswered = sum(probe.status != 200 for probe in livez)
    return found


async def _ask(url: str, case: Case, until: float, found: Measured) -> None:
    """A quick client, each of whose requests has a connection of its own."""
    while time.monotonic() < until:
        began, status = time.monotonic(), 0
        async with connected(url) as http:
            with suppress(httpx.HTTPError):
                status = (await send(http, case)).status
        found.quick.append(time.monotonic() - began)
        found.statuses.append(status)
        await asyncio.sleep(SAMPLE_S)


async def _sample(server: Server, until: float, found: Measured) -> None:
    while time.monotonic() < until:
        found.memory.append((await asyncio.to_thread(memory_of, server)).server)
        await asyncio.sleep(SAMPLE_S)


def table(rows: Sequence[list[str]]) -> Table:
    return Table("Attacks, each alone", HEAD, list(rows))
