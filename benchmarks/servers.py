"""The servers that are measured: how each is started, asked and read."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.client import Connection
from benchmarks.networks import Network
from benchmarks.options import Options
from benchmarks.ours import COMPILE_S, METHOD, Mode, server_command
from benchmarks.table import Unavailable

START_S = 180.0
STOP_S = 20.0


@dataclass(frozen=True)
class Seen:
    """What is compared of an answer."""

    class_id: int
    overlay: bytes


@dataclass(frozen=True)
class Server:
    """`command` starts it on `port`; it is ready once `ready` answers something that `is_ready` accepts."""

    name: str
    command: list[str]
    port: int
    path: str
    ready: str
    is_ready: Callable[[bytes], bool]
    read: Callable[[dict[str, Any]], Seen]
    ready_within_s: float = START_S


def ours(name: str, network: Network, precision: str, mode: Mode, options: Options) -> Server:
    """The service with one model. Raises Unavailable where it does not have what the mode names."""
    models = options.workplace.repository(network, precision)
    port = _free_port()

    def is_ready(body: bytes) -> bool:
        model = json.loads(body)
        if model["state"] == "failed":
            raise Unavailable(model["reason"])
        return model["state"] == "ready" and bool(model["compiled_layers"] or not mode.compiled)

    return Server(
        name,
        server_command(models, port, mode),
        port,
        f"/models/{network.name}/heatmap?method={METHOD}",
        f"/models/{network.name}",
        is_ready,
        _read_ours,
        START_S + (COMPILE_S if mode.compiled else 0),
    )


def peer(name: str, module: str, network: Network, options: Options) -> Server:
    port = _free_port()
    command = [sys.executable, "-m", f"benchmarks.peers.{module}", "--port", str(port), "--device", options.device]
    command += ["--network", network.name, "--weights", str(options.workplace.weights(network))]
    command += ["--png-level", str(options.png_level)]
    return Server(name, command, port, "/predict", "/health", lambda _body: True, _read_peer)


@contextmanager
def running(server: Server, folder: Path) -> Iterator[Process]:
    """Start a server and wait until it is ready. Raises Unavailable, with the end of its log, where it never is."""
    log = folder / f"{server.port}.log"
    with log.open("w") as output:
        command = subprocess.Popen(  # noqa: S603
            server.command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    process = Process(command)
    try:
        deadline = time.monotonic() + server.ready_within_s
        while not asyncio.run(_is_ready(server)):
            if command.poll() is not None or time.monotonic() > deadline:
                raise Unavailable(f"does not serve: {log.read_text()[-1000:]}")
            time.sleep(0.2)
        yield process
    finally:
        process.end()


@dataclass(frozen=True)
class Process:
    """A server with all its workers: they are a process group of their own."""

    command: subprocess.Popen[bytes]

    def pause(self) -> None:
        """Let it take nothing of the processor while another one is measured: an idle LitServe polls its queues."""
        os.killpg(self.command.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.killpg(self.command.pid, signal.SIGCONT)

    def end(self) -> None:
        """Stop it, and then whatever it has left behind: LitServe's workers outlive it."""
        with suppress(ProcessLookupError):
            self.resume()
        self.command.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.command.wait(STOP_S)
        with suppress(ProcessLookupError):
            os.killpg(self.command.pid, signal.SIGKILL)
        self.command.wait()


async def _is_ready(server: Server) -> bool:
    try:
        async with Connection(server.port) as connection:
            return server.is_ready(await connection.get(server.ready))
    except (OSError, EOFError, RuntimeError):
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _read_ours(answer: dict[str, Any]) -> Seen:
    (result,) = answer["results"]
    return Seen(result["classes"][0]["class_id"], base64.b64decode(result["heatmaps"][0]["data"]))


def _read_peer(answer: dict[str, Any]) -> Seen:
    return Seen(answer["classes"][0]["class_id"], base64.b64decode(answer["overlay"]))
