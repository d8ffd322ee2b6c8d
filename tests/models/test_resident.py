"""A model is loaded from its folder with its input, labels and confidences, or refused with the reason."""

from pathlib import Path

import numpy as np
import pytest
import torch

from service.errors import ModelLoadError, UnknownLayer
from service.models.activations import ActivationCache
from service.models.architectures import build
from service.models.heads import DTYPES
from service.models.resident import Model, load
from service.models.spec import ModelSpec, Precision
from tests.nets import CPU, close_to, explain, pictures, request

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

class Mixing(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = body()

    def forward(self, x):
        return self.body(x - x.mean(0))

def mixing():
    return Mixing()

def maps():
    return nn.Conv2d(3, 4, 3)

def halves():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.Unflatten(1, (2, 2)), nn.Softmax(dim=2), nn.Flatten())

class ByHand(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = body()

    def forward(self, x):
        powers = self.body(x).exp()
        return powers / powers.sum(dim=1, keepdim=True)

def single():
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 1))

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


def loaded(
    folder: Path,
    factory: str,
    activation: str = "logits",
    captured: Path | None = None,
    precision: Precision = "fp32",
    activations: ActivationCache | None = None,
    confidence: str | None = None,
) -> Model:
    spec = ModelSpec.model_validate(
        {
            "architecture": f"python:net:{factory}",
            "weights": "random:1",
            "input": SIZE,
            "output": {"activation": activation, "confidence": confidence},
            "serving": {"precision": precision},
        }
    )
    return load("net", spec, folder, CPU, captured, activations)


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
    logits = model.program.split().head(model.normalise(shown))[0]
    np.testing.assert_allclose(answer.confidences, 1 / (1 + np.exp(-logits.numpy())), rtol=1e-6)


@pytest.mark.parametrize("factory", ["logits", "single"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_logits_can_have_independent_confidences(folder: Path, factory: str, precision: Precision) -> None:
    model = loaded(folder, factory, confidence="sigmoid", precision=precision)
    (answer,) = explain(model, request(1), shown := pictures(1, 8))
    logits = model.program.split().head(model.normalise(shown))[0]
    np.testing.assert_allclose(answer.confidences, 1 / (1 + np.exp(-logits.numpy())), rtol=1e-2)
    assert 0 < answer.confidences[0] < 1


@pytest.mark.parametrize(
    ("factory", "activation", "reason"),
    [
        ("single", "logits", "one class.*output.confidence = 'sigmoid'"),
        ("halves", "softmax", "probabilities made by .*softmax.*; let it return logits"),
        ("ByHand", "logits", "sum to 1 as those of a softmax do"),
    ],
)
def test_confidences_that_would_be_wrong_are_refused(folder: Path, factory: str, activation: str, reason: str) -> None:
    with pytest.raises(ModelLoadError, match=reason):
        loaded(folder, factory, activation)


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


def test_a_network_without_a_map_has_no_default_layer_and_is_predicted_whole(folder: Path) -> None:
    model = loaded(folder, "flat")
    assert model.layers.default is None
    with pytest.raises(UnknownLayer, match="no default layer"):
        explain(model, request(1, methods=("grad_cam",)), pictures(1, 8))
    images = model.normalise(shown := pictures(2, 8))
    inputs = images.clone().requires_grad_()
    scores = build(model.spec, folder)(inputs)
    assert torch.equal(model.predict(images), scores)
    (gradient,) = torch.autograd.grad(scores[:, 1].sum(), inputs)
    answers = explain(model, request(2, (1,), (1,), methods=("saliency",)), shown)
    for answer, expected in zip(answers, gradient.abs().amax(dim=1), strict=True):
        np.testing.assert_allclose(answer.maps[0].values, expected.numpy(), rtol=1e-5)


def test_a_network_that_mixes_the_pictures_of_a_batch_is_refused(folder: Path) -> None:
    with pytest.raises(ModelLoadError, match="change with the other pictures of its batch"):
        loaded(folder, "mixing")


def test_a_captured_model_is_read_back_and_explains_the_same(folder: Path, tmp_path: Path) -> None:
    kept = tmp_path / "captured"
    kept.mkdir()
    first = loaded(folder, "logits", captured=kept)
    made = {file: file.stat().st_mtime_ns for file in kept.iterdir()}
    assert len(made) == 2  # the program, and what was proven of it
    again = loaded(folder, "logits", captured=kept)
    assert {file: file.stat().st_mtime_ns for file in kept.iterdir()} == made
    assert first.revision == again.revision
    assert first.layers.places == again.layers.places
    asked, shown = request(2, (0, 2), (), methods=("grad_cam", "guided_grad_cam")), pictures(2, 8)
    for one, other in zip(explain(first, asked, shown), explain(again, asked, shown), strict=True):
        np.testing.assert_array_equal(one.confidences, other.confidences)
        for raw, same in zip(one.maps, other.maps, strict=True):
            np.testing.assert_array_equal(raw.values, same.values)


REDUCED: list[Precision] = ["bf16", "fp16"]


@pytest.mark.parametrize("kind", ["logits", "softmax"])
@pytest.mark.parametrize("precision", REDUCED)
def test_a_model_of_reduced_precision_has_a_reduced_head_over_exact_weights(
    folder: Path, precision: Precision, kind: str
) -> None:
    model, exact = loaded(folder, kind, kind, precision=precision), loaded(folder, kind, kind)
    weights = build(model.spec, folder).state_dict()
    served = model.program.source.state_dict()
    assert {name: weight.dtype for name, weight in served.items()} == dict.fromkeys(weights, torch.float32)
    assert all(torch.equal(served[name], weight) for name, weight in weights.items())
    shown, dtype = pictures(2, 8), DTYPES[precision]
    images = model.normalise(shown)
    assert images.dtype == torch.float32
    assert torch.equal(model.program.split().head(images), exact.program.split().head(images))
    head = model.heads.at(model.layers.target(None, True))
    assert (head.precision, head.dtype) == (precision, dtype)
    convolution = build(model.spec, folder).to(dtype).get_submodule("0")
    (value,) = head(images)
    assert torch.equal(value, convolution(images.to(dtype)).float())
    asked = request(2, (0,), (2,), methods=("grad_cam",))
    for answer, same in zip(explain(model, asked, shown), explain(exact, asked, shown), strict=True):
        assert (answer.precision, same.precision) == (precision, "fp32")
        assert close_to(answer.confidences, same.confidences) < 4 * torch.finfo(dtype).eps
        assert close_to(answer.maps[0].values, same.maps[0].values) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("missing", ["neither", "the exact one", "the reduced one", "both"])
def test_a_reduced_model_is_read_back_with_its_reduced_head(folder: Path, missing: str) -> None:
    """Whichever of the two captured programs is there, the cuts of both still agree."""
    kept = folder / "captured"
    kept.mkdir()
    first = loaded(folder, "logits", captured=kept, precision="bf16")
    exact, reduced = sorted(kept.glob("*.pt2"), key=lambda file: "bf16" in file.name)
    if missing in ("the exact one", "both"):
        exact.unlink()
    if missing in ("the reduced one", "both"):
        reduced.unlink()
    again = loaded(folder, "logits", captured=kept, precision="bf16")
    assert sorted(kept.glob("*.pt2")) == sorted([exact, reduced])
    images = first.normalise(pictures(2, 8))
    one, other = (model.heads.at(model.layers.target(None, True)) for model in (first, again))
    assert one.precision == other.precision == "bf16"
    assert torch.equal(one(images)[0], other(images)[0])
    assert not torch.equal(one(images)[0], first.program.split(first.layers.target(None, True).node).head(images))


def test_a_model_of_another_precision_has_another_revision_and_program(folder: Path) -> None:
    kept = folder / "captured"
    kept.mkdir()
    models = [loaded(folder, "logits", captured=kept, precision=precision) for precision in ("fp32", *REDUCED)]
    assert len({model.revision for model in models}) == 3
    assert [model.heads.at(model.layers.target(None, True)).precision for model in models] == ["fp32", *REDUCED]


def test_a_loaded_model_keeps_activations_where_it_is_told_to(folder: Path) -> None:
    """Models share what may be kept, and each sees its own alone."""
    kept, shown = ActivationCache(1 << 20), pictures(1, 8)
    models = [loaded(folder, kind, kind, activations=kept) for kind in ("logits", "softmax")]
    heads = [model.heads.at(model.layers.target(None, True)) for model in models]
    sizes: list[int] = []
    for head in heads:
        head.eager.register_forward_pre_hook(lambda _module, inputs: sizes.append(len(inputs[0])))
    for model in models * 2:
        explain(model, request(1, (1,), methods=("grad_cam",)), shown)
    assert sizes == [1, 1]
