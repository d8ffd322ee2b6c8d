"""What README and the documents promise is true: commands run, answers match, tables are complete, links lead on."""

from __future__ import annotations

import base64
import io
import json
import re
import runpy
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import httpx
import numpy as np
import pytest
import pytorch_grad_cam
from pydantic import BaseModel

import service.methods  # noqa: F401  (registers the methods)
from service.api.record import outcome
from service.api.schemas import HeatmapFields
from service.errors import ServiceError
from service.explain.method import REGISTRY, WeightedCamParams
from service.explain.trace import Trace
from service.imaging.colormaps import COLORMAPS
from service.settings import Settings
from tests.documents import COMMANDS, DOCUMENTS, ROOT, Command, anchors, blocks, files, lines_of, links, marked, matches
from tests.documents import table as rows_of
from tests.server import Server, running

URL = "http://127.0.0.1:8000"
API, METHODS, MODELS, OPERATION = (f"docs/{name}.md" for name in ("api", "methods", "own-models", "operation"))
HALCON, PEERS = "docs/halcon.md", "docs/from-pytorch-grad-cam-and-keras-vis.md"
SHARED = WeightedCamParams.model_fields
MAGIC = {".png": b"\x89PNG", ".webp": b"RIFF"}
CURLS = [one for one in COMMANDS if "curl" in one.line and "<key>" not in one.line and one.document != MODELS]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The repository's folders, in a place where commands may write."""
    for name in ("tests", "docker", ".venv"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def run(line: str, folder: Path, url: str = URL) -> subprocess.CompletedProcess[bytes]:
    """A command as a reader would run it, where curl fails as the server does."""
    line = line.replace(URL, url).replace("curl ", "curl --fail-with-body -sS ")
    return subprocess.run(["bash", "-o", "pipefail", "-c", line], cwd=folder, capture_output=True, timeout=120)


@pytest.mark.parametrize("command", CURLS, ids=lambda command: command.document)
def test_each_curl_gets_its_answer(command: Command, server: Server, checkout: Path) -> None:
    result = run(command.line, checkout, server.url)
    refused = command.answer is not None and "code" in command.answer
    assert (result.returncode != 0) == refused, result.stdout[:500] + result.stderr
    if written := re.search(r" -o (\S+)$", command.line):
        file = checkout / written[1]
        assert file.read_bytes().startswith(MAGIC[file.suffix])
    elif command.answer is None:
        assert json.loads(result.stdout)["model_id"] == "efficientnet_lite0"
    else:
        assert matches(command.answer, json.loads(result.stdout)), result.stdout[:2000]


def test_readme_shows_an_answer_and_an_error() -> None:
    answers = [command.answer for command in COMMANDS if command.document == "README.md" and command.answer]
    assert ["results" in answer for answer in answers] == [True, False]
    assert ["code" in answer for answer in answers] == [False, True]


@pytest.mark.skipif(shutil.which("node") is None, reason="Node is not installed")
def test_the_script_of_a_page_shows_a_heatmap(server: Server, checkout: Path) -> None:
    (script,) = blocks("README.md", "js")
    page = """
        import { readFileSync } from "node:fs";
        const file = new Blob([readFileSync("tests/data/chelsea.png")]);
        const img = {};
    """
    program = f"{page}\n{script.replace(URL, server.url)}\nconsole.log(img.src);"
    node = ["node", "--input-type=module", "--eval", program]
    said = subprocess.run(node, cwd=checkout, check=True, capture_output=True, text=True, timeout=120).stdout
    kind, _, data = said.partition(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(data).startswith(MAGIC[".png"])


def test_the_command_line_writes_a_heatmap(checkout: Path) -> None:
    (command,) = [command for command in COMMANDS if "heatmap-service explain" in command.line]
    result = run(command.line, checkout)
    assert result.returncode == 0, result.stderr
    assert (checkout / "heatmap.png").read_bytes().startswith(MAGIC[".png"])


def test_the_worked_model_sees_the_spot_where_it_is(tmp_path: Path) -> None:
    (tmp_path / ".venv").symlink_to(ROOT / ".venv")
    for name, text in files(MODELS).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    train, serve, ask = (command.line for command in COMMANDS if command.document == MODELS)
    trained = run(train, tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert serve == ".venv/bin/heatmap-service serve --models models"
    with running(tmp_path, "--models", str(tmp_path / "models")) as server:
        result = run(ask, tmp_path, server.url)
        assert result.returncode == 0, result.stdout
        assert (tmp_path / "heatmap.png").read_bytes().startswith(MAGIC[".png"])
        floats = ask.replace("image/png", "application/x-npy").partition(" -o ")[0]
        heat = np.load(io.BytesIO(run(floats, tmp_path, server.url).stdout))
    y, x = np.unravel_index(heat.argmax(), heat.shape)
    assert 8 <= y < 24
    assert 40 <= x < 56


def test_every_other_command_is_make_or_docker_over_files_that_exist() -> None:
    others = [one.line for one in COMMANDS if "curl" not in one.line and not one.line.startswith(".venv/bin/")]
    assert "make serve" in others
    assert "make test" in others
    for command in others:
        words = command.removeprefix("API_KEYS_FILE=/path/to/keys ").split()
        assert words[0] == "make" or words[:2] in (["docker", "compose"], ["docker", "run"])
        assert all((ROOT / word).is_file() for word in words if word.endswith(".yaml"))
        assert {name.lower() for name in re.findall(r"HEATMAP_(\w+)=", command)} <= Settings.model_fields.keys()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_target_of_make_exists(document: str) -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"(?:`|^)make ([a-z]+)", DOCUMENTS[document], re.MULTILINE)) <= set(targets)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_leads_to_a_file_and_a_heading(document: str) -> None:
    for link in links(document):
        path, _, anchor = link.partition("#")
        target = ((ROOT / document).parent / path).resolve() if path else ROOT / document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.relative_to(ROOT).as_posix()), link


def test_readme_is_short_and_leads_to_every_document() -> None:
    assert len(DOCUMENTS["README.md"].split()) <= 900
    documents = {name for name in DOCUMENTS if name not in ("README.md", "benchmarks/README.md")}
    assert documents <= {link.partition("#")[0] for link in links("README.md")}


def test_the_pictures_are_there() -> None:
    assert [link for link in links("README.md") if link.endswith(".webp")]
    assert f"[{len(REGISTRY)} heatmap methods]({METHODS})" in DOCUMENTS["README.md"].replace("\n", " ")


def test_every_setting_is_listed() -> None:
    rows = [
        (
            f"`--{name.replace('_', '-')}`",
            "" if field.default in (None, ()) else f"`{field.default}`",
            str(field.description),
        )
        for name, field in Settings.model_fields.items()
    ]
    assert marked(OPERATION, "settings") == lines_of(("option", "default", "meaning"), rows)


def own_parameters(params: type[BaseModel]) -> str:
    fields = {key: field.default for key, field in params.model_fields.items() if key not in SHARED}
    return ", ".join(f"`{key}` {'null' if default is None else default}" for key, default in fields.items())


def test_every_method_is_listed() -> None:
    rows = [
        (f"[`{name}`]({method.paper})", method.description, method.cost, own_parameters(method.Params))
        for name, method in sorted(REGISTRY.items())
    ]
    assert marked(METHODS, "methods") == lines_of(("method", "what it shows", "cost", "own parameters"), rows)


def errors(kind: type[ServiceError] = ServiceError) -> Iterator[type[ServiceError]]:
    """The error tree."""
    yield kind
    for below in kind.__subclasses__():
        if below.__module__.startswith("service."):
            yield from errors(below)


def test_every_error_is_listed() -> None:
    rows = sorted((str(kind.status), f"`{kind.code}`", kind.title) for kind in errors())
    assert marked(API, "errors") == lines_of(("status", "code", "meaning"), rows)


def test_every_field_is_listed_with_its_default_and_values() -> None:
    rows = rows_of(API, "field", "default", "meaning")
    fields = HeatmapFields.model_fields
    assert {name.strip("`") for name, _, _ in rows} == fields.keys()
    for name, default, meaning in rows:
        field = fields[name.strip("`")]
        if default.startswith("`"):
            value = ", ".join(field.default) if isinstance(field.default, list) else str(field.default)
            assert default.strip("`") == value
        values = COLORMAPS if name == "`colormap`" else get_args(field.annotation)
        assert all(f"`{value}`" in meaning for value in values if isinstance(value, str)), name


def test_every_shared_parameter_is_listed_with_its_default() -> None:
    rows = rows_of(API, "parameter", "default", "meaning")
    assert {name.strip("`") for name, _, _ in rows} == SHARED.keys()
    for name, default, _ in rows:
        if default.startswith("`"):
            assert default.strip("`") == json.dumps(SHARED[name.strip("`")].default).strip('"')


def test_every_key_of_a_heatmap_is_listed() -> None:
    shown = next(command.answer for command in COMMANDS if command.document == "README.md" and command.answer)
    (heatmap,) = shown["results"][0]["heatmaps"]
    assert [key.strip("`") for key, _ in rows_of(API, "key", "meaning")] == list(heatmap)


def test_every_endpoint_is_listed(client: httpx.Client) -> None:
    listed = [endpoint.strip("`") for endpoint, _ in rows_of(API, "endpoint", "answers")]
    paths = client.get("/openapi.json").json()["paths"]
    for path, verbs in paths.items():
        for verb in verbs:
            assert f"{verb.upper()} {path}" in listed


def requests_in(document: str) -> list[dict[str, Any]]:
    """The fields that the tables of a document show as JSON."""
    cells = re.findall(r"\| `(\{.*?\})` \|$", DOCUMENTS[document], re.MULTILINE)
    return [json.loads(cell) for cell in cells]


@pytest.mark.parametrize("fields", requests_in(PEERS), ids=str)
def test_every_request_of_a_peers_call_is_valid(fields: dict[str, Any]) -> None:
    request = HeatmapFields.model_validate(fields, strict=True)
    for method in request.method:
        REGISTRY[method].Params.model_validate(request.gen_params)


def test_every_class_of_pytorch_grad_cam_has_its_method() -> None:
    rows = rows_of(PEERS, "class", "`method`")
    assert rows
    for theirs, ours in rows:
        assert hasattr(pytorch_grad_cam, theirs.strip("`"))
        assert ours.strip("`") in REGISTRY


def test_every_parameter_of_halcon_has_its_field() -> None:
    text = " ".join(ours for _, ours in rows_of(HALCON, "`gen_dl_model_heatmap`", "here"))
    params = set(re.findall(r"gen_params\.(\w+)", text))
    assert params == {"target_conv_layer", "use_conv_only", "scaling"}
    assert params <= SHARED.keys()
    fields = {"method", "target_classes", "gen_params", "result_format"}
    assert fields <= HeatmapFields.model_fields.keys()
    assert all(f"`{field}`" in text for field in fields)


def test_every_key_of_a_dl_result_is_what_the_server_answers(client: httpx.Client, chelsea: bytes) -> None:
    data = {"result_format": "dl_result", "method": ["grad_cam", "guided_grad_cam"], "target_classes": "285"}
    answer = client.post("/models/efficientnet_lite0/heatmap", data=data, files={"image": chelsea})
    (result,) = answer.json()["results"]
    rows = rows_of(HALCON, "key", "value")
    assert [key.strip("`") for key, _ in rows] == list(result)
    for key, value in rows[3:]:
        assert all(f"`{name}`" in value for name in result[key.strip("`")])


def test_every_variable_of_the_containers_is_one_of_theirs() -> None:
    rows = rows_of(OPERATION, "variable", "what it does")
    used = "".join(path.read_text() for path in (ROOT / "docker").glob("*.yaml"))
    assert all(f"${{{variable.strip('`').partition('=')[0]}:-" in used for variable, _ in rows)


def test_every_outcome_of_a_request_is_listed() -> None:
    states: list[dict[str, object]] = [
        {"status": 200},
        {"status": 422, "code": "unknown_class"},
        {"status": 500, "code": "internal_error"},
        {"status": 504, "code": "deadline_exceeded"},
        {},
    ]
    assert [name.strip("`") for name, _ in rows_of(OPERATION, "outcome", "meaning")] == list(map(outcome, states))


def test_what_a_method_reads_is_there() -> None:
    names = re.findall(r"`(\w+)`", " ".join(row[0] for row in rows_of("docs/adding-a-method.md", "`trace.`", "is")))
    assert len(names) > 10
    assert all(hasattr(Trace, name) for name in names)


def test_the_gallery_can_be_drawn_again() -> None:
    gallery = runpy.run_path(str(ROOT / "docs" / "pictures" / "gallery.py"))
    sheet = gallery["montage"]({"the picture": gallery["picture"](), **gallery["overlays"](["cam", "saliency"])})
    assert gallery["PARAMS"].keys() <= REGISTRY.keys()
    assert len(np.unique(np.asarray(sheet)[:, gallery["SIDE"] : 2 * gallery["SIDE"]].reshape(-1, 3), axis=0)) > 1000
