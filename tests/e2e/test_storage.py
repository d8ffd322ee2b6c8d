"""No room, and no right to write: the server is slower, says so once, and is ready all the same."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.conftest import write_tiny
from tests.e2e.support import RAW, map_of, only
from tests.server import running

NOWHERE = "import tempfile\n\ntempfile._candidate_tempdir_list = list\n"
"""What Python runs first in a process: there is no folder that could be temporary."""


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for name in ("one", "two"):
        write_tiny(tmp_path / "models" / name)
    return tmp_path / "models"


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for a few small files."""
    folder = tmp_path / "full"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16k,mode=700", "none", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this user may not mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def is_served(client: httpx.Client, picture: bytes) -> bool:
    assert client.get("/readyz").status_code == 200
    return all(map_of(only(client, picture, model, **RAW)).any() for model in ("one", "two"))


def test_a_full_temporary_folder(models: Path, full: Path, tmp_path: Path, chelsea: bytes) -> None:
    with running(tmp_path, "--models", str(models), TMPDIR=str(full)) as server, server.client() as client:
        assert is_served(client, chelsea)
        assert server.log.read_text().count("are not kept") == 1
        assert "No space left on device" in server.log.read_text()


def test_no_temporary_folder_and_a_home_that_is_read_only(models: Path, tmp_path: Path, chelsea: bytes) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(NOWHERE)
    python = os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])
    options = ("--models", str(models), "--compiled-heads", "2")
    with running(tmp_path, *options, HOME="/proc", PYTHONPATH=python) as server, server.client() as client:
        assert is_served(client, chelsea)
        log = server.log.read_text()
        assert log.count("are not kept") == log.count("No usable temporary directory") == 1
        assert log.count("no head is compiled") == 1
