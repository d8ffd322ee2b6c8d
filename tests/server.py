"""The real server as a process of its own, for tests that speak HTTP to it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from tests.told import check_told

START_S = 120.0
STOP_S = 30.0

OPTIONS_OFF = {"aug_smooth": False, "eigen_smooth": False, "grad_modifier": None, "backprop_modifier": None}
"""Parameters of grad_cam beside HALCON's, as they are unless asked for."""


class Server:
    """A running `heatmap-service serve` on a free port."""

    def __init__(self, process: subprocess.Popen[str], log: Path, url: str) -> None:
        self.process = process
        self.log = log
        self.url = url

    def client(self, timeout: float = 120.0) -> httpx.Client:
        """A client that looks up in the OpenAPI document whatever is answered."""
        return httpx.Client(base_url=self.url, timeout=timeout, event_hooks={"response": [check_told]})

    def wait_ready(self, timeout_s: float = START_S) -> None:
        with self.client() as client:
            wait_until(lambda: client.get("/readyz").status_code == 200, timeout_s, self)

    def workers(self) -> list[psutil.Process]:
        """The worker processes, forked or (with a long temporary folder) spawned."""
        forked = [child for template in self.templates() for child in template.children() if is_worker(child)]
        return forked + [child for child in self._children() if runs(child, "spawn_main")]

    def templates(self) -> list[psutil.Process]:
        """The process that has imported everything, from which workers are forked."""
        return [child for child in self._children() if is_worker(child)]

    def _children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def given(self) -> float:
        """The pictures that the server has given to its workers and waits for."""
        with self.client() as client:
            families = text_string_to_metric_families(client.get("/metrics").text)
        return sum(s.value for one in families if one.name == "heatmap_worker_pictures" for s in one.samples)

    def wait_exit(self, timeout_s: float) -> int:
        return self.process.wait(timeout_s)


def processor_s(process: psutil.Process) -> float:
    """Seconds of processor time that a process has taken."""
    times = process.cpu_times()
    return float(times.user + times.system)


def is_worker(process: psutil.Process) -> bool:
    """Whether this is a living forked worker, or the process that they are forked from."""
    return runs(process, "multiprocessing.forkserver")


def runs(process: psutil.Process, what: str) -> bool:
    """Whether this is a living process with these words in its command line."""
    try:
        return what in " ".join(process.cmdline())
    except psutil.Error:  # it is gone, or a zombie
        return False


def wait_until(condition: object, timeout_s: float, server: Server | None = None) -> None:
    """Poll until `condition()` holds; fail with the server's log when it does not in time."""
    assert callable(condition)
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError(f"not so within {timeout_s} s\n{server.log.read_text() if server else ''}")


@contextlib.contextmanager
def running(folder: Path, *options: str, ready: bool = True, **environment: str) -> Iterator[Server]:
    """A server with the given options of `serve`, its log in `folder`. It compiles nothing unless it is told to."""
    log = folder / "server.log"
    command = [sys.executable, "-m", "service", "serve", "--port", "0", "--device", "cpu", *options]
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            env={"HEATMAP_COMPILED_HEADS": "0", **os.environ, **environment},
        )
    server = Server(process, log, "")
    try:
        wait_until(lambda: "Uvicorn running on" in log.read_text() or process.poll() is not None, START_S, server)
        match = re.search(r"running on (http://\S+)", log.read_text())
        assert match, log.read_text()
        server.url = match[1]
        if ready:
            server.wait_ready()
        yield server
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
