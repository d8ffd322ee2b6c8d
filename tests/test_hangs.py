"""A test that hangs fails, and the suite goes on; what hangs for ever ends its process, so that no suite waits."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.threads import repeating

ROOT = Path(__file__).parent.parent


def suite(folder: Path, code: str, *options: str) -> subprocess.CompletedProcess[str]:
    """A suite of its own with this project's options of pytest."""
    (folder / "test_it.py").write_text(code)
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, *options, str(folder / "test_it.py")], cwd=folder, capture_output=True, text=True, timeout=120
    )


def test_a_test_that_waits_for_ever_fails_and_the_next_one_runs(tmp_path: Path) -> None:
    code = "import threading\n\n\ndef test_hangs():\n    threading.Event().wait()\n\n\ndef test_next():\n    pass\n"
    ended = suite(tmp_path, code, "-o", "timeout=1")
    assert "1 failed, 1 passed" in ended.stdout, ended.stdout + ended.stderr


def test_a_test_whose_executor_waits_for_ever_ends_its_process(tmp_path: Path) -> None:
    code = (
        "from concurrent.futures import ThreadPoolExecutor\nimport threading\n\n\n"
        "def test_hangs():\n    with ThreadPoolExecutor(1) as pool:\n        pool.submit(threading.Event().wait)\n"
        "        threading.Event().wait()\n"
    )
    ended = suite(tmp_path, code, "-o", "timeout=1", "-o", "faulthandler_timeout=3")
    assert ended.returncode != 0
    assert "most recent call first" in ended.stderr, ended.stdout + ended.stderr


def test_threads_end_with_a_block_that_fails() -> None:
    worked = threading.Event()

    def fail_beside() -> None:
        with repeating(worked.set, 2):
            assert worked.wait(60)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_beside()
    assert not [one for one in threading.enumerate() if "ThreadPoolExecutor" in one.name]


def test_what_repeated_work_raises_is_raised() -> None:
    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), repeating(fail):
        pass
