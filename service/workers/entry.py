"""Where a worker's processes begin. Imported by the parent, so torch comes in only when they run."""

from __future__ import annotations

import os
import signal
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path

from service.models.repository import Entry
from service.settings import Settings


def run(connection: Connection, device: str, settings: Settings, entries: tuple[Entry, ...], folder: Path) -> None:
    """Serve the models of `entries` on `device` until told to stop.

    `folder` is temporary and common to all workers; each has a folder of its own in it, by its process id.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # a terminal sends them to the whole group; the parent decides
        signal.signal(number, signal.SIG_IGN)
    own = folder / str(os.getpid())  # the parent removes it: whoever is killed leaves unpacked packages behind
    own.mkdir()
    os.environ["TMPDIR"] = str(own)
    tempfile.tempdir = None  # forked, the process would keep that of its template
    from service.workers import preload

    preload.main(connection, device, settings, entries, folder)


def capture(entry: Entry, device: str, folder: Path) -> None:
    """Capture a model into `folder`, where workers find it: for them to do so would stall what they serve."""
    from service.workers import preload

    preload.capture_in_background(entry, device, folder)
