"""Where a worker's process begins. Imported by the parent, so torch comes in only when the process runs."""

from __future__ import annotations

import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

from service.settings import Settings


def run(connection: Connection, device: str, settings: Settings, folder: Path) -> None:
    """Serve the models on `device` until told to stop. `folder` is the workers' common temporary folder."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a terminal sends them to the whole group; the parent decides
        signal.signal(number, signal.SIG_IGN)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy's threads would compete with those of the network
    from service.workers import child

    child.main(connection, device, settings, folder)
