"""What `explain` is asked on the command line: which pictures, which request, and which files."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.api.files import find_pictures, read_request
from service.errors import InvalidRequest
from service.settings import SettingsError

OUT = Path("maps")


def test_the_texts_are_read_as_a_forms_fields() -> None:
    texts = [
        ("method", "grad_cam"),
        ("method", "saliency"),
        ("target_classes", "282"),
        ("target_classes", "tabby"),
        ("gen_params", '{"scaling": "none"}'),
        ("format", "heatmap"),
        ("encoding", "webp"),
        ("size", "model"),
        ("colormap", "viridis"),
        ("alpha", "0.25"),
    ]
    request, ending = read_request(texts, OUT, 2)
    assert (request.methods, request.gen_params) == (("grad_cam", "saliency"), {"scaling": "none"})
    assert request.target_classes == ((282, "tabby"), (282, "tabby"))
    assert (request.format, request.encoding, request.size) == ("heatmap", "webp", "model")
    assert (request.colormap, request.alpha, request.as_base64) == ("viridis", 0.25, False)
    assert ending == ".webp"


def test_a_picture_may_have_classes_of_its_own() -> None:
    request, _ = read_request([("target_classes", "[[1], []]")], OUT, 2)
    assert request.target_classes == ((1,), ())
    with pytest.raises(InvalidRequest, match="2 lists for 3 pictures"):
        read_request([("target_classes", "[[1], []]")], OUT, 3)


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ([("colormap", "virids")], "/colormap: .*'viridis'"),
        ([("alpha", "2")], "/alpha: "),
        ([("alpha", "1"), ("alpha", "0")], "/alpha: The field is given twice"),
        ([("gen_params", "{")], "/gen_params: The text is no JSON"),
        ([("format", "pdf")], "/format: .*'overlay'"),
        ([("method", "a"), ("method", "a")], "/method: "),
    ],
)
def test_mistakes_are_told_as_over_http(texts: list[tuple[str, str]], said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        read_request(texts, OUT, 1)


@pytest.mark.parametrize(
    ("name", "fields", "format_", "encoding"),
    [
        ("map.png", {}, "overlay", "png"),
        ("map.JPEG", {"format": "heatmap"}, "heatmap", "jpeg"),
        ("map.webp", {"encoding": "webp"}, "overlay", "webp"),
        ("map.png", {"format": "gray16"}, "gray16", "png"),
        ("map.npy", {}, "npy", "png"),
    ],
)
def test_the_ending_of_a_file_says_the_format(
    tmp_path: Path, name: str, fields: dict[str, str], format_: str, encoding: str
) -> None:
    request, ending = read_request(fields.items(), tmp_path / name, 1)
    assert (request.format, request.encoding, ending) == (format_, encoding, "")


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("map.tiff", {}),
        ("map.png", {"format": "npy"}),
        ("map.npy", {"format": "gray"}),
        ("map.jpg", {"format": "gray"}),
        ("map.png", {"encoding": "webp"}),
        ("map.png", {"method": '["grad_cam", "saliency"]'}),
        ("map.png", {"target_classes": "[1, 2]"}),
    ],
)
def test_a_file_that_does_not_suit_is_refused(tmp_path: Path, name: str, fields: dict[str, str]) -> None:
    with pytest.raises(SettingsError, match=f"^--out: .*{name}"):
        read_request(fields.items(), tmp_path / name, 1)
    (tmp_path / name).mkdir()
    assert read_request(fields.items(), tmp_path / name, 1)[1], "a folder that is there takes all"


def test_two_pictures_do_not_go_to_one_file(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="2 are asked for; name a folder"):
        read_request([], tmp_path / "map.png", 2)


def test_the_pictures_of_a_folder_are_found(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.png", "notes.txt", "c.tiff", "deep/d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    alone = tmp_path / "notes.txt"
    assert find_pictures([alone, tmp_path]) == [alone, *(tmp_path / name for name in ("a.png", "b.JPG", "c.tiff"))]
    assert find_pictures([tmp_path / "nowhere.png"]) == [tmp_path / "nowhere.png"]


def test_a_folder_without_pictures_is_told(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(SettingsError, match=r"has no picture in it.*\.webp"):
        find_pictures([tmp_path])


def test_pictures_whose_heatmaps_would_have_the_same_names_are_refused(tmp_path: Path) -> None:
    for name in ("cat.png", "other/Cat.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for paths in ([tmp_path, tmp_path / "other"], [tmp_path / "cat.png", tmp_path / "other" / "Cat.jpg"]):
        with pytest.raises(SettingsError, match="would have the same names"):
            find_pictures(paths)
