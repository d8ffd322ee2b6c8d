"""Compiled heads on disk: found by a key of everything that shapes them, within a number of bytes.

Packages are native code, so the folder must be the user's own.
"""

from __future__ import annotations

import faulthandler
import fcntl
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from service.models import kept

DIGEST = "digest"

logger = logging.getLogger(__name__)


class PackageStore:
    """A folder that processes share. The least recently used packages leave when it grows over `max_bytes`."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """Make the folder where it is missing. Raises OSError where it cannot be written, or others can write it."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder = kept.check_private(folder)
        (self.folder / "lock").touch()
        self._max_bytes = max_bytes

    def find(self, key: str) -> Path | None:
        """The folder of a finished package, which counts as used now.

        One that is damaged or crashed a process is dropped instead.
        """
        trace = self._trace(key)
        with suppress(FileNotFoundError):
            if trace.stat().st_size:
                logger.warning("package %s is dropped: it crashed the process that loaded it", key)
                self.drop(key)
                trace.unlink()  # last, for another process may be looking too
        package = self.folder / key
        if not package.exists():
            return None
        try:
            if kept.read(package / DIGEST) != _digest(package):
                raise OSError("its files are not those that were written")
            os.utime(package)
        except OSError as error:
            logger.warning("package %s is dropped: %s", key, error)
            self.drop(key)
            return None
        return package

    @contextmanager
    def making(self, key: str) -> Iterator[Path]:
        """An empty folder to make the package in, which becomes that of `key` unless an exception leaves the block.

        One process makes a package at a time, others wait; look for it again once inside.
        """
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for left in self.folder.glob("*.partial"):  # by processes that were killed: nobody else is inside
                shutil.rmtree(left, ignore_errors=True)
            partial = self.folder / f"{key}.partial"
            partial.mkdir()
            try:
                yield partial
                if any(partial.iterdir()):
                    kept.write(partial / DIGEST, _digest(partial))
                    partial.rename(self.folder / key)
                    self._shrink(keep=key)
            finally:
                shutil.rmtree(partial, ignore_errors=True)

    @contextmanager
    def trying(self, key: str) -> Iterator[None]:
        """The package is loaded and run for the first time in the block, which this process may not survive.

        A crash leaves Python's last words beside the package; whoever is killed from outside says nothing.
        """
        before = faulthandler.is_enabled()
        with self._trace(key).open("ab") as file:
            faulthandler.enable(file)
            try:
                yield
            finally:
                if before:
                    faulthandler.enable()
                else:
                    faulthandler.disable()
                if not os.fstat(file.fileno()).st_size:
                    self._trace(key).unlink(missing_ok=True)

    def _trace(self, key: str) -> Path:
        return self.folder / f"{key}.crash"

    def drop(self, key: str) -> None:
        """Remove a package that is of no use."""
        shutil.rmtree(self.folder / key, ignore_errors=True)

    def _shrink(self, keep: str) -> None:
        packages = [entry for entry in self.folder.iterdir() if entry.is_dir() and not entry.suffix]
        sizes = {package: _size(package) for package in packages}
        total = sum(sizes.values())
        for package in sorted(packages, key=lambda package: package.stat().st_mtime):
            if total <= self._max_bytes:
                return
            if package.name != keep:
                self.drop(package.name)
                total -= sizes[package]


def key_of(*parts: object) -> str:
    """A name for what these parts shape."""
    return hashlib.sha256("\n".join(map(repr, parts)).encode()).hexdigest()[:32]


def _digest(package: Path) -> bytes:
    """The SHA-256 of the names and contents of its files. Raises OSError where one cannot be read."""
    whole = hashlib.sha256()
    for path in sorted(path for path in package.rglob("*") if path.is_file() and path.name != DIGEST):
        with path.open("rb") as file:
            whole.update(path.name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return whole.digest()


def _size(package: Path) -> int:
    return sum(file.stat().st_size for file in package.rglob("*") if file.is_file())
