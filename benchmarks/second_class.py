"""What the activation cache is for: another class of a picture that was just explained, against the first one."""

from __future__ import annotations

import time

from benchmarks import others
from benchmarks.networks import Network
from benchmarks.options import Options
from benchmarks.ours import Bare, Mode, compiles
from benchmarks.pictures import Pictures
from benchmarks.table import Report, Spread, Table, Target, Unavailable, ratios, rounded

CACHE_BYTES = 256 * 2**20
CLASSES = (281, 504)
LIMIT = 0.15


def run(options: Options) -> Report:
    report = Report()
    rows = []
    shares: list[float] = []
    columns = ["model", "first, ms", "second / first: compute", "second / first: decoded and rendered too"]
    for network in options.networks:
        what = f"{network.name}: second class in first ones, compute"
        try:
            found = _measure(network, options, shares)
        except Unavailable as error:
            rows.append([network.name, str(error), "", ""])
            report.targets.append(Target(what, LIMIT, None, missing=str(error)))
            continue
        compute = Spread.of(ratios(found["second compute"], found["first compute"]))
        whole = Spread.of(ratios(found["second whole"], found["first whole"]))
        first = rounded(1000 * Spread.of(found["first compute"]).median)
        rows.append([network.name, first, str(compute), str(whole)])
        report.targets.append(Target(what, LIMIT, compute))
        report.data[network.name] = found
    report.tables.append(Table("Another class of the same picture, with the activation cache", columns, rows))
    if shares:
        report.tables.append(others.table("Another class", shares))
        report.targets = others.judged(report.targets, shares)
    return report


def _measure(network: Network, options: Options, shares: list[float]) -> dict[str, list[float]]:
    """Seconds of every first and second class; a round is as many new pictures as fit in its seconds."""
    mode = Mode(options.device, compiles(), options.cache, activation_cache=CACHE_BYTES)
    engine = Bare(options.workplace.repository(network, "fp32"), mode)
    pictures = Pictures()
    found: dict[str, list[float]] = {}
    try:
        for number in range(options.rounds + 1):
            with others.watched(shares):
                until = time.perf_counter() + options.seconds
                while time.perf_counter() < until:
                    times = _first_and_second(engine, pictures.jpegs(1)[0])
                    for name, seconds in times.items() if number else ():
                        found.setdefault(name, []).append(seconds)
    finally:
        engine.close()
    options.say(f"second_class: {network.name}")
    return found


def _first_and_second(engine: Bare, picture: bytes) -> dict[str, float]:
    times = {}
    for name, class_id in zip(("first", "second"), CLASSES, strict=True):
        started = time.perf_counter()
        answer = engine.explain(picture, class_id)
        times[f"{name} whole"] = time.perf_counter() - started
        times[f"{name} compute"] = answer.timings.compute
    return times
