"""The container set-up: what can be checked without a Docker engine."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.keys import make_key
from tests.server import running

ROOT = Path(__file__).parent.parent
COMPOSE = ROOT / "docker" / "compose.yaml"
KEYS = ROOT / "docker" / "compose.keys.yaml"
GPU = ROOT / "docker" / "compose.gpu.yaml"
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()


def compose_command() -> list[str] | None:
    if shutil.which("docker") and subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0:
        return ["docker", "compose"]
    return ["docker-compose"] if shutil.which("docker-compose") else None


def merged(*files: Path, **environment: str) -> Any:
    """The set-up that docker compose makes of the files."""
    command = compose_command()
    if command is None:
        pytest.skip("docker compose is not installed")
    options = [option for file in files for option in ("-f", str(file))]
    result = subprocess.run(
        [*command, *options, "config"], capture_output=True, text=True, env={**os.environ, **environment}
    )
    if result.returncode:
        raise RuntimeError(result.stderr)
    return yaml.safe_load(result.stdout)


def published(service: Any) -> list[str]:
    """Where a port is published, as versions of docker compose tell it: a text, or its parts."""
    return [
        port if isinstance(port, str) else f"{port.get('host_ip', '')}:{port['published']}" for port in service["ports"]
    ]


@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize("file", [COMPOSE, KEYS], ids=["insecure", "keys"])
def test_docker_compose_accepts_the_files(file: Path, gpu: bool) -> None:
    document = merged(file, *[GPU] * gpu, API_KEYS_FILE="/etc/keys")
    service = document["services"]["heatmap"]
    assert service["environment"]["HEATMAP_DEVICE"] == ("cuda" if gpu else "cpu")
    assert ("deploy" in service) == gpu
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]


def test_without_keys_it_says_so_aloud_and_publishes_on_the_loopback_address_only() -> None:
    (service,) = yaml.safe_load(COMPOSE.read_text())["services"].values()
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert service["environment"] == {"HEATMAP_INSECURE": "true"}
    (port,) = published(merged(COMPOSE, PORT="9000")["services"]["heatmap"])
    assert port.startswith("127.0.0.1:9000")


@pytest.mark.parametrize(("asked", "expected"), [("9000", ("9000", ":9000")), ("10.0.0.5:9000", ("10.0.0.5:9000",))])
def test_with_keys_they_come_from_a_secret_and_it_publishes_where_it_is_told(
    asked: str, expected: tuple[str, ...]
) -> None:
    document = merged(KEYS, API_KEYS_FILE="/etc/keys", PORT=asked)
    service = document["services"]["heatmap"]
    (secret,) = service["secrets"]
    name = secret if isinstance(secret, str) else secret["source"]
    assert document["secrets"][name]["file"] == "/etc/keys"
    assert service["environment"]["HEATMAP_API_KEYS_FILE"] == f"/run/secrets/{name}"
    assert "HEATMAP_INSECURE" not in service["environment"]
    (port,) = published(service)
    assert port.startswith(expected)


def test_with_keys_but_without_their_file_it_does_not_start() -> None:
    with pytest.raises(RuntimeError, match="API_KEYS_FILE"):
        merged(KEYS)


def image_command() -> list[str]:
    """What the image runs, on a free port."""
    command: list[str] = json.loads(re.findall(r"^CMD (.*)$", DOCKERFILE, re.MULTILINE)[-1])
    assert command[-2:] == ["--port", "8000"]
    return [*command[:-1], "0"]


def test_the_image_run_by_hand_needs_a_word_about_who_may_use_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "service", *image_command()]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert "HEATMAP_API_KEYS_FILE" in ended.stderr
    assert "HEATMAP_INSECURE=true" in ended.stderr
    (said,) = yaml.safe_load(COMPOSE.read_text())["services"]["heatmap"]["environment"].items()
    (tmp_path / "keys").write_text(make_key("ann", "predict")[1])
    for (variable, value), status in ((said, 200), (("HEATMAP_API_KEYS_FILE", str(tmp_path / "keys")), 401)):
        with running(tmp_path, *image_command()[1:], ready=False, **{variable: value}) as server:
            assert "//0.0.0.0:" in server.url
            with server.client() as client:
                assert client.get("/models").status_code == status


def test_the_image_runs_the_server_as_an_ordinary_user_with_a_health_check() -> None:
    final = DOCKERFILE.rpartition("\nFROM ")[2]
    lines = final.splitlines()
    assert "USER heatmap" in lines
    assert lines.index("USER heatmap") < next(i for i, line in enumerate(lines) if line.startswith("ENTRYPOINT"))
    assert "/readyz" in final[final.index("HEALTHCHECK") :]


def test_all_that_the_image_copies_is_sent_to_the_build() -> None:
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for line in DOCKERFILE.splitlines():
        if line.startswith("COPY ") and "--from" not in line:
            assert set(line.split()[1:-1]) <= sent
            assert all((ROOT / name).exists() for name in line.split()[1:-1])
