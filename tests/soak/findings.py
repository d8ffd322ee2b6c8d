"""What a soak states: figures, and the bounds that they must keep."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks import others
from benchmarks.table import Table, percentile, rounded
from tests.soak.attacks import Report
from tests.soak.traffic import Ledger, Outcome
from tests.soak.watch import Memory, Probe, Slope, per_interval

SETTLED_S = 60.0
"""From when on memory must stay: pools, caches and arenas have filled by then."""
LINGER_S = 1.0
"""So long after a kill an answer of the dead worker may still be on its way."""
MIN_POINTS = 6
SLOPE_MIB = 0.5
MAX_RECOVERY_S, MAX_PROBE_S, MIN_SHARE = 5.0, 0.050, 0.5
LEDGER = ("answered", "failed", "cancelled", "timed_out")


@dataclass(frozen=True)
class Bound:
    """`kept` is None where nothing is judged."""

    what: str
    bound: str
    measured: str
    kept: bool | None

    def row(self) -> list[str]:
        return [self.what, self.bound, self.measured, {True: "yes", False: "**no**", None: "not judged"}[self.kept]]


@dataclass
class Findings:
    """Everything that was seen. Moments are on `time.monotonic`'s clock."""

    started: float
    ended: float = 0.0
    ledger: Ledger = field(default_factory=Ledger)
    attacks: Report = field(default_factory=Report)
    kills: list[float] = field(default_factory=list)
    probes: list[Probe] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)
    reloads: Counter[int] = field(default_factory=Counter)
    descriptors: tuple[int, int] = (0, 0)
    counters: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(("accepted", *LEDGER), 0.0))
    exit_status: int | None = None
    children_left: int = 0
    folders_left: list[str] = field(default_factory=list)
    others: float = 0.0

    def recoveries(self) -> list[float]:
        """The seconds from each kill to the first 200 of a fresh worker; infinite where none came until the next."""
        return [self._recovery(kill, end) for kill, end in self._intervals()]

    def _recovery(self, kill: float, end: float) -> float:
        """An answer to a request that was sent before the kill counts where it can't be the dead worker's."""

        def fresh(one: Outcome) -> bool:
            return one.status == 200 and (one.sent > kill or one.received > kill + LINGER_S)

        moments = (one.received for one in self.ledger.outcomes if fresh(one) and kill < one.received < end)
        return min(moments, default=math.inf) - kill

    def readiness(self) -> list[float]:
        """The seconds from each kill until `/readyz` says 200 again; 0 where it never said anything else."""
        ready = [probe for probe in self.probes if probe.path == "/readyz"]
        return [_ready_again([one for one in ready if kill < one.at < end], kill) for kill, end in self._intervals()]

    def _intervals(self) -> list[tuple[float, float]]:
        return list(zip(self.kills, [*self.kills[1:], self.ended], strict=True))

    def share(self) -> float:
        """Of the valid requests whose client stayed: how many were answered with 200."""
        valid = self.ledger.of("valid")
        asked = len(valid) + len(self.ledger.lost)
        return sum(one.status == 200 for one in valid) / asked if asked else 0.0

    def settled(self) -> list[Memory]:
        return per_interval(self.memory, self.kills, self.started + SETTLED_S)


def _ready_again(probes: Sequence[Probe], kill: float) -> float:
    lapses = [probe.at for probe in probes if probe.status != 200]
    if not lapses:
        return 0.0
    return min((probe.at for probe in probes if probe.at > lapses[-1]), default=math.inf) - kill


def bounds(found: Findings, slack: float = 1.0) -> list[Bound]:
    """What must hold. `slack`: how many times as long everything may take."""
    ledger = found.ledger
    return [
        _none("lost: no answer although the client stayed", ledger.lost),
        _none("answers that differ from the oracle's", ledger.differing),
        _none("answers with a status or code that is wrong", ledger.wrong),
        _none("attacks answered by anything but a problem or a closed connection", found.attacks.failures),
        _none("reloads that were refused", [str(status) for status in found.reloads if status >= 400]),
        Bound(
            "valid requests answered with 200",
            f">= {MIN_SHARE:.0%}",
            f"{found.share():.1%}",
            found.share() >= MIN_SHARE,
        ),
        *_timings(found, slack),
        _none("polls of the probes without an answer", [probe.path for probe in found.probes if not probe.status]),
        _none(
            "`/livez` that said anything but 200",
            [str(probe.status) for probe in found.probes if probe.path == "/livez" and probe.status != 200],
        ),
        *_memory(found),
        Bound("file descriptors of the server", "none more", *_grown(*found.descriptors)),
        _counters(found.counters),
        Bound("exit status after SIGTERM", "0", str(found.exit_status), found.exit_status == 0),
        _none("children left after SIGTERM", ["a process"] * found.children_left),
        _none("temporary folders left", found.folders_left),
    ]


def _none(what: str, seen: Sequence[str]) -> Bound:
    examples = "; ".join(sorted(set(seen))[:3])
    return Bound(what, "0", f"{len(seen)} ({examples})" if seen else "0", not seen)


def _timings(found: Findings, slack: float) -> list[Bound]:
    recovery, polls = max(found.recoveries(), default=0.0), [probe.seconds for probe in found.probes]
    p99 = percentile(polls, 99) if polls else math.inf
    return [
        _within("seconds from a kill to the next 200", recovery, slack * MAX_RECOVERY_S, found.others),
        _within("probes: seconds, p99", p99, slack * MAX_PROBE_S, found.others),
    ]


def _within(what: str, seconds: float, limit: float, taken: float) -> Bound:
    """A bound in time, which is only judged where others took next to nothing of the machine."""
    kept = None if taken > others.QUIET else seconds <= limit
    return Bound(what, f"<= {limit:g}", rounded(seconds), kept)


def _memory(found: Findings) -> list[Bound]:
    points = found.settled()
    return [
        _flat("the server", [(point.at, point.server) for point in points]),
        _flat("the workers", [(point.at, point.workers) for point in points]),
    ]


def _flat(whose: str, points: Sequence[tuple[float, float]]) -> Bound:
    what, bound = f"resident memory of {whose}", f"<= 2 standard errors or {SLOPE_MIB:g} MiB/min"
    if len(points) < MIN_POINTS:
        return Bound(what, bound, f"{len(points)} points after the first minute", None)
    slope = Slope.of(points)
    return Bound(what, bound, str(slope), slope.slope <= max(2 * slope.error, SLOPE_MIB))


def _grown(before: int, after: int) -> tuple[str, bool]:
    return f"{before} before, {after} after", after <= before


def _counters(counters: Mapping[str, float]) -> Bound:
    what, bound = "metrics add up", f"accepted = {' + '.join(LEDGER)}"
    ends = [counters[name] for name in LEDGER]
    measured = f"{counters['accepted']:.0f} = {' + '.join(f'{end:.0f}' for end in ends)}"
    return Bound(what, bound, measured, counters["accepted"] == sum(ends))


def tables(found: Findings, judged: Sequence[Bound]) -> list[Table]:
    return [
        Table("Requests", ["what", "how many"], _requests(found)),
        Table("Times", ["what", "median", "p99", "largest"], _times(found)),
        others.table("Soak", [found.others]),
        Table("Memory, MiB", ["when, s", "server", "workers"], _resident(found)),
        Table("Bounds", ["what", "bound", "measured", "kept"], [bound.row() for bound in judged]),
    ]


def _requests(found: Findings) -> list[list[str]]:
    ledger = found.ledger
    rows = [
        ["sent", ledger.sent],
        ["answered with 200", sum(one.status == 200 for one in ledger.of("valid"))],
        *([f"refused: {status} {code}", count] for (status, code), count in sorted(ledger.refused().items())),
        *([f"left {moment}", count] for moment, count in sorted(ledger.cancelled.items())),
        ["bad input answered", len(ledger.of("bad"))],
        *([f"bursts of the attack {name}", count] for name, count in sorted(found.attacks.bursts.items())),
        ["workers killed", len(found.kills)],
        ["requests that asked whether a worker serves again", len(ledger.of("canary"))],
        *([f"reloads answered with {status}", count] for status, count in sorted(found.reloads.items())),
    ]
    return [[str(cell) for cell in row] for row in rows]


def _times(found: Findings) -> list[list[str]]:
    answered = [one.received - one.sent for one in found.ledger.of("valid") if one.status == 200]
    polls = {path: [one.seconds for one in found.probes if one.path == path] for path in ("/livez", "/readyz")}
    return [
        _spread("from a kill to the next 200, s", found.recoveries(), 1),
        _spread("from a kill to `/readyz` 200, s", found.readiness(), 1),
        _spread("requests answered with 200, s", answered, 1),
        *(_spread(f"`{path}`, ms", seconds, 1000) for path, seconds in polls.items()),
    ]


def _spread(what: str, values: Sequence[float], factor: float) -> list[str]:
    if not values:
        return [what, "", "", ""]
    figures = (statistics.median(values), percentile(values, 99), max(values))
    return [what, *(rounded(factor * figure) for figure in figures)]


def _resident(found: Findings) -> list[list[str]]:
    """What was seen before some of the kills, at the same age of the workers."""
    points = per_interval(found.memory, [found.started, *found.kills], found.started)
    step = max(1, len(points) // 10)
    return [
        [f"{point.at - found.started:.0f}", f"{point.server:.0f}", f"{point.workers:.0f}"] for point in points[::step]
    ]
