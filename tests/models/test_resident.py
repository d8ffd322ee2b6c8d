"""A model is loaded from its folder with its input, labels and confidences, or refused with the reason."""

from pathlib import Path

import numpy as np
import pytest
import torch

from service.errors import ModelLoadError
from service.models.resident import Model, load
from service.models.spec import ModelSpec
from tests.nets import CPU, explain, pictures, request

NETS = """
import torch
from torch import nn

def body(*layers):
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3), *layers)

def logits():
    return body()

def softmax():
    return body(nn.Softmax(dim=1))

def sigmoid():
    return body(nn.Sigmoid())

def maps():
    return nn.Conv2d(3, 4, 3)

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = body()

    def forward(self, x):
        return self.body(x), x

class Choosing(Two):
    def forward(self, x):
        return self.body(x) if x.sum() > 0 else -self.body(x)

def wrong_size():
    return nn.Sequential(nn.Flatten(), nn.Linear(7, 3))

def flat():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
"""
SIZE = {"size": (8, 8)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text(NETS)
    return tmp_path


def loaded(folder: Path, factory: str, activation: str = "logits", captured: Path | None = None) -> Model:
    spec = ModelSpec.model_validate(
        {
            "architecture": f"python:net:{factory}",
            "weights": "random:1",
            "input": SIZE,
            "output": {"activation": activation},
        }
    )
    return load("net", spec, folder, CPU, captured)


def test_softmax_and_logits_networks_are_explained_alike(folder: Path) -> None:
    """The trailing softmax is cut off: the same confidences, and the same maps of the logit before it."""
    shown = pictures(2, 8)
    asked = request(2, (0, 1, 2), (), methods=("grad_cam", "guided_grad_cam"))
    plain, squashed = (explain(loaded(folder, kind, kind), asked, shown) for kind in ("logits", "softmax"))
    for one, other in zip(plain, squashed, strict=True):
        np.testing.assert_array_equal(one.confidences, other.confidences)
        assert float(one.confidences.sum()) == pytest.approx(1)
        for raw, same in zip(one.maps, other.maps, strict=True):
            np.testing.assert_array_equal(raw.values, same.values)


def test_sigmoid_networks_have_independent_confidences(folder: Path) -> None:
    model = loaded(folder, "sigmoid", "sigmoid")
    (answer,) = explain(model, request(1), shown := pictures(1, 8))
    logits = model.program.forward(model.normalise(shown))[0]
    np.testing.assert_allclose(answer.confidences, 1 / (1 + np.exp(-logits.numpy())), rtol=1e-6)


def test_the_input_is_normalised_by_mean_and_std_per_channel(folder: Path) -> None:
    shown = np.zeros((1, 8, 8, 3), np.uint8)
    shown[0, 2, 5] = (255, 0, 51)
    images = loaded(folder, "logits").normalise(shown)
    assert images.shape == (1, 3, 8, 8)
    assert images.dtype == torch.float32
    assert images.is_contiguous()
    at = images[0, :, 2, 5].tolist()
    assert at == pytest.approx([(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0.2 - 0.406) / 0.225])
    assert images[0, :, 5, 2].tolist() == pytest.approx([-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225])


@pytest.mark.parametrize(
    ("factory", "reason"),
    [
        ("maps", r"no \(batch, classes\) tensor of scores but \(2, 4, 6, 6\)"),
        ("Two", r"no \(batch, classes\) tensor of scores but tuple"),
        ("Choosing", "torch.export cannot capture the network"),
        ("wrong_size", r"fails on its input \(2, 3, 8, 8\)"),
        ("softmax", "ends in softmax, but output.activation says 'logits'"),
    ],
)
def test_a_network_that_is_no_classifier_is_refused_with_the_reason(folder: Path, factory: str, reason: str) -> None:
    with pytest.raises(ModelLoadError, match=reason):
        loaded(folder, factory)


def test_a_network_without_a_map_has_no_default_layer(folder: Path) -> None:
    with pytest.raises(ModelLoadError, match="no layer of the network is a spatial map"):
        _ = loaded(folder, "flat").layers.default


def test_a_captured_model_is_read_back_and_explains_the_same(folder: Path, tmp_path: Path) -> None:
    kept = tmp_path / "captured"
    kept.mkdir()
    first = loaded(folder, "logits", captured=kept)
    (file,) = kept.iterdir()
    made = file.stat().st_mtime_ns
    again = loaded(folder, "logits", captured=kept)
    assert [one.stat().st_mtime_ns for one in kept.iterdir()] == [made]
    assert first.revision == again.revision
    asked, shown = request(2, (0, 2), (), methods=("grad_cam", "guided_grad_cam")), pictures(2, 8)
    for one, other in zip(explain(first, asked, shown), explain(again, asked, shown), strict=True):
        np.testing.assert_array_equal(one.confidences, other.confidences)
        for raw, same in zip(one.maps, other.maps, strict=True):
            np.testing.assert_array_equal(raw.values, same.values)
