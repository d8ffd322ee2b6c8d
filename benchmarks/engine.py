"""Grad-CAM without a server: from a fitted picture to its raw map, ours and the peers', in plain eager forwards."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import others
from benchmarks.networks import SIDE, Network, Pixels
from benchmarks.options import Options
from benchmarks.ours import Bare, Mode, compiles
from benchmarks.peers.cams import PEERS
from benchmarks.pictures import Pictures
from benchmarks.table import Report, Spread, Table, Target, Unavailable, ratios, rounded

BATCHES = (1, 8)
STREAMS = (1, 2, 4)
FORWARD = "eager forward"
EAGER, COMPILED, BF16 = "ours, eager", "ours, compiled", "ours, bf16"
GRAD_CAM = "pytorch-grad-cam"
ALIKE = {EAGER: 0.999, COMPILED: 0.999, BF16: 0.98}
"""The correlation that the maps of ours must have with each peer's, so that equal work is compared."""


@dataclass(frozen=True)
class Batch:
    """The same pictures as ours takes them, fitted pixels, and as peers take them, normalised on the device."""

    pixels: Pixels
    images: Tensor
    classes: list[int]


@dataclass(frozen=True)
class Variant:
    """One way to maps (N,h,w). `calls` of them run at a time, and count as one each."""

    name: str
    maps: Callable[[Batch], Tensor]
    calls: int = 1


@dataclass
class Measured:
    """Seconds of one call, per variant and round; why a variant is missing."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    others: list[float] = field(default_factory=list)


def run(options: Options) -> Report:
    report = Report()
    for network in options.networks:
        with ExitStack() as stack:
            bench = Bench(network, options, stack)
            found = {batch: bench.measure(batch) for batch in BATCHES}
        for batch, measured in found.items():
            report.tables.append(_table(network, batch, measured))
            report.tables.append(others.table(f"{network.name}, batch of {batch}", measured.others))
            report.targets += others.judged(_targets(network, batch, measured), measured.others)
        report.data[network.name] = {batch: vars(measured) for batch, measured in found.items()}
        gc.collect()  # the peers' hooks hold their networks in cycles
    return report


class Bench:
    """All variants of one network, ready and found to compute the same."""

    def __init__(self, network: Network, options: Options, stack: ExitStack) -> None:
        self._network = network
        self._options = options
        self._pictures = Pictures()
        self._missing: dict[str, str] = {}
        self._net = network.load(options.workplace.weights(network), options.device)
        self.variants = [Variant(FORWARD, partial(_forward, self._net)), *self._ours(stack), *self._peers()]
        self._check()

    def measure(self, batch: int) -> Measured:
        """Every variant once per round, in turn, each on pictures of its own."""
        seconds: dict[str, list[float]] = {variant.name: [] for variant in self.variants}
        shares: list[float] = []
        for number in range(self._options.rounds + 1):
            with others.watched(shares):
                taken = {variant.name: self._time(variant, batch) for variant in self.variants}
            for name in taken if number else ():  # the round before the first warms up
                seconds[name].append(taken[name])
            self._options.say(f"engine: {self._network.name}, batch {batch}, round {number}/{self._options.rounds}")
        return Measured(seconds, self._missing, shares[1:])

    def _ours(self, stack: ExitStack) -> Iterator[Variant]:
        cuda = self._options.device.startswith("cuda")
        for name, precision, compiled in ((EAGER, "fp32", False), (COMPILED, "fp32", True), (BF16, "bf16", True)):
            if compiled and not compiles():
                self._missing[name] = "no C++ compiler"
                continue
            for streams in STREAMS if cuda else (1,):
                title = name if streams == 1 else f"{name}, {streams} streams"
                mode = Mode(self._options.device, compiled, self._options.cache, streams)
                try:
                    engine = Bare(self._options.workplace.repository(self._network, precision), mode)
                except Unavailable as error:
                    self._missing[title] = str(error)
                    continue
                stack.callback(engine.close)
                yield Variant(title, partial(_ours, engine), streams)

    def _peers(self) -> Iterator[Variant]:
        for name, make in PEERS.items():
            try:
                maps = make(self._net, self._network.layer, self._network.tokens)
            except (ImportError, ValueError) as error:
                self._missing[name] = str(error)
                continue
            yield Variant(name, partial(_peer, maps))

    def _check(self) -> None:
        """The maps of the top classes are the peers', and their gradient is not zero."""
        batch = self._draw(2)
        with torch.no_grad():
            batch = Batch(batch.pixels, batch.images, self._net(batch.images).argmax(dim=1).tolist())
        ours = {variant.name: variant.maps(batch) for variant in self.variants if variant.name in ALIKE}
        theirs = {variant.name: variant.maps(batch) for variant in self.variants if variant.name in PEERS}
        for name, maps in ours.items():
            for peer, expected in theirs.items():
                alike = correlation(maps, expected)
                assert alike >= ALIKE[name], f"{self._network.name}: {name} and {peer} correlate {alike:.4f}"

    def _draw(self, count: int) -> Batch:
        pixels = self._pictures.fitted(count, SIDE)
        classes = [(97 * index) % 1000 for index in range(count)]
        return Batch(pixels, self._network.normalise(pixels).to(self._options.device), classes)

    def _time(self, variant: Variant, size: int) -> float:
        """Seconds of one call: calls with new pictures each until there is enough to go by."""
        taken: list[float] = []
        with ThreadPoolExecutor(variant.calls) as callers:
            while sum(taken) < self._options.seconds:
                batches = [self._draw(size) for _ in range(variant.calls)]
                self._synchronise()
                started = time.perf_counter()
                if variant.calls == 1:
                    variant.maps(batches[0])
                else:
                    list(callers.map(variant.maps, batches))
                self._synchronise()
                taken.append(time.perf_counter() - started)
        return float(np.median(taken)) / variant.calls

    def _synchronise(self) -> None:
        if self._options.device.startswith("cuda"):
            torch.cuda.synchronize()


def correlation(ours: Tensor, theirs: Tensor) -> float:
    """The least of the pictures' correlations; ours is brought to the peer's size first, where they differ."""
    ours = F.interpolate(ours[:, None], size=theirs.shape[1:], mode="bilinear", align_corners=False)[:, 0]
    pairs = zip(ours.flatten(1), theirs.float().flatten(1), strict=True)
    return min(float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in pairs)


def _forward(net: nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad():
        scores: Tensor = net(batch.images)
        return scores.cpu()


def _ours(engine: Bare, batch: Batch) -> Tensor:
    return torch.from_numpy(engine.maps(batch.pixels, batch.classes)).relu()


def _peer(maps: Callable[[Tensor, list[int]], Tensor], batch: Batch) -> Tensor:
    return maps(batch.images, batch.classes)


def _table(network: Network, batch: int, measured: Measured) -> Table:
    rows = []
    for name, seconds in measured.seconds.items():
        in_forwards = Spread.of(ratios(seconds, measured.seconds[FORWARD]))
        versus = Spread.of(ratios(measured.seconds[GRAD_CAM], seconds)) if GRAD_CAM in measured.seconds else ""
        rows.append([name, rounded(1000 * float(np.median(seconds)) / batch), str(in_forwards), str(versus)])
    rows += [[name, reason, "", ""] for name, reason in measured.missing.items()]
    columns = ["variant", "ms per picture", f"in {FORWARD}s", f"times faster than {GRAD_CAM}"]
    return Table(f"Engine: {network.name}, grad_cam, batch of {batch}", columns, rows)


def _targets(network: Network, batch: int, measured: Measured) -> Iterator[Target]:
    if network.name != "resnet50" or batch != 1:
        return
    what = "resnet50, batch 1: {}, {}"
    for name, forwards, faster in ((COMPILED, 0.75, 4), (BF16, 0.30, 10)):
        in_forwards = in_grad_cams = None
        with suppress(KeyError):
            in_forwards = Spread.of(ratios(measured.seconds[name], measured.seconds[FORWARD]))
            in_grad_cams = Spread.of(ratios(measured.seconds[GRAD_CAM], measured.seconds[name]))
        missing = measured.missing.get(name, "")
        yield Target(what.format(name, f"in {FORWARD}s"), forwards, in_forwards, missing=missing)
        yield Target(what.format(name, f"times faster than {GRAD_CAM}"), faster, in_grad_cams, True, missing)
