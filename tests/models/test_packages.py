"""A folder of packages that processes share: found, made once, dropped by use, and unharmed by what dies in it.

No torch here, nor in anything imported: each process that these tests spawn imports this file again.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import pytest

from service.models.packages import PackageStore, key_of

DIGEST_BYTES = 64
SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "home" / "packages"


def make(store: PackageStore, key: str, size: int = 10) -> Path:
    with store.making(key) as inside:
        (inside / "single.pt2").write_bytes(b"x" * size)
    package = store.find(key)
    assert package is not None
    return package


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()} - {"lock"}


def test_what_was_made_is_found(folder: Path) -> None:
    store = PackageStore(folder, 1000)
    assert store.find("one") is None
    with store.making("one") as inside:
        (inside / "single.pt2").write_bytes(b"single")
        (inside / "several.pt2").write_bytes(b"several")
        assert store.find("one") is None, "it is not finished"
    package = store.find("one")
    assert package is not None
    assert {file.name: file.read_bytes() for file in package.glob("*.pt2")} == {
        "single.pt2": b"single",
        "several.pt2": b"several",
    }
    assert store.find("on") is None
    assert PackageStore(folder, 1000).find("one") == package
    store.drop("one")
    assert store.find("one") is None
    store.drop("one")


@pytest.mark.parametrize("name", ["single.pt2", "digest"])
def test_a_package_with_one_flipped_bit_is_dropped(folder: Path, name: str) -> None:
    store = PackageStore(folder, 1000)
    file = make(store, "one") / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert store.find("one") is None
    assert names(folder) == set()
    assert make(store, "one"), "a new one is free"


@pytest.mark.parametrize("name", ["single.pt2", "digest"])
def test_a_package_without_one_of_its_files_is_dropped(folder: Path, name: str) -> None:
    store = PackageStore(folder, 1000)
    (make(store, "one") / name).unlink()
    assert store.find("one") is None


def test_an_exception_leaves_nothing(folder: Path) -> None:
    store = PackageStore(folder, 1000)
    with contextlib.suppress(ZeroDivisionError):
        with store.making("one") as inside:
            (inside / "single.pt2").write_bytes(b"half of i")
            raise ZeroDivisionError
        pytest.fail("the exception goes on")
    assert names(folder) == set()
    assert make(store, "one").name == "one"


def test_an_empty_package_is_none(folder: Path) -> None:
    store = PackageStore(folder, 1000)
    with store.making("one"):
        pass
    assert store.find("one") is None
    assert names(folder) == set()


def test_the_folder_is_made_for_its_user_alone(folder: Path) -> None:
    PackageStore(folder, 1000)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    PackageStore(folder, 1000)


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777, 0o1777])
def test_a_folder_that_others_may_write_is_refused(folder: Path, mode: int) -> None:
    make(PackageStore(folder, 1000), "one")
    folder.chmod(mode)
    with pytest.raises(PermissionError, match="others can write"):
        PackageStore(folder, 1000)
    folder.chmod(0o755)
    assert PackageStore(folder, 1000).find("one")


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
def test_a_folder_of_another_user_is_refused(folder: Path) -> None:
    folder.mkdir(parents=True, mode=0o700)
    os.chown(folder, 12345, -1)
    with pytest.raises(PermissionError, match="others can write"):
        PackageStore(folder, 1000)


def test_what_cannot_be_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "packages"):
        with pytest.raises(OSError, match="file"):
            PackageStore(path, 1000)


def test_the_least_recently_used_leave_when_there_is_too_much(folder: Path) -> None:
    store = PackageStore(folder, 30 + 3 * DIGEST_BYTES)
    for age, key in enumerate(["new", "old", "oldest"], start=1):
        os.utime(make(store, key), (0, 1_000_000 - age))
    assert names(folder) == {"new", "old", "oldest"}, "as much as there may be"
    assert store.find("oldest"), "it is used, and so the newest"
    make(store, "more")
    assert names(folder) == {"new", "oldest", "more"}
    make(store, "large", size=21 + 2 * DIGEST_BYTES)
    assert names(folder) == {"large"}, "nothing of ten bytes has room beside it"


def test_as_few_as_needed_leave(folder: Path) -> None:
    store = PackageStore(folder, 35 + 3 * DIGEST_BYTES)
    for age, key in enumerate("abc"):
        os.utime(make(store, key), (0, 1_000_000 + age))
    make(store, "d", size=15)
    assert names(folder) == {"b", "c", "d"}
    make(store, "e", size=6)
    assert names(folder) == {"c", "d", "e"}


def test_the_newest_is_kept_though_it_alone_is_too_much(folder: Path) -> None:
    store = PackageStore(folder, 5)
    make(store, "one")
    make(store, "other")
    assert names(folder) == {"other"}
    # The rename leaves a package the time of its last file: one older than the rest is not the first to go.
    with store.making("third") as inside:
        (inside / "single.pt2").write_bytes(b"x" * 10)
        os.utime(inside, (0, 0))
    assert names(folder) == {"third"}


def _make_when_told(folder: Path, key: str, pipe: Connection) -> None:
    """Make a package, telling of each step and waiting to be told to end."""
    store = PackageStore(folder, 1000)
    pipe.send("waits")
    with store.making(key) as inside:
        if store.find(key):
            pipe.send("found it")
            return
        (inside / "single.pt2").write_bytes(b"half")
        pipe.send("makes it")
        pipe.recv()
        (inside / "single.pt2").write_bytes(b"whole")
    pipe.send("made it")


@contextmanager
def spawned(work: Callable[..., None], folder: Path, key: str, *more: Any) -> Iterator[tuple[SpawnProcess, Connection]]:
    """A process at work in the folder, and the pipe to it."""
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=work, args=(folder, key, theirs, *more))
    process.start()
    theirs.close()
    try:
        yield process, ours
    finally:
        process.kill()
        process.join()
        process.close()
        ours.close()


def test_of_two_processes_one_makes_a_package_and_the_other_finds_it(folder: Path) -> None:
    with (
        spawned(_make_when_told, folder, "one") as (one, first),
        spawned(_make_when_told, folder, "one") as (other, second),
    ):
        assert [first.recv(), second.recv()] == ["waits", "waits"]
        faster = multiprocessing.connection.wait([first, second])[0]
        slower = second if faster is first else first
        assert isinstance(faster, Connection)
        assert faster.recv() == "makes it"
        assert not slower.poll(0.2), "only one is inside"
        faster.send("go on")
        assert faster.recv() == "made it"
        assert slower.recv() == "found it"
        one.join()
        other.join()
    assert names(folder) == {"one"}
    assert (folder / "one" / "single.pt2").read_bytes() == b"whole"


@pytest.mark.parametrize("next_key", ["one", "other"])
def test_a_process_that_is_killed_while_it_makes_one_blocks_and_poisons_nobody(folder: Path, next_key: str) -> None:
    with spawned(_make_when_told, folder, "one") as (process, pipe):
        assert [pipe.recv(), pipe.recv()] == ["waits", "makes it"]
        process.kill()
        process.join()
    store = PackageStore(folder, 1000)
    assert store.find("one") is None
    with store.making(next_key) as inside:
        assert list(inside.iterdir()) == []
        (inside / "single.pt2").write_bytes(b"whole")
    assert names(folder) == {next_key}, "nor does what it left stay for ever"
    assert (folder / next_key / "single.pt2").read_bytes() == b"whole"


def _try(folder: Path, key: str, pipe: Connection, number: int | None = None) -> None:
    """Load a package, and end by this signal or when told."""
    store = PackageStore(folder, 1000)
    assert store.find(key)
    with store.trying(key):
        pipe.send("loads it")
        if number is not None:
            os.kill(os.getpid(), number)
        pipe.recv()
    pipe.send("loaded it")


def dies_of(folder: Path, key: str, number: int = signal.SIGABRT) -> None:
    with spawned(_try, folder, key, number) as (process, pipe):
        assert pipe.recv() == "loads it"
        process.join()
        assert process.exitcode == -number


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE])
def test_a_package_that_crashes_the_process_which_loads_it_is_dropped(folder: Path, number: int) -> None:
    store = PackageStore(folder, 1000)
    make(store, "one")
    make(store, "other")
    dies_of(folder, "one", number)
    assert PackageStore(folder, 1000).find("other"), "it did nothing"
    assert PackageStore(folder, 1000).find("one") is None
    assert names(folder) == {"other"}, "nor is a mark left"
    assert make(store, "one") == store.find("one"), "a new one is free"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_who_is_killed_from_outside_while_it_loads_a_package_tells_nothing_of_it(folder: Path, number: int) -> None:
    store = PackageStore(folder, 1000)
    make(store, "one")
    for _ in range(3):
        dies_of(folder, "one", number)
    assert store.find("one")
    with store.trying("one"):
        pass
    assert names(folder) == {"one"}


def test_processes_load_a_package_together_and_one_that_crashes_is_noticed(folder: Path) -> None:
    store = PackageStore(folder, 1000)
    make(store, "one")
    with spawned(_try, folder, "one") as (living, first):
        assert first.recv() == "loads it"
        dies_of(folder, "one")
        first.send("go on")
        assert first.recv() == "loaded it"
        living.join()
    assert store.find("one") is None
    assert names(folder) == set()


def test_a_package_that_cannot_be_loaded_ends_nothing(folder: Path) -> None:
    store = PackageStore(folder, 1000)
    make(store, "one")
    with contextlib.suppress(ZeroDivisionError), store.trying("one"):
        assert len(names(folder)) == 2
        raise ZeroDivisionError
    assert store.find("one")
    assert names(folder) == {"one"}


PARTS = ("sha256:1", (("conv", True),), 2, "2.15.0", "x86_64")


@pytest.mark.parametrize(
    ("place", "other"),
    [
        (0, "sha256:2"),
        (1, (("conv", False),)),
        (1, (("conv2", True),)),
        (1, (("conv", True), ("conv2", True))),
        (2, 4),
        (2, "2"),
        (3, "2.15.1"),
        (4, "aarch64"),
    ],
)
def test_a_key_is_of_every_part(place: int, other: object) -> None:
    parts: list[object] = [*PARTS]
    assert key_of(*parts) == key_of(*PARTS)
    parts[place] = other
    assert key_of(*parts) != key_of(*PARTS)


def test_a_key_names_a_folder_and_keeps_its_parts_apart() -> None:
    keys = [key_of("ab", "c"), key_of("a", "bc"), key_of("ab\nc"), key_of("'ab'\n'c'"), key_of("c", "ab"), key_of()]
    assert len(set(keys)) == len(keys)
    assert all(len(key) == 32 and key.isalnum() for key in keys)
