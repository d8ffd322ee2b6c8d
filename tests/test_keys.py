"""The file of keys: what is a line, and what a wrong one is told without being shown."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import service.keys
from service.keys import Key, KeyFile, find_key, read_keys
from service.settings import SettingsError

SECRET = "a-key-that-somebody-put-into-the-file"
GOOD = hashlib.sha256(b"key one").hexdigest()
OTHER = hashlib.sha256("schlüssel".encode()).hexdigest()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys"


def test_lines_comments_and_empty_lines(file: Path) -> None:
    file.write_text(
        f"\ufeff# keys of the laboratory\n\n  ann.b-c_1\tpredict sha256:{GOOD.upper()}  # until May\n"
        f"   \n#x admin sha256:{GOOD}\r\nroot predict,admin sha256:{OTHER}"
    )
    keys = read_keys(file)
    assert [(key.name, set(key.rights)) for key in keys] == [
        ("ann.b-c_1", {"predict"}),
        ("root", {"predict", "admin"}),
    ]
    assert find_key(keys, "key one") is keys[0]
    assert find_key(keys, "schlüssel") is keys[1]
    for wrong in ("", "key on", "key one ", GOOD, f"sha256:{GOOD}", "ann.b-c_1", "\x00"):
        assert find_key(keys, wrong) is None
    assert GOOD not in repr(keys)


@pytest.mark.parametrize(
    ("line", "right"),
    [
        (SECRET, "<name> <rights> sha256:<hex>"),
        (f"ann predict {SECRET}", "64 hexadecimal digits"),
        (f"ann predict sha256:{SECRET}", "64 hexadecimal digits"),
        (f"ann predict sha256:{GOOD[:-1]}", "64 hexadecimal digits"),
        (f"ann predict md5:{GOOD}", "sha256:"),
        (f"ann predict {GOOD}", "sha256:"),
        (f"ann sha256:{GOOD}", "three words"),
        (f"ann predict admin sha256:{GOOD}", "three words"),
        (f"ann root sha256:{GOOD}", "predict, admin or predict,admin"),
        (f"ann predict, sha256:{GOOD}", "predict, admin or predict,admin"),
        (f"{SECRET}/ predict sha256:{GOOD}", "letters"),
        (f"-ann predict sha256:{GOOD}", "begin with a letter"),
        (f"{'a' * 65} predict sha256:{GOOD}", "1 to 64"),
        (f"än predict sha256:{GOOD}", "letters"),
        (f"first admin sha256:{GOOD}", "name stands on a line above"),
        (f"second admin sha256:{OTHER}", "same key stands on a line above"),
    ],
)
def test_a_bad_line_is_told_by_its_number_and_never_shown(file: Path, line: str, right: str) -> None:
    file.write_text(f"# keys\nfirst predict sha256:{OTHER}\n\n{line}\n")
    with pytest.raises(SettingsError) as refused:
        read_keys(file)
    said = str(refused.value)
    assert said.startswith(f"--api-keys-file: line 4 of {file}: ")
    assert right in said
    assert not any(part in said for part in (SECRET, GOOD[:-1], OTHER))


def test_files_without_a_key(file: Path) -> None:
    for content, said in ((b"# none\n", "no key"), (b"", "no key"), (b"\xff\xfe\x00", "UTF-8")):
        file.write_bytes(content)
        with pytest.raises(SettingsError, match=said):
            read_keys(file)
    with pytest.raises(SettingsError, match="No such file"):
        read_keys(file.with_name("nowhere"))
    with pytest.raises(SettingsError, match="cannot be read"):
        read_keys(file.parent)


ANN, BOB = f"ann predict sha256:{GOOD}", f"bob predict sha256:{OTHER}"


def names(keys: KeyFile) -> list[str]:
    return [key.name for key in keys.keys]


def edit(file: Path, text: str) -> None:
    file.write_text(f"{text}\n")


def replace(file: Path, text: str) -> None:
    """By a file of the same size and time, as a tool may that keeps times."""
    before = file.stat()
    new = file.with_name("new")
    new.write_text(text)
    os.utime(new, ns=(before.st_atime_ns, before.st_mtime_ns))
    new.rename(file)


def turn(file: Path, text: str) -> None:
    """By a link that is turned to another file, as Kubernetes mounts secrets."""
    target, link = file.with_name("target"), file.with_name("link")
    target.write_text(text)
    link.symlink_to(target)
    link.rename(file)


@pytest.mark.parametrize("change", [edit, replace, turn])
def test_a_file_that_has_changed_is_read_again(file: Path, change: Callable[[Path, str], None]) -> None:
    file.write_text(ANN)
    keys = KeyFile(file)
    assert names(keys) == ["ann"]
    change(file, BOB)
    keys.refresh()
    assert names(keys) == ["bob"]


def test_a_file_that_has_not_changed_is_not_read_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text(ANN)
    keys = KeyFile(file)
    monkeypatch.setattr(service.keys, "read_keys", None)
    keys.refresh()
    assert names(keys) == ["ann"]


def test_a_broken_file_keeps_the_keys_and_says_why_once(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    file.write_text(ANN)
    keys = KeyFile(file)
    for broken, said in ((f"{ANN}\nbob predict {SECRET}", "line 2"), ("", "no key"), (None, "No such file")):
        caplog.clear()
        if broken is None:
            file.unlink()
        else:
            file.write_text(broken)
        keys.refresh()
        keys.refresh()
        assert names(keys) == ["ann"]
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert said in record.getMessage()
        assert SECRET not in caplog.text
    file.write_text(f"{ANN}\n{BOB}")
    keys.refresh()
    assert names(keys) == ["ann", "bob"]


def test_the_first_file_must_be_good(file: Path) -> None:
    with pytest.raises(SettingsError, match="No such file"):
        KeyFile(file)


def test_the_file_is_followed_off_the_event_loop(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text(ANN)
    keys = KeyFile(file)
    monkeypatch.setattr(service.keys, "LOOK_S", 0)
    read = threading.Event()

    def read_again(path: Path) -> tuple[Key, ...]:
        assert threading.current_thread() is not threading.main_thread()
        read.set()
        return read_keys(path)

    monkeypatch.setattr(service.keys, "read_keys", read_again)

    async def follow() -> None:
        following = asyncio.create_task(keys.follow())
        await asyncio.to_thread(read.wait, 60)
        following.cancel()

    file.write_text(f"{BOB}\n")
    asyncio.run(follow())
    assert names(keys) == ["bob"]
