"""A model.toml is read as the contract describes it, or refused with a reason that names the key."""

import subprocess
import sys
from pathlib import Path

import pytest

from service.errors import ModelLoadError
from service.models.labels import read_labels
from service.models.spec import ModelSpec, file_in, read_spec

MINIMAL = 'architecture = "torchvision:resnet50"\nweights = "random:0"\n'


def spec_of(folder: Path, text: str) -> ModelSpec:
    (folder / "model.toml").write_text(text)
    return read_spec(folder)


def reason_of(folder: Path, text: str) -> str:
    with pytest.raises(ModelLoadError) as caught:
        spec_of(folder, text)
    return str(caught.value)


def test_every_default_is_the_contracts(tmp_path: Path) -> None:
    assert spec_of(tmp_path, MINIMAL).model_dump() == {
        "architecture": "torchvision:resnet50",
        "weights": "random:0",
        "labels": "class <id>",
        "type": "classification",
        "architecture_args": {},
        "input": {
            "size": (224, 224),
            "fit": "crop",
            "resize": 256,
            "interpolation": "bilinear",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
        },
        "output": {"activation": "logits", "confidence": None},
        "serving": {"precision": "fp32"},
    }


def test_every_key_is_read(tmp_path: Path) -> None:
    spec = spec_of(
        tmp_path,
        """
        architecture = "python:nets.small:make"
        weights = "sub/weights.safetensors"
        labels = "names.txt"
        type = "detection"
        [architecture_args]
        num_classes = 10
        nested = {a = [1, 2]}
        [input]
        size = [64, 96]
        fit = "letterbox"
        resize = 100
        interpolation = "bicubic"
        mean = [0, 0.5, 1]
        std = [1, 2, 0.5]
        [output]
        activation = "sigmoid"
        [serving]
        precision = "bf16"
        """,
    )
    assert (spec.architecture, spec.weights) == ("python:nets.small:make", "sub/weights.safetensors")
    assert (spec.labels, spec.type, spec.seed) == ("names.txt", "detection", None)
    assert spec.architecture_args == {"num_classes": 10, "nested": {"a": [1, 2]}}
    assert (spec.input.size, spec.input.fit, spec.input.resize) == ((64, 96), "letterbox", 100)
    assert (spec.input.interpolation, spec.input.mean, spec.input.std) == ("bicubic", (0, 0.5, 1), (1, 2, 0.5))
    assert (spec.output.activation, spec.serving.precision) == ("sigmoid", "bf16")


def test_a_crop_lies_inside_what_it_is_cut_from(tmp_path: Path) -> None:
    lines = f"{MINIMAL}[input]\nsize = [200, 300]\nresize = 299\n"
    assert reason_of(tmp_path, lines) == (
        "model.toml: input: resize = 299 is smaller than the crop: at least max(size) = 300"
    )
    assert spec_of(tmp_path, lines.replace("299", "300")).input.resize == 300
    assert spec_of(tmp_path, lines + 'fit = "stretch"').input.resize == 299


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ('label = "a.txt"', "model.toml: label is no key. Did you mean 'labels'?"),
        ("[input]\nsise = [1, 1]", "model.toml: input.sise is no key. Did you mean 'size' or 'resize'?"),
        ("size = [224, 224]", "model.toml: size is no key. Did you mean 'input.size'?"),
        ("[input]\nlabels = 'a.txt'", "model.toml: input.labels is no key. Did you mean 'labels'?"),
        ("[output]\nzzz = 1", "model.toml: output.zzz is no key."),
        ("input = 3", "model.toml: input should be a table"),
        ("architecture_args = 3", "model.toml: architecture_args should be a table"),
    ],
)
def test_an_unknown_key_names_its_nearest(tmp_path: Path, lines: str, reason: str) -> None:
    assert reason_of(tmp_path, MINIMAL + lines) == reason


@pytest.mark.parametrize(
    ("lines", "key"),
    [
        ("[input]\nsize = [0, 224]", "input.size[0]"),
        ("[input]\nsize = [224, 5000]", "input.size[1]"),
        ("[input]\nsize = ['224', 224]", "input.size[0]"),
        ("[input]\nsize = [true, 224]", "input.size[0]"),
        ("[input]\nsize = [224]", "input.size[1]"),
        ("[input]\nsize = 224", "input.size"),
        ("[input]\nresize = -1", "input.resize"),
        ("[input]\nfit = 'squash'", "input.fit"),
        ("[input]\ninterpolation = 'nearest'", "input.interpolation"),
        ("[input]\nmean = [nan, 0, 0]", "input.mean[0]"),
        ("[input]\nstd = [1, 0, 1]", "input.std[1]"),
        ("[input]\nstd = [1, 1, inf]", "input.std[2]"),
        ("[output]\nactivation = 'tanh'", "output.activation"),
        ("[serving]\nprecision = 'int8'", "serving.precision"),
        ("type = ''", "type"),
        ("type = 3", "type"),
        ("labels = ''", "labels"),
    ],
)
def test_a_bad_value_names_its_key_alone(tmp_path: Path, lines: str, key: str) -> None:
    reason = reason_of(tmp_path, MINIMAL + lines)
    assert reason.startswith(f"model.toml: {key}")
    assert ";" not in reason


@pytest.mark.parametrize(
    "architecture",
    ["resnet50", "keras:resnet50", "timm:", "timm:hf-hub:a/b", "torchvision:a.b", "python:net", "python:..net:f"],
)
def test_an_architecture_of_no_known_origin_is_refused(tmp_path: Path, architecture: str) -> None:
    reason = reason_of(tmp_path, f'architecture = "{architecture}"\nweights = "default"')
    assert reason.startswith("model.toml: architecture: should be torchvision:<builder>")


@pytest.mark.parametrize(
    "weights",
    [
        *("weights", "weights.onnx", "random", "random:", "random:-1", "random:0x1", "random:" + "9" * 19),
        *("/etc/w.pth", "../w.pth", "a/../../w.pth"),
    ],
)
def test_weights_that_are_nothing_known_are_refused(tmp_path: Path, weights: str) -> None:
    reason = reason_of(tmp_path, f'architecture = "timm:resnet50"\nweights = "{weights}"')
    assert reason.startswith("model.toml: weights: should be a file")


@pytest.mark.parametrize("labels", ["/etc/passwd", "../names.txt"])
def test_labels_outside_the_folder_are_refused(tmp_path: Path, labels: str) -> None:
    reason = reason_of(tmp_path, f'{MINIMAL}labels = "{labels}"')
    assert reason == "model.toml: labels: should be a file in the model's folder, given relative to it"


def test_seeds(tmp_path: Path) -> None:
    assert spec_of(tmp_path, MINIMAL.replace("random:0", "random:123")).seed == 123
    assert spec_of(tmp_path, MINIMAL).seed == 0
    assert spec_of(tmp_path, MINIMAL.replace("random:0", "default")).seed is None


def test_several_problems_are_told_at_once(tmp_path: Path) -> None:
    reason = reason_of(tmp_path, "wights = 1")
    assert (
        reason == "model.toml: architecture is missing; weights is missing; wights is no key. Did you mean 'weights'?"
    )


def test_files_that_are_no_toml(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"^model\.toml is missing$"):
        read_spec(tmp_path)
    assert reason_of(tmp_path, "architecture = ?").startswith("model.toml is no valid TOML: Invalid value (at line 1")
    (tmp_path / "model.toml").write_bytes(b"type = '\xff'")
    with pytest.raises(ModelLoadError, match=r"^model\.toml is no valid TOML: 'utf-8'"):
        read_spec(tmp_path)
    (tmp_path / "model.toml").unlink()
    (tmp_path / "model.toml").mkdir()
    with pytest.raises(ModelLoadError, match=r"^model\.toml cannot be read: Is a directory$"):
        read_spec(tmp_path)


def test_specs_are_frozen(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        spec_of(tmp_path, MINIMAL).input.fit = "stretch"  # type: ignore[misc]


def test_files_are_followed_inside_the_folder_alone(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "v1").mkdir(parents=True)
    (folder / "v1" / "w.pth").write_bytes(b"")
    (folder / "w.pth").symlink_to("v1/w.pth")
    (tmp_path / "secret.pth").write_bytes(b"")
    (folder / "out.pth").symlink_to("../secret.pth")
    (folder / "loop.pth").symlink_to("loop.pth")
    (tmp_path / "alias").symlink_to("model")
    assert file_in(folder, "w.pth", "weights") == (folder / "v1" / "w.pth").resolve()
    assert file_in(tmp_path / "alias", "w.pth", "weights") == (folder / "v1" / "w.pth").resolve()
    for name, reason in [
        ("out.pth", "weights: 'out.pth' leads out of the model's folder"),
        ("none.pth", "weights: there is no file 'none.pth' in the model's folder"),
        ("v1", "weights: there is no file 'v1' in the model's folder"),
        ("loop.pth", "weights: 'loop.pth' cannot be followed"),
        ("a\0.pth", r"weights: 'a\\x00.pth' cannot be followed"),
    ]:
        with pytest.raises(ModelLoadError, match=f"^{reason}"):
            file_in(folder, name, "weights")


def labelled(folder: Path, labels: str, num_classes: int) -> tuple[str, ...]:
    return read_labels(spec_of(folder, f'{MINIMAL}labels = "{labels}"'), folder, num_classes)


def test_label_templates(tmp_path: Path) -> None:
    assert read_labels(spec_of(tmp_path, MINIMAL), tmp_path, 3) == ("class 0", "class 1", "class 2")
    assert labelled(tmp_path, "<id>/<id>", 2) == ("0/0", "1/1")


def test_labels_of_imagenet(tmp_path: Path) -> None:
    names = labelled(tmp_path, "imagenet-1k", 1000)
    assert (names[0], names[281], names[282], names[285], names[999]) == (
        "tench",
        "tabby",
        "tiger cat",
        "Egyptian cat",
        "toilet tissue",
    )
    with pytest.raises(ModelLoadError, match=r"^labels: 'imagenet-1k' has 1000 names, the network 10 classes$"):
        labelled(tmp_path, "imagenet-1k", 10)


def test_label_files(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    for content in ("Käfer\n a\u2028b\x0c \nlast", "\ufeffKäfer\r\n a\u2028b\x0c \r\nlast\r\n"):
        path.write_bytes(content.encode())
        assert labelled(tmp_path, "names.txt", 3) == ("Käfer", " a\u2028b\x0c ", "last")
    with pytest.raises(ModelLoadError, match=r"^labels: 'names\.txt' has 3 names, the network 4 classes$"):
        labelled(tmp_path, "names.txt", 4)
    path.write_bytes(b"\xff")
    with pytest.raises(ModelLoadError, match=r"^labels: 'names\.txt' cannot be read: 'utf-8'"):
        labelled(tmp_path, "names.txt", 1)


def test_missing_label_files(tmp_path: Path) -> None:
    with pytest.raises(
        ModelLoadError, match=r"no file 'imagenet' in the model's folder\. Did you mean 'imagenet-1k'\?"
    ):
        labelled(tmp_path, "imagenet", 1000)
    (tmp_path / "out.txt").symlink_to("/etc/passwd")
    with pytest.raises(ModelLoadError, match=r"'out\.txt' leads out of the model's folder"):
        labelled(tmp_path, "out.txt", 1)


def test_specs_and_repository_import_no_torch() -> None:
    code = (
        "import sys, service.models.spec, service.models.repository, service.models.labels;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
