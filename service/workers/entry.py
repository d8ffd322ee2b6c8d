"""Where a worker's processes begin. Imported by the parent, so torch comes in only when they run."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
from multiprocessing.connection import Connection
from pathlib import Path

from service.models.repository import Entry
from service.settings import Settings

SURVIVED = 73
"""The exit code of a process that captured a model, or found out why not; 0 may be that of a builder which exits."""


def run(
    connection: Connection, device: str, settings: Settings, entries: tuple[Entry, ...], folder: Path | None
) -> None:
    """Serve the models of `entries` on `device` until told to stop.

    `folder` is temporary and common to all workers; each has a folder of its own in it, by its process id. None: there
    is no such place.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # a terminal sends them to the whole group; the parent decides
        signal.signal(number, signal.SIG_IGN)
    _use(folder and folder / str(os.getpid()))
    from service.workers import preload

    preload.main(connection, device, settings, entries, folder)


def _use(folder: Path | None) -> None:
    """Keep what is temporary in `folder`. The parent removes it: a process that is killed leaves unpacked packages."""
    if folder is None:
        # torch asks for both folders when it is imported and when it captures, and writes nothing into them then.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.tempdir = os.sep
        return
    with contextlib.suppress(OSError):  # no room, or no right to write: it goes on with the common folder
        folder.mkdir()
        os.environ.update(TMPDIR=str(folder), TORCHINDUCTOR_CACHE_DIR=str(folder / "inductor"))
        tempfile.tempdir = None  # forked, the process would keep that of its template


def compile_head(job: bytes) -> None:
    """Compile a head as the pickled CompileJob says."""
    _stand_back(19)
    from service.workers import preload

    preload.compile_in_background(pickle.loads(job))  # noqa: S301  (of the worker that started this process)


def capture(entry: Entry, device: str, folder: Path | None) -> None:
    """Capture a model into `folder`, where workers find it: for them to do so would stall what they serve."""
    _stand_back(5)  # somebody waits for it
    if folder is None:
        _use(None)
    from service.workers import preload

    preload.capture_in_background(entry, device, folder)
    os._exit(SURVIVED)


def _stand_back(niceness: int) -> None:
    """Leave the cores to what serves, and the world with the parent: from now on, before torch takes its seconds."""
    os.setsid()
    os.nice(niceness)
    threading.Thread(target=_leave_with_parent, name="parent", daemon=True).start()


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)
