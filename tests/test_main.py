"""The command line: what ends it, with which status and words, and what its commands write."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from service import __version__
from service.__main__ import FIELDS, main
from service.api.schemas import HeatmapFields
from service.keys import find_key, read_keys
from service.settings import option_of
from service.workers.devices import resolve
from tests.conftest import DATA, write_tiny


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m service`, as a user runs it."""
    return subprocess.run(
        [sys.executable, "-m", "service", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **environment},
    )


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What is said when a command ends with an error, run in this process."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert ended.value.code not in (0, None)
    said = ended.value.code if isinstance(ended.value.code, str) else capsys.readouterr().err
    assert "Traceback" not in said
    return said


def test_a_bad_value_ends_the_server_with_a_message() -> None:
    ended = command("serve", "--max-batch", "many", HEATMAP_PORT="nowhere")
    assert ended.returncode > 0
    assert ended.stdout == ""
    assert "--max-batch: " in ended.stderr
    assert "HEATMAP_PORT: " in ended.stderr
    assert "'many'" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_a_folder_of_models_that_is_missing_ends_the_server_with_a_message(tmp_path: Path) -> None:
    ended = command("serve", "--port", "0", "--models", str(tmp_path / "nowhere"), HEATMAP_PROT="1")
    assert ended.returncode > 0
    warning, message = ended.stderr.splitlines()
    assert "HEATMAP_PROT" in warning
    assert "'HEATMAP_PORT'" in warning
    assert "--models" in message
    assert str(tmp_path / "nowhere") in message


@pytest.mark.skipif(resolve("auto") != ("cpu",), reason="there is a CUDA device")
def test_a_device_that_is_missing_ends_the_server_with_a_message() -> None:
    ended = command("serve", "--port", "0", "--device", "cuda")
    assert ended.returncode > 0
    assert "--device: cuda was asked for" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "required: COMMAND"),
        (("sevre",), "invalid choice: 'sevre'"),
        (("serve", "--prot", "1"), "--prot"),
        (("serve", "--max-b", "1"), "--max-b"),
        (("serve", "--port"), "expected one argument"),
        (("explain", "-o", "map.png"), "PICTURE"),
        (("explain", "cat.png"), "-o"),
    ],
)
def test_a_wrong_command_line(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str) -> None:
    assert said in refusal(capsys, *arguments)


def test_a_wrong_setting_has_the_status_2_as_any_wrong_command_line() -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--port", "nowhere"])
    assert ended.value.code == 2


def test_version_is_the_one_that_is_installed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"heatmap-service {metadata.version('heatmap-service')}\n"


def test_openapi_prints_the_document(capsys: pytest.CaptureFixture[str]) -> None:
    main(["openapi"])
    document = json.loads(capsys.readouterr().out)
    assert document["openapi"].startswith("3.1")
    assert {"/models/{id}/heatmap", "/models/{id}/infer", "/methods", "/livez", "/readyz"} <= document["paths"].keys()


def test_key_prints_a_new_key_and_a_line_that_the_server_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = []
    for arguments, rights in ((["ann"], {"predict"}), (["bob", "--rights", "predict,admin"], {"predict", "admin"})):
        main(["key", *arguments])
        key, line = re.fullmatch(r"key:  (\S{43})\nline: (.+)\n", capsys.readouterr().out).groups()  # type: ignore[union-attr]
        assert key not in line
        made.append((key, line, arguments[0], rights))
    file = tmp_path / "keys"
    file.write_text("\n".join(line for _, line, _, _ in made))
    keys = read_keys(file)
    for key, _, name, rights in made:
        found = find_key(keys, key)
        assert found is not None
        assert (found.name, set(found.rights)) == (name, rights)
    assert made[0][0] != made[1][0]


@pytest.mark.parametrize("arguments", [("a b",), ("",), ("-",), ("ann", "--rights", "root"), ("a\nb",)])
def test_a_key_that_no_file_could_hold_is_not_made(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    said = refusal(capsys, "key", *arguments)
    assert "name" in said or "rights" in said
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("content", ["ann predict sha256:12", None])
def test_a_file_of_keys_that_is_none_ends_the_server_with_a_message(tmp_path: Path, content: str | None) -> None:
    if content:
        (tmp_path / "keys").write_text(content)
    ended = command("serve", "--port", "0", HEATMAP_API_KEYS_FILE=str(tmp_path / "keys"))
    assert ended.returncode == 2
    (message,) = ended.stderr.splitlines()
    assert message.startswith("heatmap-service: --api-keys-file: ")
    assert str(tmp_path / "keys") in message


@pytest.fixture(autouse=True)
def _logs_as_before() -> Iterator[None]:
    """A command that runs in this process configures its logs."""
    level = logging.getLogger("service").level
    yield
    logging.getLogger("service").setLevel(level)
    logging.captureWarnings(False)


@pytest.fixture
def models(tmp_path: Path) -> str:
    write_tiny(tmp_path / "models" / "tiny")
    return str(tmp_path / "models")


def test_explain_writes_a_heatmap_and_says_so(tmp_path: Path, models: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "map.png"
    main(["explain", str(DATA / "chelsea.png"), "-m", "grad_cam", "-o", str(out), "--models", models])
    assert out.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.endswith(f" -> {out}\n")


def test_explain_does_what_it_can_of_a_folder_and_names_what_failed(tmp_path: Path, models: str) -> None:
    pictures, out = tmp_path / "pictures", tmp_path / "maps"
    pictures.mkdir()
    for name in ("chelsea.png", "rocket.jpg"):
        (pictures / name).write_bytes((DATA / name).read_bytes())
    (pictures / "broken.png").write_bytes((DATA / "chelsea.png").read_bytes()[:1000])
    options = ["-m", "grad_cam", "-m", "saliency", "-c", "ant", "-c", "3", "-p", '{"scaling": "none"}', "-f", "npy"]
    ended = command("explain", str(pictures), "-o", str(out), "--models", models, *options)
    assert ended.returncode == 1
    names = {
        f"{one}-{method}-{label}.npy"
        for one in ("chelsea", "rocket")
        for method in ("grad_cam", "saliency")
        for label in ("0-ant", "3-dog")
    }
    assert {path.name for path in out.iterdir()} == names
    assert len(ended.stdout.splitlines()) == len(names)
    assert f"heatmap-service: {pictures / 'broken.png'}: " in ended.stderr
    assert ended.stderr.endswith("heatmap-service: 1 of 3 pictures failed\n")
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--colormap", "virids"], "'viridis'"),
        (["--gen-params", "{"], "/gen_params: The text is no JSON"),
        (["-f", "npy"], "--out: "),
        (["-m", "saliency", "-m", "grad_cm"], "name a folder"),
        (["-m", "grad_cm"], "Did you mean 'grad_cam'"),
        (["-c", "anr"], "Did you mean 'ant'"),
    ],
)
def test_explain_says_what_is_wrong_and_what_would_be_right(
    tmp_path: Path, models: str, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    out = tmp_path / "map.png"
    asked = ["explain", str(DATA / "chelsea.png"), "-o", str(out), "--models", models]
    assert said in refusal(capsys, *asked, *arguments)
    assert not out.exists()


def help_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--help"])
    assert ended.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_the_help_names_every_command_and_every_field_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    said = help_of(capsys)
    for name in ("serve", "explain", "openapi", "key"):
        assert f" {name} " in said
        assert help_of(capsys, name).startswith(f"usage: heatmap-service {name} ")
    said = help_of(capsys, "explain")
    left_out = {"target_classes", "top_k", "timeout_s", "priority", "result_format"}
    assert FIELDS.keys() - left_out == HeatmapFields.model_fields.keys() - left_out
    for name, field in HeatmapFields.model_fields.items():
        if name not in left_out:
            default = field.default[0] if isinstance(field.default, list) else field.default
            assert f"(default {default})" in FIELDS[name][2]
            assert f"{option_of(name)} {FIELDS[name][1]} {FIELDS[name][2]}" in said


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"heatmap-service {__version__}\n"


def test_explain_with_a_wrong_model_says_what_would_be_right(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture, out = str(DATA / "chelsea.png"), str(tmp_path / "map.png")
    said = refusal(capsys, "explain", picture, "-o", out, "--model", "efficientnet_lite")
    assert said.startswith("heatmap-service: ")
    assert "'efficientnet_lite0'" in said
    assert "--models" in refusal(capsys, "explain", picture, "-o", out, "--models", str(tmp_path / "nowhere"))
