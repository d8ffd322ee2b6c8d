"""What is measured beside the traffic: probes, from a process of its own, and the server's memory."""

from __future__ import annotations

import asyncio
import http.client
import itertools
import multiprocessing
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from urllib.parse import urlsplit

import numpy as np
import psutil

from tests.server import Server

PROBES = ("/livez", "/readyz")
POLL_S = 0.05
PROBE_PATIENCE_S = 10.0
SAMPLE_S = 1.0
MIB = 2**20


@dataclass(frozen=True)
class Probe:
    """One poll, begun `at` a moment of `time.monotonic`. `status` is 0 where no answer came."""

    path: str
    at: float
    status: int
    seconds: float


@dataclass(frozen=True)
class Memory:
    """Resident MiB at a moment: the server's process, and everything below it."""

    at: float
    server: float
    workers: float


@contextmanager
def probing(url: str) -> Iterator[list[Probe]]:
    """Poll the probes meanwhile; the list is filled at the end. Another process asks, so that ours delays nothing."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_probe, args=(url, there), daemon=True)
    process.start()
    there.close()
    here.recv()  # it polls from now on
    seen: list[Probe] = []
    try:
        yield seen
    finally:
        here.send(None)
        seen += here.recv()
        process.join()
        here.close()


def _probe(url: str, parent: Connection) -> None:
    stop = threading.Event()
    seen: list[Probe] = []
    threads = [threading.Thread(target=_poll, args=(url, path, stop, seen)) for path in PROBES]
    for thread in threads:
        thread.start()
    parent.send(None)
    with suppress(EOFError):
        parent.recv()
    stop.set()
    for thread in threads:
        thread.join()
    parent.send(seen)


def _poll(url: str, path: str, stop: threading.Event, seen: list[Probe]) -> None:
    address = urlsplit(url)
    assert address.hostname
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=PROBE_PATIENCE_S)
    while not stop.is_set():
        began = time.monotonic()
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            response.read()
            status = response.status
        except (OSError, http.client.HTTPException):
            connection.close()
            status = 0
        took = time.monotonic() - began
        seen.append(Probe(path, began, status, took))
        stop.wait(max(0.0, POLL_S - took))
    connection.close()


async def watch_memory(server: Server, samples: list[Memory]) -> None:
    """Append a sample every second until cancelled."""
    while True:
        samples.append(await asyncio.to_thread(memory_of, server))
        await asyncio.sleep(SAMPLE_S)


def memory_of(server: Server) -> Memory:
    process = psutil.Process(server.process.pid)
    return Memory(time.monotonic(), _resident(process), sum(map(_resident, server.family())))


def _resident(process: psutil.Process) -> float:
    with suppress(psutil.Error):  # it was just killed
        return float(process.memory_info().rss) / MIB
    return 0.0


@dataclass(frozen=True)
class Slope:
    """MiB per minute by least squares, with its standard error."""

    slope: float
    error: float

    @classmethod
    def of(cls, points: Sequence[tuple[float, float]]) -> Slope:
        """`points` are (seconds, MiB), at least three."""
        minutes, values = np.array(points).T / [[60.0], [1.0]]
        centred = minutes - minutes.mean()
        slope = float(centred @ values / (centred @ centred))
        rest = values - values.mean() - slope * centred
        return cls(slope, float(np.sqrt(rest @ rest / (len(points) - 2) / (centred @ centred))))

    def __str__(self) -> str:
        return f"{self.slope:+.2f} ± {self.error:.2f} MiB/min"


def per_interval(samples: Sequence[Memory], moments: Sequence[float], since: float) -> list[Memory]:
    """One point per interval between kills, from `since` on: workers that are replaced are only alike at the same age.

    For the server it is the interval's median, for the workers the last value of the interval.
    """
    points = []
    for begin, end in itertools.pairwise(moments):
        within = [sample for sample in samples if begin <= sample.at < end]
        if within and begin >= since:
            server = statistics.median(sample.server for sample in within)
            points.append(Memory(within[-1].at, server, within[-1].workers))
    return points
