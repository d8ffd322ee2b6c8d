"""Models that die or hang in the process that loads them, beside an honest one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import write_tiny
from tests.e2e.support import RAW, map_of, only
from tests.server import running

LOAD_S = 15

BUILDERS = {
    "endless": ("while True: pass", f"it was not loaded within {LOAD_S} seconds"),
    "exits": ("os._exit(0)", "the last ended with exit code 0"),
    "killed": ("os.kill(os.getpid(), signal.SIGKILL)", "the last was ended by signal 9"),
}


@pytest.mark.slow
def test_models_that_die_or_hang_at_load_are_given_up_and_the_honest_one_serves(tmp_path: Path, chelsea: bytes) -> None:
    for name, (line, _) in BUILDERS.items():
        write_tiny(tmp_path / "models" / name)
        code = f"import os, signal\n\n\ndef build():\n    {line}\n"
        (tmp_path / "models" / name / "net.py").write_text(code)
    write_tiny(tmp_path / "models" / "honest")
    options = ("--models", str(tmp_path / "models"), "--load-timeout-s", str(LOAD_S))
    with running(tmp_path, *options) as server, server.client() as client:  # which waits for /readyz
        assert map_of(only(client, chelsea, "honest", **RAW)).any()
        states = {model["id"]: model for model in client.get("/models").json()["models"]}
        assert {name: model["state"] for name, model in states.items()} == {
            "honest": "ready",
            **dict.fromkeys(BUILDERS, "failed"),
        }
        for name, (_, reason) in BUILDERS.items():
            assert reason in states[name]["reason"]
        assert client.get("/readyz").status_code == 200
