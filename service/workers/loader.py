"""The thread of a worker that loads, reloads and unloads its models, one after the other, while it serves."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from pathlib import Path

from service.models.repository import Entry
from service.models.resident import Model
from service.workers.compiler import Compiler
from service.workers.engine import Engine
from service.workers.loading import load_into
from service.workers.messages import Load, Loaded, Loading, ModelChanged, ToParent, Unload


class Loader:
    """Takes the entries of a start, and what the server asks for later. A model serves until its successor can."""

    def __init__(
        self, engine: Engine, compiler: Compiler | None, folder: Path | None, send: Callable[[ToParent], None]
    ) -> None:
        """`folder` is where captured programs are kept, if anywhere; `send` is told of each model's state."""
        self.busy = False
        self._engine = engine
        self._compiler = compiler
        self._folder = folder
        self._send = send
        self._wanted: queue.SimpleQueue[Entry | Load | Unload] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="load", daemon=True).start()

    def put(self, wanted: Entry | Load | Unload) -> None:
        self._wanted.put(wanted)

    def _work(self) -> None:
        self._engine.device.enter()
        while True:
            wanted = self._wanted.get()
            self.busy = True
            match wanted:
                case Entry():
                    self._load(wanted)
                case Load(entry=entry):
                    self._send(Loaded(entry.id, self._load(entry)))
                case Unload(model_id=model_id):
                    self._forget(self._engine.models.pop(model_id, None))
                    self._send(Loaded(model_id))
            self.busy = False

    def _load(self, entry: Entry) -> str | None:
        """The reason why it failed. A model that cannot be read again is served as it was."""
        before = self._engine.models.get(entry.id)
        self._send(Loading(entry.id))
        info = load_into(self._engine, entry, self._folder)
        self._send(Loading(None))
        if info.state == "failed" and before:
            return info.reason
        self._forget(before)
        self._send(ModelChanged(info))
        if self._compiler and info.state == "ready":
            self._compiler.add(self._engine.models[entry.id], entry)
        return info.reason

    def _forget(self, model: Model | None) -> None:
        if model and self._compiler:
            self._compiler.remove(model)
