"""Whole services: 1 and 16 clients that post JPEGs never seen before, ours and the peers' in turn on the same cores."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

import uvloop
from PIL import Image

from benchmarks import client, others
from benchmarks.networks import SIDE, Network
from benchmarks.options import Options
from benchmarks.ours import Bare, Mode, compiles
from benchmarks.pictures import SIZE, Pictures
from benchmarks.servers import Process, Seen, Server, ours, peer, running
from benchmarks.table import Report, Spread, Table, Target, Unavailable, percentile, ratios, rounded

CLIENTS = (1, 16)
MANY = 16
BATCH = 8
OURS, BF16, BARE, LITSERVE = "ours, fp32", "ours, bf16", "bare engine, fp32", "LitServe + pytorch-grad-cam"
FASTAPI = "FastAPI + pytorch-grad-cam"
SPARE = 1.5
FIRST_RATE = 30.0


@dataclass
class Subject:
    """One server under measurement, with what was seen per number of clients: one rate per round, all latencies."""

    server: Server
    process: Process
    pictures: Pictures = field(default_factory=Pictures)
    rates: dict[int, list[float]] = field(default_factory=lambda: {clients: [] for clients in CLIENTS})
    latencies: dict[int, list[float]] = field(default_factory=lambda: {clients: [] for clients in CLIENTS})
    _expected: float = FIRST_RATE

    def round(self, clients: int, seconds: float, keep: bool) -> None:
        """One round, with pictures that are encoded before the clock starts."""
        awaking = self.pictures.jpegs(min(clients, BATCH))
        jpegs = self.pictures.jpegs(int(SPARE * self._expected * seconds) + clients)
        self.process.resume()
        self._load(awaking, len(awaking), seconds)  # the first answers after a pause are slow
        seen = self._load(jpegs, clients, seconds)
        self.process.pause()
        self._expected = max(self._expected, seen.rate)
        if keep:
            self.rates[clients].append(seen.rate)
            self.latencies[clients] += seen.latencies

    def _load(self, jpegs: list[bytes], clients: int, seconds: float) -> client.Round:
        return uvloop.run(client.load(self.server.port, self.server.path, jpegs, clients, seconds))


def run(options: Options) -> Report:
    """Of the networks only the first is served."""
    network = options.networks[0]
    missing: dict[str, str] = {}
    with ExitStack() as stack:
        subjects = _start(network, options, stack, missing)
        _check(subjects)
        bare = _bare(network, options, stack, missing)
        shares: list[float] = []
        bare_rates = _rounds(subjects, bare, options, shares)
    rates: dict[str, dict[int, list[float]]] = {name: subject.rates for name, subject in subjects.items()}
    latencies = {name: subject.latencies for name, subject in subjects.items()}
    return Report(
        [
            *(_table(network, clients, subjects, bare_rates, missing) for clients in CLIENTS),
            others.table(f"Service, {network.name}", shares),
        ],
        others.judged(_targets(network, subjects, bare_rates, missing), shares),
        {
            network.name: {
                "rates": rates,
                "bare": bare_rates,
                "latencies": latencies,
                "missing": missing,
                "others": shares,
            }
        },
    )


def _mode(options: Options) -> Mode:
    """As the service is by default, but for the activation cache, which never-seen pictures would only fill."""
    return Mode(options.device, compiles(), options.cache)


def _start(network: Network, options: Options, stack: ExitStack, missing: dict[str, str]) -> dict[str, Subject]:
    mode = _mode(options)
    makers: dict[str, Callable[[], Server]] = {
        OURS: lambda: ours(OURS, network, "fp32", mode, options),
        BF16: lambda: ours(BF16, network, "bf16", mode, options),
        FASTAPI: lambda: peer(FASTAPI, "fastapi_server", network, options),
        LITSERVE: lambda: peer(LITSERVE, "litserve_server", network, options),
    }
    subjects = {}
    for name, make in makers.items():
        try:
            server = make()
            process = stack.enter_context(running(server, options.workplace.folder))
        except Unavailable as error:
            missing[name] = str(error)
            continue
        subjects[name] = Subject(server, process)
        options.say(f"service: {name} is ready")
    return subjects


def _check(subjects: dict[str, Subject]) -> None:
    """Everybody names the same class and answers an overlay of the picture's own size."""
    (picture,) = Pictures(first=200_000).jpegs(1)
    seen = {name: asyncio.run(_ask(subject.server, picture)) for name, subject in subjects.items()}
    for name, one in seen.items():
        with Image.open(io.BytesIO(one.overlay)) as overlay:
            assert (overlay.format, overlay.size) == ("PNG", SIZE), f"{name} answers {overlay.format} {overlay.size}"
    classes = {name: one.class_id for name, one in seen.items() if name != BF16}
    assert len(set(classes.values())) == 1, f"the servers disagree: {classes}"


async def _ask(server: Server, picture: bytes) -> Seen:
    async with client.Connection(server.port) as connection:
        return server.read(json.loads(await connection.post(server.path, picture)))


def _bare(network: Network, options: Options, stack: ExitStack, missing: dict[str, str]) -> Bare | None:
    try:
        bare = Bare(options.workplace.repository(network, "fp32"), _mode(options))
    except Unavailable as error:
        missing[BARE] = str(error)
        return None
    stack.callback(bare.close)
    return bare


def _rounds(subjects: dict[str, Subject], bare: Bare | None, options: Options, shares: list[float]) -> list[float]:
    """All rounds of all servers; also the bare engine's pictures per second, measured beside the whole service's."""
    bare_rates = []
    pictures = Pictures()
    for subject in subjects.values():
        subject.process.pause()
    for number in range(options.rounds + 1):
        keep = number > 0  # the round before the first warms up
        seconds = options.service_seconds if keep else min(2.0, options.service_seconds)
        with others.watched(shares):
            for clients, name in itertools.product(CLIENTS, subjects):
                subjects[name].round(clients, seconds, keep)
                if bare and (name, clients) == (OURS, MANY):
                    rate = _bare_rate(bare, pictures, seconds)
                    bare_rates += [rate] if keep else []
        options.say(f"service: round {number}/{options.rounds}")
    return bare_rates


def _bare_rate(bare: Bare, pictures: Pictures, seconds: float) -> float:
    """Fitted pictures to raw maps in this process, in batches of as many as the servers merge."""
    classes = list(range(BATCH))
    bare.maps(pictures.fitted(BATCH, SIDE), classes)  # as the servers, it is awake when the clock starts
    count, taken = 0, 0.0
    while taken < seconds:
        batch = pictures.fitted(BATCH, SIDE)
        started = time.perf_counter()
        bare.maps(batch, classes)
        taken += time.perf_counter() - started
        count += BATCH
    return count / taken


def _table(
    network: Network, clients: int, subjects: dict[str, Subject], bare_rates: list[float], missing: dict[str, str]
) -> Table:
    unit = subjects[LITSERVE].rates[clients] if LITSERVE in subjects else None
    rows = []
    for name, subject in subjects.items():
        rates, latencies = subject.rates[clients], subject.latencies[clients]
        against = str(Spread.of(ratios(rates, unit))) if unit else ""
        median, worst = (rounded(1000 * percentile(latencies, percent)) for percent in (50, 99))
        rows.append([name, str(Spread.of(rates)), against, median, worst])
    if clients == MANY and bare_rates:
        against = str(Spread.of(ratios(bare_rates, unit))) if unit else ""
        rows.append([f"{BARE}, batch of {BATCH}", str(Spread.of(bare_rates)), against, "", ""])
    rows += [[name, reason, "", "", ""] for name, reason in missing.items()]
    columns = ["server", "pictures/s", f"in those of {LITSERVE}", "p50, ms", "p99, ms"]
    return Table(f"Service: {network.name}, grad_cam, {clients} client{'s'[: clients > 1]}", columns, rows)


def _targets(
    network: Network, subjects: dict[str, Subject], bare_rates: list[float], missing: dict[str, str]
) -> Iterator[Target]:
    if network.name != "resnet50":
        return
    what = f"resnet50, {MANY} clients, never-seen pictures: {{}}"
    for name, least in ((OURS, 4.5), (BF16, 8.0)):
        found = None
        if name in subjects and LITSERVE in subjects:
            found = Spread.of(ratios(subjects[name].rates[MANY], subjects[LITSERVE].rates[MANY]))
        why = missing.get(name) or missing.get(LITSERVE, "")
        yield Target(what.format(f"{name} / {LITSERVE}"), least, found, True, why)
    if OURS in subjects:
        served = Spread.of(ratios(subjects[OURS].rates[MANY], bare_rates)) if bare_rates else None
        latencies = subjects[OURS].latencies[MANY]
        tail = percentile(latencies, 99) / percentile(latencies, 50)
        yield Target(what.format(f"{OURS} / bare engine"), 0.7, served, True, missing.get(BARE, ""))
        yield Target(what.format(f"{OURS}: p99 / p50"), 3.0, Spread.of([tail]))
