"""`explain` without a server: which files are written, what is said of them, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from service.api.files import read_request
from service.errors import (
    InvalidGenParams,
    ModelFailed,
    ModelNotFound,
    ServiceError,
    UndecodablePicture,
    UnknownClass,
    UnknownLayer,
    UnknownMethod,
)
from service.models.repository import Entry
from service.settings import SettingsError
from service.workers import local
from service.workers.engine import Engine
from service.workers.loading import load_into
from service.workers.local import Outcome, explain
from service.workers.messages import ModelInfo
from tests.conftest import DATA, TINY_CODE, write_tiny

CHELSEA, COFFEE = DATA / "chelsea.png", DATA / "coffee.png"

Load = Callable[[Engine, Entry], ModelInfo]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_tiny(folder / "tiny")
    return folder


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """The real loading, whose captured program is kept from test to test."""
    captured = tmp_path_factory.mktemp("captured")
    return lambda engine, entry: load_into(engine, entry, captured)


@pytest.fixture(autouse=True)
def _load_quickly(loaded: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "load_into", loaded)


def run(
    pictures: list[Path], out: Path, models: Path, method: str = "grad_cam", model: str | None = None, **fields: str
) -> dict[Path, Outcome]:
    """What is said of each picture."""
    request, ending = read_request([("method", method), *fields.items()], out, len(pictures))
    return dict(explain(request, pictures, out, ending, models, model))


def lines_of(outcome: Outcome) -> list[str]:
    assert not isinstance(outcome, Exception), outcome
    return outcome


def only(outcomes: dict[Path, Outcome]) -> str:
    """The only line that is said."""
    ((line,),) = map(lines_of, outcomes.values())
    return line


@pytest.mark.parametrize(
    ("name", "kind"), [("map.png", "PNG"), ("map.webp", "WEBP"), ("map.jpg", "JPEG"), ("deep/er/map.PNG", "PNG")]
)
def test_one_heatmap_goes_to_the_file(tmp_path: Path, models: Path, name: str, kind: str) -> None:
    line = only(run([CHELSEA], tmp_path / name, models))
    with Image.open(tmp_path / name) as heatmap:
        assert (heatmap.format, heatmap.size) == (kind, (451, 300))
    assert line.startswith(f"{CHELSEA}: grad_cam of ")
    assert line.endswith(f" -> {tmp_path / name}")


@pytest.mark.parametrize("name", ["map.npy", "map.NPY"])
def test_npy_holds_the_floats(tmp_path: Path, models: Path, name: str) -> None:
    run([CHELSEA], tmp_path / name, models)
    values = np.load(tmp_path / name)
    assert (values.dtype, values.shape) == (np.float32, (300, 451))
    assert (values.min(), values.max()) == pytest.approx((0, 1), abs=1e-6)
    assert values.std() > 0


def test_many_heatmaps_go_to_the_folder_by_clear_names(tmp_path: Path, models: Path) -> None:
    fields = {"target_classes": '["ant", 2]', "format": "npy", "gen_params": '{"scaling": "none"}', "size": "model"}
    outcomes = run([CHELSEA, COFFEE], tmp_path / "new" / "maps", models, '["grad_cam", "saliency"]', **fields)
    names = {
        f"{picture.stem}-{method}-{name}.npy"
        for picture in (CHELSEA, COFFEE)
        for method in ("grad_cam", "saliency")
        for name in ("0-ant", "2-cat")
    }
    assert {path.name for path in (tmp_path / "new" / "maps").iterdir()} == names
    lines = [line for outcome in outcomes.values() for line in lines_of(outcome)]
    assert {Path(line.rpartition(" -> ")[2]).name for line in lines} == names
    ant, cat = (np.load(tmp_path / "new" / "maps" / f"chelsea-grad_cam-{name}.npy") for name in ("0-ant", "2-cat"))
    assert ant.shape == cat.shape == (32, 32)
    assert not np.array_equal(ant, cat)
    assert ant.min() < 0  # not scaled


@pytest.mark.parametrize(
    ("fields", "kind", "ending"),
    [({}, "PNG", ".png"), ({"encoding": "jpeg"}, "JPEG", ".jpg"), ({"format": "gray16"}, "PNG", ".png")],
)
def test_files_in_a_folder_end_as_their_format_does(
    tmp_path: Path, models: Path, fields: dict[str, str], kind: str, ending: str
) -> None:
    file = Path(only(run([CHELSEA], tmp_path, models, **fields)).rpartition(" -> ")[2])
    assert (file.parent, file.suffix) == (tmp_path, ending)
    with Image.open(file) as heatmap:
        assert (heatmap.format, heatmap.size) == (kind, (451, 300))


def test_the_name_of_a_class_makes_no_other_path(tmp_path: Path) -> None:
    write_tiny(tmp_path / "models" / "tiny", labels="../../ant: a*b?\nbee\ncat\ndog\n" + "c" * 300 + "\n")
    run([CHELSEA], tmp_path / "maps", tmp_path / "models", target_classes="[0, 4]")
    names = sorted(path.name for path in (tmp_path / "maps").iterdir())
    assert names == ["chelsea-grad_cam-0-.._.._ant_a_b_.png", f"chelsea-grad_cam-4-{'c' * 40}.png"]


def test_a_picture_is_never_overwritten(tmp_path: Path, models: Path) -> None:
    picture = tmp_path / "chelsea.png"
    shutil.copy(CHELSEA, picture)
    (outcome,) = run([picture], picture, models).values()
    assert isinstance(outcome, FileExistsError)
    written = Path(only(run([picture], tmp_path, models)).rpartition(" -> ")[2])
    shutil.copy(CHELSEA, written)
    of_picture, of_written = run([picture, written], tmp_path, models).values()
    assert isinstance(of_picture, FileExistsError)
    assert lines_of(of_written)
    assert picture.read_bytes() == written.read_bytes() == CHELSEA.read_bytes()


def test_pictures_that_fail_leave_the_others(tmp_path: Path, models: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    pictures = [tmp_path / "nowhere.png", CHELSEA, tmp_path / "text.png", COFFEE]
    missing, chelsea, text, coffee = run(pictures, tmp_path / "maps", models).values()
    assert isinstance(missing, FileNotFoundError)
    assert "nowhere.png" in str(missing)
    assert isinstance(text, UndecodablePicture)
    files = [Path(line.rpartition(" -> ")[2]) for line in lines_of(chelsea) + lines_of(coffee)]
    assert sorted((tmp_path / "maps").iterdir()) == sorted(files)


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"target_classes": "anr"}, UnknownClass),
        ({"gen_params": '{"scalling": "none"}'}, InvalidGenParams),
        ({"gen_params": '{"target_conv_layer": "22"}'}, UnknownLayer),
    ],
)
def test_what_is_wrong_for_all_pictures_is_told_once(
    tmp_path: Path, models: Path, fields: dict[str, str], kind: type[ServiceError]
) -> None:
    with pytest.raises(kind):
        run([CHELSEA, COFFEE], tmp_path / "maps", models, **fields)
    assert not (tmp_path / "maps").exists()


def test_an_unknown_method_names_the_nearest(tmp_path: Path, models: Path) -> None:
    with pytest.raises(UnknownMethod, match=r"'grad_cm'.*Did you mean 'grad_cam'"):
        run([CHELSEA], tmp_path / "map.png", models, method="grad_cm")
    assert not (tmp_path / "map.png").exists()


def test_an_unknown_model_names_the_nearest(tmp_path: Path, models: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"'tinny'.*Did you mean 'tiny'"):
        run([CHELSEA], tmp_path / "map.png", models, model="tinny")


def test_of_several_models_one_must_be_named(tmp_path: Path) -> None:
    for name in ("tiny", "broken"):
        (tmp_path / "models" / name).mkdir(parents=True)
    with pytest.raises(ModelNotFound, match=r"--model: broken, tiny"):
        run([CHELSEA], tmp_path / "map.png", tmp_path / "models")
    with pytest.raises(ModelFailed, match=r"'broken'.*model.toml is missing"):
        run([CHELSEA], tmp_path / "map.png", tmp_path / "models", model="broken")


def test_a_folder_of_models_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"--models: .*nowhere"):
        run([CHELSEA], tmp_path / "map.png", tmp_path / "nowhere")


def test_a_map_that_misses_much_of_the_difference_of_the_scores_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A step has no gradient anywhere on the path."""
    write_tiny(tmp_path / "models" / "step")
    code = TINY_CODE.replace("nn.Flatten()", "Step(), nn.Flatten()")
    step = "\n\nclass Step(nn.Module):\n    def forward(self, x):\n        return x.sign()\n"
    (tmp_path / "models" / "step" / "net.py").write_text(code + step)
    with caplog.at_level("WARNING", "service.workers.local"):
        run([CHELSEA], tmp_path / "map.png", tmp_path / "models", "integrated_gradients")
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert record.getMessage() == f"{CHELSEA}: the map misses 100.0 % of the difference of the scores"
