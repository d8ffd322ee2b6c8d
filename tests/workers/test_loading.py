"""Models whose load raises, exits or never ends."""

from __future__ import annotations

import asyncio
import multiprocessing
import sys
from pathlib import Path

import pytest

from service.models.repository import Entry
from service.settings import Settings
from service.workers.device import Device
from service.workers.engine import Engine
from service.workers.loading import load_into
from service.workers.worker import Capture
from tests.conftest import write_tiny


def write_builder(folder: Path, line: str) -> Entry:
    write_tiny(folder)
    (folder / "net.py").write_text(f"import os, signal, sys\n\n\ndef build():\n    {line}\n")
    return Entry(folder.name, folder)


@pytest.mark.parametrize("line", ["sys.exit(0)", "raise KeyboardInterrupt", "raise BaseException('enough')"])
def test_a_builder_may_raise_anything(line: str, tmp_path: Path) -> None:
    entry = write_builder(tmp_path / "odd", line)
    settings = Settings()
    engine = Engine(Device("cpu", None, settings.max_batch), settings)
    try:
        assert load_into(engine, entry).state == "failed"
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("line", "timeout_s", "words", "died"),
    [
        ("os._exit(0)", 60, "exit code 0", True),
        ("os.kill(os.getpid(), signal.SIGKILL)", 60, "signal 9", True),
        ("\n    while True: pass", 5, "not loaded within 5 seconds", False),
    ],
)
def test_a_capture_that_dies_or_never_ends_says_why(
    line: str, timeout_s: float, words: str, died: bool, tmp_path: Path
) -> None:
    entry = write_builder(tmp_path / "odd", line)
    capture = Capture(entry, "cpu", tmp_path, timeout_s)
    reason = asyncio.run(asyncio.to_thread(capture.run))
    assert words in str(reason)
    assert capture.died is died


@pytest.mark.parametrize("line", ["sys.exit(0)", "raise BaseException('enough')"])
def test_what_a_builder_raises_is_for_the_load_to_say(line: str, tmp_path: Path) -> None:
    capture = Capture(write_builder(tmp_path / "odd", line), "cpu", tmp_path, 60)
    assert capture.run() is None


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no process is forked from a template")
@pytest.mark.parametrize("start", ["forkserver", "spawn"])
def test_a_process_that_is_killed_while_it_captures_leaves_no_semaphore(
    start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.fx runs a graph beside a bar of tqdm, whose lock is a semaphore with a name, unlike after a fork."""
    code = """
    import gc, torch
    from multiprocessing.synchronize import SemLock
    torch.fx.Interpreter(torch.fx.symbolic_trace(torch.nn.ReLU())).run(torch.zeros(1))
    with open(os.path.dirname(__file__) + "/semaphores", "w") as file:
        locks = [each._semlock for each in gc.get_objects() if isinstance(each, SemLock)]
        file.writelines(lock.name for lock in locks if lock.name)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    entry = write_builder(tmp_path / "odd", code.strip())
    monkeypatch.setattr("service.workers.worker._context", lambda _device: multiprocessing.get_context(start))
    capture = Capture(entry, "cpu", tmp_path, 60)
    assert "signal 9" in str(capture.run())
    assert (tmp_path / "odd" / "semaphores").read_text() == ""
