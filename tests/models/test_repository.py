"""Which folders are models, and that the embedded one is there when no other is asked for."""

from pathlib import Path

import pytest

from service.models.repository import Entry, scan
from service.models.spec import read_spec
from service.settings import SettingsError


def test_folders_with_a_model_id_are_models_sorted(tmp_path: Path) -> None:
    names = ["b", "a", "B-2.x_y", "0", "x" * 64]
    for name in [*names, ".hidden", "_x", "-x", "with space", "x" * 65, "ünicode", "a\n"]:
        (tmp_path / name).mkdir()
    (tmp_path / "file").write_text("no folder")
    assert scan(tmp_path) == tuple(Entry(name, tmp_path / name) for name in sorted(names))


def test_a_repository_without_a_model_says_so_and_knows_a_model_given_for_it(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"has no folder that could be a model$"):
        scan(tmp_path)
    (tmp_path / "model.toml").write_text("")
    with pytest.raises(SettingsError, match=r"it is a model's folder itself: give the one above it$"):
        scan(tmp_path)


def test_a_linked_folder_is_a_model(tmp_path: Path) -> None:
    (tmp_path / "there" / "m").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "linked").symlink_to(tmp_path / "there" / "m")
    (tmp_path / "here" / "dangling").symlink_to(tmp_path / "nowhere")
    assert [entry.id for entry in scan(tmp_path / "here")] == ["linked"]


def test_a_repository_that_is_no_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"^--models: .*/none cannot be listed: No such file or directory$"):
        scan(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match=r"^--models: .*/file cannot be listed: Not a directory$"):
        scan(tmp_path / "file")


def test_the_embedded_default_is_the_contracts() -> None:
    (entry,) = scan(None)
    spec = read_spec(entry.folder)
    assert entry.id == "efficientnet_lite0"
    assert (spec.architecture, spec.weights, spec.labels) == ("timm:tf_efficientnet_lite0", "default", "imagenet-1k")
    assert spec.input.model_dump() == {
        "size": (224, 224),
        "fit": "crop",
        "resize": 256,
        "interpolation": "bicubic",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
    }
    assert (spec.type, spec.output.activation, spec.serving.precision) == ("classification", "logits", "fp32")
