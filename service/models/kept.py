"""Files that outlive the process which wrote them: checked by a digest before they are used, in a folder of our own.

A digest tells damage. It tells nothing of an attacker, whom the folder has to keep out.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import stat
import tempfile
import threading
from pathlib import Path

OTHERS = stat.S_IWGRP | stat.S_IWOTH

logger = logging.getLogger(__name__)


def write(path: Path, data: bytes | memoryview) -> None:
    """Write `data` behind its SHA-256. A reader finds all of it or what was there before.

    Raises OSError where there is no room or no right to write; nothing is left then.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_native_id()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(hashlib.sha256(data).digest())
            file.write(data)
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


@functools.cache  # said once, not for each model
def say_not_kept(reason: str) -> None:
    """Log that there is no place for files which only save time."""
    logger.warning("captured programs are not kept, and models load more slowly: %s", reason)


def read(path: Path) -> bytes | None:
    """What `write` was given; None where there is no such file, or it is damaged or cannot be read."""
    try:
        with path.open("rb") as file:
            expected, data = file.read(hashlib.sha256().digest_size), file.read()
    except OSError:
        return None
    return data if hashlib.sha256(data).digest() == expected else None


def check_private(folder: Path) -> Path:
    """The folder's real path, where nobody but this user and root can put or replace a file in it.

    Raises PermissionError where others can, be it by way of a folder above it; OSError where there is no such folder.
    """
    folder = folder.resolve(strict=True)
    for place in (folder, *folder.parents):
        state = place.stat()
        sticky = place != folder and state.st_mode & stat.S_ISVTX  # others may add there, and touch nothing of ours
        if state.st_uid not in (os.getuid(), 0) or (state.st_mode & OTHERS and not sticky):
            raise PermissionError(f"{folder} is not used: others can write in {place}")
    return folder


def temporary_folder() -> tempfile.TemporaryDirectory[str] | None:
    """A new folder that only this user can write in, or None where there is no place for one, which is logged."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="heatmap-service-", ignore_cleanup_errors=True)
    except OSError as error:
        say_not_kept(str(error))
        return None
    try:
        check_private(Path(folder.name))
    except PermissionError as error:
        folder.cleanup()
        say_not_kept(str(error))
        return None
    return folder
