"""Medians, spreads, targets and tables. No measurement here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any


class Unavailable(Exception):
    """What was to be measured is not there; the message says why."""


@dataclass(frozen=True)
class Spread:
    """The median of the rounds with the lowest and the highest of them."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{rounded(self.median)} ({rounded(self.low)}..{rounded(self.high)})"


def rounded(value: float) -> str:
    """Three digits, and no more than three behind the point."""
    digits = next((count for count, limit in ((3, 0.1), (2, 10), (1, 100)) if abs(value) < limit), 0)
    return f"{value:.{digits}f}"


def ratios(values: Sequence[float], units: Sequence[float]) -> list[float]:
    """Each round's value in that round's unit: what the machine did to both in a round cancels out."""
    return [value / unit for value, unit in zip(values, units, strict=True)]


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that `percent` of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


@dataclass(frozen=True)
class Target:
    """What a ratio should be at most, or with `at_least` at least. None was measured where `missing` says why.

    Without `quiet` other processes disturbed it: then it is shown but not judged.
    """

    what: str
    limit: float
    measured: Spread | None
    at_least: bool = False
    missing: str = ""
    quiet: bool = True

    @property
    def met(self) -> bool | None:
        """Whether the median reaches it; None where nothing was measured, or not in quiet."""
        if self.measured is None or not self.quiet:
            return None
        return self.measured.median >= self.limit if self.at_least else self.measured.median <= self.limit

    def row(self) -> list[str]:
        unknown = self.missing or ("not measured" if self.measured is None else "not judged: others were busy")
        verdict = {True: "yes", False: "**no**", None: unknown}[self.met]
        sign = ">=" if self.at_least else "<="
        return [self.what, f"{sign} {self.limit:g}", "" if self.measured is None else str(self.measured), verdict]


@dataclass(frozen=True)
class Table:
    title: str
    columns: Sequence[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join([f"### {self.title}", "", *("| " + " | ".join(line) + " |" for line in lines)])


@dataclass
class Report:
    """What a section found: tables and targets to read, `data` with every round for machines."""

    tables: list[Table] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)


def targets_table(targets: Sequence[Target]) -> Table:
    return Table("Targets", ["what", "target", "measured", "reached"], [target.row() for target in targets])


def targets_data(targets: Sequence[Target]) -> list[dict[str, Any]]:
    return [{**asdict(target), "met": target.met} for target in targets]
