"""On mosaics of four pictures the heat lies on the one that is asked for, and a random map's anywhere."""

from __future__ import annotations

import itertools
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from service.explain.fusion import heatmap_of
from service.explain.mathematics import upsample
from service.explain.means import Means
from service.explain.method import REGISTRY
from service.explain.trace import Pass
from service.imaging.geometry import fit_picture
from service.models.repository import scan
from service.models.resident import Model, load
from service.models.spec import read_spec
from tests.nets import CPU

DATA = Path(__file__).parent.parent / "data"
CLASSES = {"chelsea.png": 285, "coffee.png": 967, "camera.png": 872}
"""Egyptian cat, espresso and tripod, of which the embedded network is confident."""
PICTURES = (*CLASSES, "rocket.jpg")
"""Of the rocket it is not (missile, 0.22): nobody asks for it."""
SIDE = 112
TRIALS = [(order, asked) for order in itertools.permutations(PICTURES) for asked in CLASSES]


@cache
def embedded() -> Model:
    (entry,) = scan(None)
    return load(entry.id, read_spec(entry.folder), entry.folder, CPU)


@cache
def tile(name: str) -> NDArray[np.uint8]:
    """The picture's central square."""
    picture = Image.open(DATA / name).convert("RGB")
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    square = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
    return np.asarray(square)


def mosaic(order: tuple[str, ...]) -> NDArray[np.uint8]:
    """Two rows of two pictures, (224,224,3)."""
    one, two, three, four = map(tile, order)
    return np.vstack([np.hstack([one, two]), np.hstack([three, four])])


def hits(method: str, trials: list[tuple[tuple[str, ...], str]], layer: str | None = None) -> float:
    """How often the peak lies in the quarter of the picture that is asked for."""
    model, kind = embedded(), REGISTRY[method]
    found = 0
    for seed, (order, asked) in enumerate(trials):
        chosen = kind.Params.model_validate({"seed": seed} if method == "random_cam" else {})
        target = model.layers.target(layer, True)
        means = Means(model.predict)
        one = Pass(model.program, model.normalise(mosaic(order)[None]), (target,), means=means)
        raw = heatmap_of(kind, one.backward(torch.tensor([CLASSES[asked]])), (target,), chosen)
        row, column = divmod(int(upsample(raw, like=one.images).argmax()), 2 * SIDE)
        found += (row // SIDE * 2 + column // SIDE) == order.index(asked)
    return found / len(trials)


@pytest.mark.parametrize("name", CLASSES)
def test_the_network_is_confident_of_what_is_asked_for(name: str) -> None:
    model = embedded()
    fitted = fit_picture(Image.open(DATA / name).convert("RGB"), model.fit)
    best = model.predict(model.normalise(fitted[None])).softmax(dim=1)[0].topk(2)
    assert CLASSES[name] in best.indices
    assert best.values.sum() > 0.7


@pytest.mark.parametrize("method", ["grad_cam", "layer_cam", "hires_cam"])
def test_the_peak_lies_in_the_right_quarter(method: str) -> None:
    assert hits(method, TRIALS[::2]) >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize(("method", "layer"), [("ablation_cam", None), ("score_cam", "blocks.4.2.conv_pwl")])
def test_the_peak_of_a_slow_method_lies_in_the_right_quarter(method: str, layer: str | None) -> None:
    """Score-CAM at a layer of 112 channels: the default one has 1280."""
    assert hits(method, TRIALS[::9], layer) >= 0.9


def test_a_random_map_knows_nothing_of_the_question() -> None:
    assert 0.1 < hits("random_cam", TRIALS) < 0.4
