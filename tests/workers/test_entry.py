"""Where a worker's process keeps what is temporary."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from service.workers import entry


@pytest.fixture(autouse=True)
def _unchanged_afterwards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "environ", {"TMPDIR": str(tmp_path)})
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_it_is_a_folder_of_its_own(tmp_path: Path) -> None:
    entry._use(tmp_path / "7")
    assert tempfile.gettempdir() == os.environ["TMPDIR"] == str(tmp_path / "7")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "7" / "inductor")


@pytest.mark.parametrize("place", ["taken", "taken/7", "missing/7"])
def test_where_none_can_be_made_it_goes_on_with_the_common_one(place: str, tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    entry._use(tmp_path / place)
    assert tempfile.gettempdir() == os.environ["TMPDIR"] == str(tmp_path)


def test_where_there_is_none_nobody_looks_for_one() -> None:
    entry._use(None)
    assert tempfile.gettempdir() == os.environ["TORCHINDUCTOR_CACHE_DIR"] == os.sep
