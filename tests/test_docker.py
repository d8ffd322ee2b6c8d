"""The container set-up: what can be checked without a Docker engine."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
COMPOSE = ROOT / "docker" / "compose.yaml"
GPU = ROOT / "docker" / "compose.gpu.yaml"


def compose_command() -> list[str] | None:
    if shutil.which("docker") and subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0:
        return ["docker", "compose"]
    return ["docker-compose"] if shutil.which("docker-compose") else None


@pytest.mark.parametrize("files", [(COMPOSE,), (COMPOSE, GPU)], ids=["cpu", "gpu"])
def test_docker_compose_accepts_the_files(files: tuple[Path, ...]) -> None:
    command = compose_command()
    if command is None:
        pytest.skip("docker compose is not installed")
    options = [option for file in files for option in ("-f", str(file))]
    result = subprocess.run([*command, *options, "config"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    merged = yaml.safe_load(result.stdout)["services"]["heatmap"]
    assert merged["environment"]["HEATMAP_DEVICE"] == ("cuda" if GPU in files else "cpu")
    assert ("deploy" in merged) == (GPU in files)


def test_compose_publishes_on_the_loopback_address_only() -> None:
    (service,) = yaml.safe_load(COMPOSE.read_text())["services"].values()
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])


def test_the_image_runs_the_server_as_an_ordinary_user_with_a_health_check() -> None:
    final = (ROOT / "docker" / "Dockerfile").read_text().rpartition("\nFROM ")[2]
    lines = final.splitlines()
    assert "USER heatmap" in lines
    assert lines.index("USER heatmap") < next(i for i, line in enumerate(lines) if line.startswith("ENTRYPOINT"))
    assert "/readyz" in final[final.index("HEALTHCHECK") :]


def test_all_that_the_image_copies_is_sent_to_the_build() -> None:
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for line in (ROOT / "docker" / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY ") and "--from" not in line:
            assert set(line.split()[1:-1]) <= sent
            assert all((ROOT / name).exists() for name in line.split()[1:-1])
