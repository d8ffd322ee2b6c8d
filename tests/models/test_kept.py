"""Files with a digest, and folders that others cannot write."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import resource
import signal
import tempfile
from pathlib import Path

import pytest

from service.models import kept

DATA = b"what was proven of the network"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "one.json"
    kept.write(path, DATA)
    return path


def test_what_was_written_is_read(file: Path) -> None:
    assert kept.read(file) == DATA
    kept.write(file, memoryview(b""))
    assert kept.read(file) == b""
    assert list(file.parent.iterdir()) == [file]


def test_every_flipped_bit_is_noticed(file: Path) -> None:
    whole = file.read_bytes()
    for place in range(len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert kept.read(file) is None


@pytest.mark.parametrize("length", [0, 10, 32, 40])
def test_a_file_that_ends_early_is_noticed(file: Path, length: int) -> None:
    file.write_bytes(file.read_bytes()[:length])
    assert kept.read(file) is None


def test_what_cannot_be_read_is_none(tmp_path: Path) -> None:
    assert kept.read(tmp_path / "missing") is None
    assert kept.read(tmp_path) is None


def _write_with_little_room(path: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    with contextlib.suppress(OSError):
        kept.write(path, bytes(100_000))
        os._exit(1)
    os._exit(0)


def test_where_there_is_no_room_the_old_file_stays_and_nothing_else(file: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_write_with_little_room, args=(file,))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert kept.read(file) == DATA
    assert list(file.parent.iterdir()) == [file]


def test_a_folder_of_the_user_is_private(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    assert kept.check_private(tmp_path / "link") == tmp_path
    with pytest.raises(FileNotFoundError):
        kept.check_private(tmp_path / "missing")


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777, 0o1777])
def test_a_folder_that_others_may_write_is_not_private(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)
    with pytest.raises(PermissionError, match="others can write"):
        kept.check_private(tmp_path)


@pytest.mark.parametrize(("mode", "private"), [(0o777, False), (0o770, False), (0o1777, True), (0o755, True)])
def test_a_folder_above_lets_others_in_unless_it_is_sticky(tmp_path: Path, mode: int, private: bool) -> None:
    folder = tmp_path / "above" / "between" / "own"
    folder.mkdir(parents=True, mode=0o700)
    (tmp_path / "above").chmod(mode)
    with contextlib.nullcontext() if private else pytest.raises(PermissionError, match="above"):
        kept.check_private(folder)


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
@pytest.mark.parametrize("place", ["own", "."])
def test_a_folder_of_another_user_is_not_private_nor_is_what_is_in_it(tmp_path: Path, place: str) -> None:
    (tmp_path / "own").mkdir()
    os.chown(tmp_path / place, 12345, -1)
    with pytest.raises(PermissionError, match="others can write"):
        kept.check_private(tmp_path / "own")


def test_a_temporary_folder_is_of_this_user_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = kept.temporary_folder()
    assert folder
    assert [str(path) for path in tmp_path.iterdir()] == [folder.name]
    folder.cleanup()


def test_no_temporary_folder_is_made_where_others_can_replace_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tmp_path.chmod(0o777)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    kept.say_not_kept.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert kept.temporary_folder() is None
        assert kept.temporary_folder() is None
    assert list(tmp_path.iterdir()) == []
    assert "others can write" in caplog.text


@pytest.mark.parametrize("place", ["missing", "file"])
def test_there_may_be_no_temporary_folder_at_all(
    place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / place))
    with caplog.at_level(logging.WARNING):
        assert kept.temporary_folder() is None
    assert "are not kept" in caplog.text
