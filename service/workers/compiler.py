"""Heads that requests use are compiled in a process of their own, and swapped in while the model serves."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import platform
import queue
import shutil
import sys
import threading
import time
import weakref
from collections.abc import Callable
from multiprocessing.context import SpawnProcess
from pathlib import Path

import torch

from service.models.compiled import CompiledHead, Form, prove
from service.models.heads import Head, Heads
from service.models.packages import PackageStore, key_of
from service.models.repository import Entry
from service.models.resident import Model
from service.settings import Settings
from service.workers.compilation import CompileJob, kill
from service.workers.device import Device
from service.workers.entry import compile_head

logger = logging.getLogger(__name__)

COMPILER = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
COMPILE_AFTER = 8
"""Uses of a head other than the default layer's before it is compiled."""
ROOM = 6
"""A head is compiled where there is room for so many times its network's weights: three packages hold most of them, and
as many files of the compiler."""
LOADED_S = 5.0
"""By then a package is loaded and proven, in general."""


class Compiler:
    """One thread that sees to the compiled heads of a worker's models, one head after the other."""

    def __init__(
        self,
        settings: Settings,
        store: PackageStore,
        device: Device,
        folder: Path,
        changed: Callable[[Model], None],
    ) -> None:
        """`folder` is where captured programs are kept; `changed` is told of a model whose compiled heads changed."""
        self._settings = settings
        self._store = store
        self._device = device
        self._folder = folder
        self._changed = changed
        self._wanted: queue.SimpleQueue[tuple[Model, Entry, Head] | None] = queue.SimpleQueue()
        self._resident: list[tuple[Model, Head]] = []
        self._gone: weakref.WeakSet[Heads] = weakref.WeakSet()  # of models that serve no more
        self._process: SpawnProcess | None = None
        self._closed = False
        self._told: set[str] = set()
        self._lock = threading.Lock()
        self._counting = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="compile", daemon=True)
        self._thread.start()

    def add(self, model: Model, entry: Entry) -> None:
        """Compile the head that predictions use, and later each head that is used often."""

        def used(head: Head) -> None:
            with self._counting:
                head.uses += 1
                head.last_used = time.monotonic()
                if head.uses == COMPILE_AFTER:
                    self._wanted.put((model, entry, head))

        model.heads.on_use = used
        first = model.heads.at(*model.cut)
        first.uses = COMPILE_AFTER
        self._wanted.put((model, entry, first))

    def remove(self, model: Model) -> None:
        """The model serves no more."""
        with self._lock:
            self._gone.add(model.heads)
            self._resident = [resident for resident in self._resident if resident[0] is not model]

    def close(self) -> None:
        """Give up what is being compiled, and let what is being loaded prove itself: else it seems to have failed."""
        with self._lock:
            self._closed = True
            self._wanted.put(None)
            if self._process is not None:
                kill(self._process)
        self._thread.join(LOADED_S)

    def _work(self) -> None:
        self._device.enter()
        torch.set_num_threads(self._device.threads)
        while (wanted := self._wanted.get()) is not None:
            model, entry, head = wanted
            if self._closed or model.heads in self._gone:
                continue
            try:
                self._provide(model, entry, head)
            except Exception:
                if not self._closed:
                    logger.warning("model %s is served eagerly at %s", model.id, head.name, exc_info=True)

    def _provide(self, model: Model, entry: Entry, head: Head) -> None:
        job = self._job(model, entry, head)
        package = self._store.find(job.key) or self._compile(job, model)
        if package is None:
            return
        started = time.perf_counter()
        with self._store.trying(job.key):
            try:
                compiled = CompiledHead(package, job.form, self._device.slots)
                prove(compiled, head.eager, job.form, counts={1})
            except Exception:
                self._store.drop(job.key)  # it was proven when it was made: the file is damaged
                raise
        if not compiled.bytes:
            logger.info("model %s stays eager at %s: compiled it is no faster", model.id, head.name)
            return
        with self._lock:
            if model.heads in self._gone:
                return
            dropped = self._make_room()
            head.compiled = compiled
            self._resident.append((model, head))
        for other in dropped:
            if other is not model:
                self._changed(other)
        logger.info(
            "model %s runs compiled at %s: %d MiB on disk, loaded in %.1f s",
            model.id,
            head.name,
            compiled.bytes >> 20,
            time.perf_counter() - started,
        )
        self._changed(model)

    def _job(self, model: Model, entry: Entry, head: Head) -> CompileJob:
        form = Form((3, *model.spec.input.size), head.dtype, self._device.device, self._settings.max_batch)
        targets = tuple((target.name, target.use_conv_only) for target in head.targets)
        threads = self._device.threads  # generated code has their number in it
        made_for = (processor(form.device), threads, torch.__version__)
        key = key_of(model.revision, targets, form.shape, form.dtype, form.max_batch, made_for)
        log_level, log_format = self._settings.log_level, self._settings.log_format
        return CompileJob(
            key, entry, model.revision, targets, form, threads, self._folder, self._store, log_level, log_format
        )

    def _compile(self, job: CompileJob, model: Model) -> Path | None:
        if reason := self._obstacle(model):
            if reason not in self._told:  # said once, not for each head
                self._told.add(reason)
                logger.warning("%s: models are served eagerly, which is slower", reason)
            return None
        process = multiprocessing.get_context("spawn").Process(
            target=compile_head, args=(pickle.dumps(job),), daemon=True
        )
        with self._lock:
            if self._closed:
                return None
            process.start()
            self._process = process
        process.join()
        with self._lock:
            self._process = None  # its id may soon be another's
        return self._store.find(job.key)

    def _obstacle(self, model: Model) -> str | None:
        """Why no head of the model can be compiled now."""
        if shutil.which(COMPILER) is None:
            return f"there is no C++ compiler ({COMPILER})"
        needed = ROOM * sum(weight.nbytes for weight in model.program.source.state_dict().values())
        for folder in (self._store.folder, self._folder):
            if shutil.disk_usage(folder).free < needed:
                return f"there is too little room for compiled heads in {folder}"
        return None

    def _make_room(self) -> list[Model]:
        """Let the least recently used heads go until one more may be resident, and return their models."""
        dropped = []
        while len(self._resident) >= self._settings.compiled_heads:
            model, head = min(self._resident, key=lambda resident: resident[1].last_used)
            self._resident.remove((model, head))
            head.compiled = None
            head.uses = 0
            dropped.append(model)
        return dropped


def processor(device: torch.device) -> str:
    """What a package's machine code is made for."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} {torch.cuda.get_device_capability(device)}"
    flags = Path("/proc/cpuinfo")
    lines = flags.read_text().splitlines() if flags.exists() else [platform.processor()]
    told = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    return f"{platform.machine()} {told}"
