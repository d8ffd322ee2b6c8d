"""The service as the benchmarks use it: the one file to change when its inside does."""

from __future__ import annotations

import shutil
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.table import Unavailable
from service.models.packages import PackageStore
from service.models.repository import Entry, scan
from service.settings import Settings, option_of
from service.workers.compiler import COMPILER, Compiler
from service.workers.device import Device
from service.workers.engine import Engine
from service.workers.loading import load_into
from service.workers.messages import Answer, ExplainRequest
from service.workers.plan import make_plan

METHOD = "grad_cam"
COMPILE_S = 300.0


@dataclass(frozen=True)
class Mode:
    """How a model is served. `streams` None is the service's default; `activation_cache` is in bytes."""

    device: str
    compiled: bool
    cache: Path
    streams: int | None = None
    activation_cache: int = 0

    def settings(self, models: Path) -> dict[str, Any]:
        """The service's settings in this mode; all others keep their defaults."""
        values: dict[str, Any] = {"models": models, "device": self.device, "cache": self.cache}
        values["activation_cache"] = self.activation_cache
        if not self.compiled:
            values["compiled_heads"] = 0
        if self.streams:
            values["streams"] = self.streams
        return values


def compiles() -> bool:
    """Whether heads can be compiled here; where not, the service is eager, and is measured so."""
    return shutil.which(COMPILER) is not None


class Bare:
    """One model in an engine in this process."""

    def __init__(self, models: Path, mode: Mode) -> None:
        settings = Settings(**mode.settings(models))
        name = "cuda:0" if mode.device == "cuda" else mode.device
        self._engine = Engine(Device(name, settings.streams, settings.max_batch), settings)
        (entry,) = scan(models)
        info = load_into(self._engine, entry)
        if info.state != "ready":
            self.close()
            raise Unavailable(info.reason or info.state)
        self._model = self._engine.models[entry.id]
        if mode.compiled:
            self._compile(entry, settings)

    def maps(self, pixels: NDArray[np.uint8], classes: list[int]) -> NDArray[np.float32]:
        """The raw maps (N,h,w) of one class per picture, of fitted pictures (N,H,W,3): no decoding, no rendering.

        May be called on as many threads as there are slots.
        """
        wanted = tuple((one,) for one in classes)
        request = ExplainRequest(self._model.id, (b"",) * len(pixels), wanted, (METHOD,))
        plan = make_plan(request, self._model)
        explained = self._engine.device.run(self._model, plan, pixels)
        return np.stack([one.maps[0].values for one in explained])

    def explain(self, picture: bytes, class_id: int) -> Answer:
        """One picture's heatmap of one class, from JPEG to PNG."""
        request = ExplainRequest(self._model.id, (picture,), ((class_id,),), (METHOD,), as_base64=False)
        return self._engine.explain(request)

    def close(self) -> None:
        self._engine.close()

    def _compile(self, entry: Entry, settings: Settings) -> None:
        """Have the default layer's head compiled, or read from the cache, as a worker does. Raises Unavailable."""
        changed = threading.Event()
        with tempfile.TemporaryDirectory(prefix="heatmap-benchmarks-") as folder:
            store = PackageStore(settings.cache, settings.cache_bytes)
            compiler = Compiler(settings, store, self._engine.device, Path(folder), lambda _model: changed.set())
            compiler.add(self._model, entry)
            done = changed.wait(COMPILE_S)
            compiler.close()
        if not done:
            self.close()
            raise Unavailable(f"no compiled head after {COMPILE_S:.0f} s")


def server_command(models: Path, port: int, mode: Mode) -> list[str]:
    """The command line of a server."""
    command = [sys.executable, "-m", "service", "serve", "--port", str(port), "--log-level", "warning"]
    for name, value in mode.settings(models).items():
        command += [option_of(name), str(value)]
    return command
