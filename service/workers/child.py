"""The worker's process: loads the models, takes jobs from its pipe and answers there."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
from multiprocessing.connection import Connection
from pathlib import Path

from tqdm import tqdm

from service.explain import REGISTRY, Method
from service.models.repository import Entry
from service.settings import Settings
from service.workers.device import Device
from service.workers.engine import Engine
from service.workers.loading import load_into
from service.workers.messages import Cancel, Hello, Job, MethodInfo, ModelChanged, Stop, ToParent


def main(connection: Connection, device: str, settings: Settings, entries: tuple[Entry, ...], folder: Path) -> None:
    """Serve until told to stop, or until the parent is gone."""
    logging.basicConfig(level=settings.log_level.upper(), format=f"%(levelname)s:     [{device}] %(message)s")
    tqdm.set_lock(threading.RLock())  # its own would be a semaphore of the system, lost when the process is killed
    lock = threading.Lock()

    def send(message: ToParent) -> None:
        with lock, contextlib.suppress(OSError):
            connection.send(message)

    engine = Engine(Device(device, settings.streams), settings)
    send(Hello(device, engine.capacity, tuple(_describe(method) for method in REGISTRY.values())))

    def load_all() -> None:
        engine.device.enter()
        for entry in entries:
            send(ModelChanged(load_into(engine, entry, folder)))

    loading = threading.Thread(target=load_all, name="load", daemon=True)
    loading.start()
    try:
        while not isinstance(message := connection.recv(), Stop):
            match message:
                case Job() as job:
                    engine.submit(job, send)
                case Cancel(id=job_id):
                    engine.cancel(job_id)
    except (EOFError, OSError):  # the parent is gone, and nobody else would clean up
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)
    engine.close()
    if loading.is_alive():  # an ordinary exit would tear torch down under it
        os._exit(0)


def _describe(method: Method) -> MethodInfo:
    return MethodInfo(
        name=method.name,
        family=method.family,
        channels=method.channels,
        paper=method.paper,
        description=method.description,
        cost=method.cost,
        gen_params=method.Params.model_json_schema(),
    )
