"""Answers that wait in files."""

from __future__ import annotations

import errno
import io
import tempfile
from typing import Any

import pytest

from service.api.spool import Spool, slices

DATA = [b"first" * 1000, b"", b"second" * 7]


class SmallDisk(io.BytesIO):
    """A file on a disk with room for `room` bytes, which takes a part of what is written, as a raw file may."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def write(self, data: Any) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = super().write(memoryview(data)[: min(self.room, 700)])
        self.room -= taken
        return taken


def spooled() -> list[bytes]:
    spool = Spool()
    for data in DATA:
        spool.add(data)
    parts = list(spool.parts(512))
    spool.close()
    return parts


def test_what_is_spooled_comes_back() -> None:
    assert b"".join(spooled()) == b"".join(DATA)
    assert max(map(len, spooled())) == 512


@pytest.mark.parametrize("room", [0, 1, 2500, 5000, 5001, 10_000])
def test_what_the_disk_does_not_take_comes_back_from_memory(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: SmallDisk(room))
    assert b"".join(spooled()) == b"".join(DATA)
    assert max(map(len, spooled())) == 512


def test_slices() -> None:
    assert list(slices(b"abcdefg", 3)) == [b"abc", b"def", b"g"]
    assert list(slices(b"", 3)) == []
