"""What README promises is true: its commands run, and its tables are complete."""

from __future__ import annotations

import re
import runpy
import subprocess
from pathlib import Path

import httpx
import numpy as np
import pytest

import service.methods  # noqa: F401  (registers the methods)
from service.explain.method import REGISTRY, WeightedCamParams
from service.settings import Settings
from tests.server import Server

ROOT = Path(__file__).parent.parent
SHARED = WeightedCamParams.model_fields
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if not line.startswith("#")
]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The repository's folders, in a place where commands may write."""
    for name in ("tests", "docker", ".venv"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


@pytest.mark.parametrize("command", [one for one in COMMANDS if "curl" in one and "<key>" not in one])
def test_each_curl_answers(command: str, server: Server, checkout: Path) -> None:
    command = command.replace("http://127.0.0.1:8000", server.url).replace("curl ", "curl --fail-with-body -sS ")
    result = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=checkout, capture_output=True)
    assert result.returncode == 0, result.stdout[:500] + result.stderr
    answer = (checkout / "heatmap.png").read_bytes() if "-o heatmap.png" in command else result.stdout
    assert answer.startswith(b"\x89PNG" if "-o heatmap.png" in command else b'{"model_id"')


def test_the_command_line_writes_a_heatmap(checkout: Path) -> None:
    (command,) = [command for command in COMMANDS if "heatmap-service" in command]
    subprocess.run(["bash", "-c", command], cwd=checkout, check=True, capture_output=True)
    assert (checkout / "heatmap.png").read_bytes().startswith(b"\x89PNG")


def test_every_other_command_is_make_or_docker_compose_over_files_that_exist() -> None:
    others = [command for command in COMMANDS if "curl" not in command and "heatmap-service" not in command]
    assert "make serve" in others
    assert "make test" in others
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for command in others:
        words = command.removeprefix("API_KEYS_FILE=/path/to/keys ").split()
        assert words[0] == "make" or words[:2] == ["docker", "compose"]
        assert all(target in targets for target in words[1:] if words[0] == "make")
        assert all((ROOT / word).is_file() for word in words if word.endswith(".yaml"))


def test_the_pictures_are_there() -> None:
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", README)
    assert pictures
    assert all((ROOT / picture).is_file() for picture in pictures)


def settings_table() -> str:
    rows = ["| option | default | meaning |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = "" if field.default in (None, ()) else f"`{field.default}`"
        rows.append(f"| `--{name.replace('_', '-')}` | {default} | {field.description} |")
    return "\n".join(rows)


def test_every_setting_is_listed() -> None:
    listed = README.partition("<!-- settings -->\n")[2].partition("\n<!-- /settings -->")[0]
    assert listed == settings_table()


def methods_table() -> str:
    rows = ["| method | what it shows | cost | own parameters |", "|---|---|---|---|"]
    for name, method in sorted(REGISTRY.items()):
        fields = {key: field.default for key, field in method.Params.model_fields.items() if key not in SHARED}
        own = ", ".join(f"`{key}` {'null' if default is None else default}" for key, default in fields.items())
        rows.append(f"| [`{name}`]({method.paper}) | {method.description} | {method.cost} | {own} |")
    return "\n".join(rows)


def test_every_method_is_listed() -> None:
    listed = README.partition("<!-- methods -->\n")[2].partition("\n<!-- /methods -->")[0]
    assert listed == methods_table()


def test_the_gallery_can_be_drawn_again() -> None:
    gallery = runpy.run_path(str(ROOT / ".readme" / "gallery.py"))
    sheet = gallery["montage"]({"the picture": gallery["picture"](), **gallery["overlays"](["cam", "saliency"])})
    assert gallery["PARAMS"].keys() <= REGISTRY.keys()
    assert len(np.unique(np.asarray(sheet)[:, gallery["SIDE"] : 2 * gallery["SIDE"]].reshape(-1, 3), axis=0)) > 1000


def test_every_endpoint_is_named(client: httpx.Client) -> None:
    for path, verbs in client.get("/openapi.json").json()["paths"].items():
        for verb in verbs:
            assert f"`{verb.upper()} {path}" in README, (verb, path)
