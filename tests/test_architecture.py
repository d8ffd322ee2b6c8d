"""What holds the house together and that no import contract can say."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

IMPORTS = """
import sys
import service.__main__, service.app, service.workers.entry
from service.settings import Settings
service.app.create_app(Settings())
print(sorted({"torch", "torchvision", "timm"} & sys.modules.keys()))
"""


def test_the_server_s_process_never_imports_torch() -> None:
    ran = subprocess.run([sys.executable, "-c", IMPORTS], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    "target",
    ["serve", "test", "install", "check", "bench", "soak"],
)
def test_make_has_the_targets_of_the_contract(target: str) -> None:
    ran = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert target in re.findall(r"\S+", (ROOT / "Makefile").read_text().partition(".PHONY:")[2].partition("\n")[0])


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_the_port_can_be_moved() -> None:
    ran = subprocess.run(
        ["make", "--dry-run", "serve", "PORT=9000"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "--port 9000" in ran.stdout


def test_ci_runs_what_a_person_runs_and_nothing_else() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    lines = [line.strip() for line in script.read_text().splitlines()]
    commands = [line for line in lines if line and not line.startswith(("#", "set ", "cd "))]
    assert commands == [".ci/tools", "make check", "make test"]
    assert any(re.match(r"set -e", line) for line in lines), "the first failure ends it"
