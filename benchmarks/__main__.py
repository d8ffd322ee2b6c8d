"""`python -m benchmarks`: runs the sections and prints their tables; see README.md beside this."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import engine, second_class, service, slow_methods
from benchmarks.machine import describe
from benchmarks.networks import NETWORKS, Workplace
from benchmarks.options import Options
from benchmarks.table import Report, Table, targets_data, targets_table

SECTIONS: dict[str, Callable[[Options], Report]] = {
    "engine": engine.run,
    "second_class": second_class.run,
    "service": service.run,
    "slow_methods": slow_methods.run,
}
CACHE = Path("build/benchmarks")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line. `--quick` moves the defaults; what is given beside it holds."""
    parser = argparse.ArgumentParser("benchmarks", description="Ours beside its peers, interleaved, as ratios.")
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}; default: all")
    parser.add_argument("--models", nargs="+", choices=NETWORKS, metavar="MODEL", help=f"of {', '.join(NETWORKS)}")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--rounds", type=int, help="how often everything is measured (5)")
    parser.add_argument("--seconds", type=float, help="of each engine variant per round (0.3)")
    parser.add_argument("--service-seconds", type=float, help="of each server per round (6)")
    parser.add_argument("--png-level", type=int, default=6, help="zlib's level of the peers' overlays (6, Pillow's)")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder in which compiled packages are kept")
    parser.add_argument("--json", type=Path, help="file for the record with every round")
    parser.add_argument("--quick", action="store_true", help="a first impression: resnet50, two short rounds")
    given = parser.parse_args(arguments)
    if unknown := set(given.sections) - SECTIONS.keys():
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    quick = {"models": ["resnet50"], "rounds": 2, "seconds": 0.1, "service_seconds": 3.0}
    full = {"models": list(NETWORKS), "rounds": 5, "seconds": 0.3, "service_seconds": 6.0}
    for name, default in (quick if given.quick else full).items():
        if getattr(given, name) is None:
            setattr(given, name, default)
    given.sections = given.sections or list(SECTIONS)
    return given


def main(arguments: Sequence[str]) -> None:
    given = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # the servers are stopped on the way out
    machine = describe(given.device)
    reports: dict[str, Report] = {}
    with tempfile.TemporaryDirectory(prefix="heatmap-benchmarks-") as folder:
        options = Options(
            networks=tuple(NETWORKS[name] for name in given.models),
            device=given.device,
            rounds=given.rounds,
            seconds=given.seconds,
            service_seconds=given.service_seconds,
            workplace=Workplace(Path(folder)),
            cache=given.cache.absolute(),
            png_level=given.png_level,
        )
        for name in given.sections:
            reports[name] = SECTIONS[name](options)
    show(machine, reports)
    if given.json:
        given.json.write_text(json.dumps(record(machine, reports), indent=1) + "\n")


def show(machine: dict[str, object], reports: dict[str, Report]) -> None:
    rows = [[name, str(value)] for name, value in machine.items()]
    targets = [target for report in reports.values() for target in report.targets]
    tables = [table for report in reports.values() for table in report.tables]
    for table in (Table("Machine", ["", ""], rows), *tables, targets_table(targets)):
        print(table.markdown(), end="\n\n")


def record(machine: dict[str, object], reports: dict[str, Report]) -> dict[str, object]:
    targets = [target for report in reports.values() for target in report.targets]
    sections = {name: report.data for name, report in reports.items()}
    return {"machine": machine, "sections": sections, "targets": targets_data(targets)}


if __name__ == "__main__":
    main(sys.argv[1:])
