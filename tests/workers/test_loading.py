"""Models whose load raises, exits or never ends."""

from __future__ import annotations

import asyncio
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
