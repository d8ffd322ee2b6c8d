"""`explain` without a server: which files are written, what is said of them, and what is refused."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from service.errors import ModelFailed, ModelNotFound, ServiceError, UndecodablePicture, UnknownMethod
from service.models.repository import Entry
from service.settings import SettingsError
from service.workers import local
from service.workers.engine import Engine
from service.workers.loading import load_into
from service.workers.local import explain
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


def run(pictures: list[Path], out: Path, models: Path, method: str = "grad_cam", model: str | None = None) -> list[str]:
    return list(explain(pictures, method, out, models, model))


@pytest.mark.parametrize(
    ("name", "kind"), [("map.png", "PNG"), ("map.webp", "WEBP"), ("map.jpg", "JPEG"), ("deep/er/map.PNG", "PNG")]
)
def test_one_picture_goes_to_the_file(tmp_path: Path, models: Path, name: str, kind: str) -> None:
    (line,) = run([CHELSEA], tmp_path / name, models)
    with Image.open(tmp_path / name) as heatmap:
        assert (heatmap.format, heatmap.size) == (kind, (451, 300))
    assert line.startswith(f"{CHELSEA}: ")
    assert line.endswith(f" -> {tmp_path / name}")


def test_npy_holds_the_floats(tmp_path: Path, models: Path) -> None:
    run([CHELSEA], tmp_path / "map.npy", models)
    values = np.load(tmp_path / "map.npy")
    assert (values.dtype, values.shape) == (np.float32, (300, 451))
    assert (values.min(), values.max()) == pytest.approx((0, 1), abs=1e-6)
    assert values.std() > 0


def test_several_pictures_go_to_the_folder(tmp_path: Path, models: Path) -> None:
    lines = run([CHELSEA, COFFEE], tmp_path / "new" / "maps", models)
    files = [tmp_path / "new" / "maps" / name for name in ("chelsea.png", "coffee.png")]
    for line, file, size in zip(lines, files, [(451, 300), (600, 400)], strict=True):
        assert line.endswith(f" -> {file}")
        with Image.open(file) as heatmap:
            assert heatmap.size == size


def test_one_picture_goes_into_a_folder_that_is_there(tmp_path: Path, models: Path) -> None:
    (line,) = run([CHELSEA], tmp_path, models)
    assert line.endswith(f" -> {tmp_path / 'chelsea.png'}")


def test_a_picture_is_never_overwritten(tmp_path: Path, models: Path) -> None:
    picture = tmp_path / "chelsea.png"
    shutil.copy(CHELSEA, picture)
    for out in (tmp_path, picture):
        with contextlib.suppress(OSError, ServiceError):
            run([picture], out, models)
    assert picture.read_bytes() == CHELSEA.read_bytes()


def test_two_pictures_of_one_name_lose_neither_heatmap(tmp_path: Path, models: Path) -> None:
    for folder, source in (("a", CHELSEA), ("b", COFFEE)):
        (tmp_path / folder).mkdir()
        shutil.copy(source, tmp_path / folder / "picture.png")
    try:
        lines = run([tmp_path / folder / "picture.png" for folder in "ab"], tmp_path / "out", models)
    except (OSError, ServiceError):  # refused
        return
    assert len({line.rsplit(" -> ")[-1] for line in lines}) == 2


@pytest.mark.parametrize("name", ["map.tiff", "map.NPY"])
def test_an_ending_says_the_format_or_is_refused(tmp_path: Path, models: Path, name: str) -> None:
    with contextlib.suppress(OSError, ServiceError, SettingsError):
        run([CHELSEA], tmp_path / name, models)
    written = (tmp_path / name).read_bytes() if (tmp_path / name).exists() else b""
    assert not written.startswith(b"\x89PNG")


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


def test_a_picture_that_cannot_be_read(tmp_path: Path, models: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        run([tmp_path / "nowhere.png"], tmp_path / "map.png", models)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(UndecodablePicture):
        run([tmp_path / "text.png"], tmp_path / "map.png", models)


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
