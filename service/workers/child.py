"""The worker's process: loads the models, takes jobs from its pipe and answers there."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from service import logs
from service.explain.method import REGISTRY, Method
from service.models.packages import PackageStore
from service.models.repository import Entry
from service.models.resident import Model
from service.settings import Settings
from service.workers import wire
from service.workers.compiler import Compiler
from service.workers.device import Device
from service.workers.engine import Engine
from service.workers.loader import Loader
from service.workers.loading import describe
from service.workers.messages import (
    BEAT_S,
    EXIT_POISONED,
    Beat,
    Cancel,
    Hello,
    Job,
    Load,
    MethodInfo,
    ModelChanged,
    Stop,
    ToParent,
    Unload,
)

logger = logging.getLogger(__name__)


def main(
    connection: Connection, device: str, settings: Settings, entries: tuple[Entry, ...], folder: Path | None
) -> None:
    """Serve until told to stop, or until the parent is gone."""
    logs.configure(settings.log_level, settings.log_format, device)
    lock = threading.Lock()

    def send(message: ToParent) -> None:
        with lock, contextlib.suppress(OSError):
            wire.send(connection, message)

    engine = Engine(Device(device, settings.streams, settings.max_batch), settings)
    engine.device.on_poisoned = _leave_poisoned
    compiler = _compiler(engine, settings, folder, lambda model: send(ModelChanged(describe(model))))
    threading.Thread(target=_beat, args=(engine, send), name="beat", daemon=True).start()
    methods = tuple(describe_method(method) for method in REGISTRY.values())
    send(Hello(device, engine.capacity, engine.device.slots, methods))
    loader = Loader(engine, compiler, folder, send)
    for entry in entries:
        loader.put(entry)
    try:
        _take_messages(connection, engine, loader, send)
    except (EOFError, OSError):  # the parent is gone, and nobody else would clean up
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)
    engine.close()
    if compiler:
        compiler.close()
    if loader.busy:  # an ordinary exit would tear torch down under it
        os._exit(0)


def _take_messages(connection: Connection, engine: Engine, loader: Loader, send: Callable[[ToParent], None]) -> None:
    while not isinstance(message := connection.recv(), Stop):
        match message:
            case Job() as job:
                engine.submit(job, send, send)
            case Cancel(id=job_id):
                engine.cancel(job_id)
            case Load() | Unload():
                loader.put(message)


def _beat(engine: Engine, send: Callable[[ToParent], None]) -> None:
    while True:
        send(Beat(engine.device.progress.stalled_s()))
        time.sleep(BEAT_S)


def _leave_poisoned() -> None:
    logger.critical("the device is lost to this process, which leaves to make room for another")
    os._exit(EXIT_POISONED)


def _compiler(
    engine: Engine, settings: Settings, folder: Path | None, changed: Callable[[Model], None]
) -> Compiler | None:
    """The compiler, where heads are to be compiled and there is a place for them."""
    if not settings.compiled_heads:
        return None
    try:
        if folder is None:
            raise OSError("there is no temporary folder")
        store = PackageStore(settings.cache.expanduser(), settings.cache_bytes)
    except (OSError, RuntimeError) as error:  # of `expanduser` where there is no home
        logger.warning("no head is compiled, models are served eagerly: %s", error)
        return None
    return Compiler(settings, store, engine.device, folder, changed)


def describe_method(method: Method) -> MethodInfo:
    """What the server knows of a method."""
    return MethodInfo(
        name=method.name,
        family=method.family,
        channels=method.channels,
        paper=method.paper,
        description=method.description,
        cost=method.cost,
        gen_params=method.Params.model_json_schema(),
        alone=method.alone,
    )
