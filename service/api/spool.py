"""An answer that waits for its reader in a file instead of in memory."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress


class Spool:
    """Bytes in a file without a name, which ends with it. What the file does not take stays in memory."""

    def __init__(self) -> None:
        """Raises OSError where there is no temporary folder, or no file may be made there."""
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  # `close` does
        self._rest: list[bytes] = []
        self._lock = threading.Lock()

    def add(self, data: bytes) -> None:
        """Append; blocks while the file is written."""
        written = 0
        with self._lock, suppress(OSError):  # the disk is full
            while not self._rest and written < len(data):
                written += self._file.write(memoryview(data)[written:])
        if written < len(data):
            self._rest.append(data[written:])

    def parts(self, size: int) -> Iterator[bytes]:
        """All of it, at most `size` bytes at a time. Blocks while the file is read."""
        self._file.seek(0)
        while part := self._read(size):
            yield part
        for data in self._rest:
            yield from slices(data, size)

    def _read(self, size: int) -> bytes:
        with self._lock:
            return self._file.read(size)

    def close(self) -> None:
        """Free the file and what is in memory, once a thread that still writes or reads has left it."""
        with self._lock:
            self._file.close()
        self._rest.clear()


def slices(data: bytes, size: int) -> Iterator[bytes]:
    """The data, at most `size` bytes at a time."""
    view = memoryview(data)
    for start in range(0, len(data), size):
        yield bytes(view[start : start + size])
