"""Where a worker's process begins. Imported by the parent, so torch comes in only when the process runs."""

from __future__ import annotations

from multiprocessing.connection import Connection
from pathlib import Path

from service.settings import Settings


def run(connection: Connection, device: str, settings: Settings, folder: Path) -> None:
    """Serve the models on `device` until told to stop. `folder` is the workers' common temporary folder."""
    from service.workers import child

    child.main(connection, device, settings, folder)
