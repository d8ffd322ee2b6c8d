"""The page of documentation in a browser that reaches nothing but the server."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.server import Server

CHROMIUM = shutil.which("chromium")
OPTIONS = (
    "--headless",
    "--no-sandbox",  # it refuses to run as root with one
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--enable-logging=stderr",
    "--virtual-time-budget=20000",
    "--dump-dom",
)


@pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")
def test_the_page_shows_every_operation_without_the_internet(server: Server, tmp_path: Path) -> None:
    url = f"{server.url}/docs#/inference/createHeatmaps"
    command = [str(CHROMIUM), *OPTIONS, f"--user-data-dir={tmp_path}", url]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert not re.findall(r".*CONSOLE.*", done.stderr)
    with server.client() as client:
        document = client.get("/openapi.json").json()
    for path, verbs in document["paths"].items():
        for verb, operation in verbs.items():
            assert f'id="operations-{operation["tags"][0]}-{operation["operationId"]}"' in done.stdout, (verb, path)
    assert 'data-property-name="target_classes"' in done.stdout, "the linked operation is open"
