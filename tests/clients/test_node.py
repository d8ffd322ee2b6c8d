"""What runs with Node: TypeScript clients, generated from the committed document, call a server; a linter reads it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.support import post
from tests.server import Server
from tests.told import OPENAPI

SOURCES = Path(__file__).parent / "node"
DATA = Path(__file__).parents[1] / "data"
DOCUMENT = str(OPENAPI / "openapi.json")
QUIET = {"NO_COLOR": "1", "REDOCLY_TELEMETRY": "off", "REDOCLY_SUPPRESS_UPDATE_NOTICE": "true"}

PATH = os.pathsep.join((os.environ["PATH"], str(Path(sys.executable).parent)))  # the extra `node` brings it

pytestmark = pytest.mark.skipif(not shutil.which("npm", path=PATH), reason="Node is not installed: there is no npm")

Run = Callable[..., str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run a command in a copy of the sources beside the packages that their lock file names; return what it printed."""
    folder = tmp_path_factory.mktemp("node")
    for file in SOURCES.iterdir():
        if file.is_file():
            shutil.copy(file, folder)

    def run(*command: str) -> str:
        path = os.pathsep.join((str(folder / "node_modules" / ".bin"), PATH))
        environment = {**os.environ, **QUIET, "PATH": path}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("npm", "ci", "--ignore-scripts")
    return run


@pytest.fixture(scope="module")
def built(run: Run) -> Run:
    """The same, after both clients are generated and compiled."""
    said = run("openapi-typescript", DOCUMENT, "-o", "generated/openapi-typescript.ts")
    said += run("openapi-ts", "-i", DOCUMENT, "-o", "generated/hey-api", "-c", "@hey-api/client-fetch")
    assert "warn" not in said.lower(), said
    run("tsc", "--project", ".")
    return run


@pytest.fixture(scope="module")
def best(server: Server, chelsea: bytes) -> int:
    """The class that the server sees in the picture."""
    with server.client() as client:
        class_id: int = post(client, chelsea, endpoint="infer").json()["results"][0]["classes"][0]["class_id"]
    return class_id


def called(run: Run, script: str, server: Server) -> Any:
    return json.loads(run("node", f"built/{script}.js", server.url, str(DATA / "chelsea.png")))


def test_a_client_by_openapi_typescript(built: Run, server: Server, best: int) -> None:
    """Heatmaps by form, JSON and as DLResult, classes, an error."""
    assert called(built, "openapi_fetch", server) == [best, 1, best, best, "unknown_method"]


def test_a_client_by_hey_api(built: Run, server: Server, best: int) -> None:
    """Heatmaps by JSON and as DLResult, classes, an error."""
    assert called(built, "hey_api", server) == [1, best, best, "unknown_method"]


def test_the_linter_has_nothing_to_say(run: Run) -> None:
    found = json.loads(run("redocly", "lint", "--format", "json", DOCUMENT))
    assert found["totals"] == {"errors": 0, "warnings": 0, "ignored": 0}, found["problems"]
