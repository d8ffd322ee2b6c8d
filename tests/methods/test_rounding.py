"""The estimate of what rounding did to a map against float64, and what maps that it swamps are reported as."""

import copy
import dataclasses
import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from service.explain.method import REGISTRY
from service.imaging.geometry import place
from service.imaging.maps import degeneracy
from service.models.program import Program, capture
from service.models.spec import Precision
from service.workers.edges import Picture, render_picture
from service.workers.messages import Heatmap
from tests.nets import (
    IMAGENET,
    RAW,
    Varied,
    explain,
    images,
    model_of,
    pictures,
    program_of,
    reduced_model,
    request,
    seeded,
    table,
    trace_of,
    varied,
)

METHODS = ["hires_cam", "xgrad_cam", "grad_cam_plus_plus"]


class Cancelling(nn.Module):
    """The layer norm behind the convolution lets no part of the gradient through that its channels share."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 64, 3)
        self.norm = nn.LayerNorm(64, eps=0.0)
        self.head = nn.Linear(64 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.norm(self.conv(x).movedim(1, -1)).flatten(1))
        return scores


class Centred(nn.Module):
    """The sum of each channel of `centre` is zero but for rounding, and XGrad-CAM divides by it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.centre = Centre()
        self.head = nn.Linear(8 * 100, 5)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.centre(self.conv(x)).flatten(1))
        return scores


class Centre(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(dim=(2, 3), keepdim=True)


def both(module: nn.Module, size: int, layer: str, method: str) -> tuple[Tensor, Tensor, Tensor]:
    """The map in float32 and in float64, and the estimated error."""
    found, params = REGISTRY[method], REGISTRY[method].Params()
    maps, errors = [], []
    for dtype in (torch.float32, torch.float64):
        twin = copy.deepcopy(module).to(dtype)
        shown = images(2, size).to(dtype)

        program = Program(capture(twin, torch.zeros(2, 3, size, size, dtype=dtype)))
        trace = trace_of(program, shown, table(program).target(layer, True), [1, 3])
        maps.append(found.heatmap(trace, params))
        errors.append(found.rounding_error(trace, params))
    assert errors[0] is not None
    return maps[0], maps[1], errors[0]


def test_a_sum_that_cancels_is_reported_as_such() -> None:
    single, double, error = both(seeded(Cancelling), 6, "conv", "hires_cam")
    assert double.abs().max() < 1e-12, "on paper it is zero"
    for raw, estimate in zip(single, error, strict=True):
        assert raw.abs().max() < 10 * estimate
        assert degeneracy(raw.numpy(), float(estimate)) in ("cancelled", "all_zero")
        assert degeneracy((raw + estimate).numpy(), float(estimate)) == "cancelled"


def test_a_map_that_cancelled_is_answered_as_such_and_not_painted() -> None:
    model = model_of(program_of(seeded(Centred), 12))

    def answered(layer: str) -> Heatmap:
        options: dict[str, Any] = {"format": "gray", "size": "model", "as_base64": False}
        params = {"target_conv_layer": layer}
        asked = dataclasses.replace(request(1, methods=("xgrad_cam",), gen_params=params), **options)
        (explained,) = explain(model, asked, shown := pictures(1, 12))
        picture = Picture(12, 12, place(12, 12, model.fit), shown[0], shown[0])
        return render_picture(0, picture, model, explained, asked, lambda: None).heatmaps[0]

    cancelled = answered("centre")
    assert cancelled.degenerate == "cancelled"
    assert cancelled.value_range[1] > 0, "there is something that could be painted"
    assert not np.asarray(Image.open(io.BytesIO(cancelled.data))).any()
    kept = answered("conv")
    assert kept.degenerate is None
    assert np.asarray(Image.open(io.BytesIO(kept.data))).max() == 255


def test_several_layers_tell_no_rounding_error() -> None:
    """Each of their maps is divided by its own maximum before they are averaged."""
    params = {"target_conv_layer": ["second", "third"]}
    (answer,) = explain(model_of(varied()), request(1, methods=("hires_cam",), gen_params=params), pictures(1, 12))
    assert answer.maps[0].rounding_error is None


@pytest.mark.parametrize("method", METHODS)
def test_the_estimate_bounds_the_error_of_a_map_that_means_something(method: str) -> None:
    single, double, error = both(seeded(Varied), 12, "third", method)
    for one, other, estimate in zip(single.double(), double, error.double(), strict=True):
        assert (one - other).abs().max() < 20 * estimate
        assert degeneracy(one.float().numpy(), float(estimate)) != "cancelled"
        assert estimate > 0


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("method", METHODS)
def test_the_estimate_knows_the_precision_of_the_head(method: str, precision: Precision) -> None:
    """It lies near the error against float64, which is 60,000 times as large in bf16 as in fp32."""
    module, classes, shown = seeded(Varied), (1, 3), pictures(2, 12)
    model = model_of(program_of(module, 12), values=IMAGENET)
    if precision != "fp32":
        model = reduced_model(module, 12, precision, IMAGENET)
    params = {"target_conv_layer": "third"}
    answers = explain(model, request(2, (1,), (3,), methods=(method,), gen_params=params), shown)

    double = Program(capture(copy.deepcopy(module).double(), torch.zeros(2, 3, 12, 12, dtype=torch.float64)))
    target = table(double).target("third", True)
    trace = trace_of(double, model.normalise(shown).double(), target, classes)
    exact = REGISTRY[method].heatmap(trace, REGISTRY[method].Params())
    for answer, wanted in zip(answers, exact, strict=True):
        assert answer.precision == precision
        error = float(np.abs(answer.maps[0].values - wanted.numpy()).max())
        estimate = answer.maps[0].rounding_error
        assert estimate is not None
        assert error < 20 * estimate
        assert estimate < 20 * error


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_what_cancels_but_for_the_rounding_of_a_reduced_head_is_reported_as_such(precision: Precision) -> None:
    """On paper XGrad-CAM divides by zero here; what a reduced head leaves of it is far above fp32's rounding."""
    model = reduced_model(seeded(Centred), 12, precision, RAW)
    asked = request(1, methods=("xgrad_cam",), gen_params={"target_conv_layer": "centre"})
    (answer,) = explain(model, asked, pictures(1, 12))
    raw = answer.maps[0]
    assert answer.precision == precision
    assert np.abs(raw.values).max() > 0
    assert degeneracy(raw.values, raw.rounding_error) == "cancelled"


def test_answers_tell_the_errors_of_the_methods_that_declare_them() -> None:
    model = model_of(varied())
    asked = request(
        2, methods=(*METHODS, "grad_cam", "integrated_gradients"), gen_params={"integrated_gradients": {"steps": 1}}
    )
    answers = explain(model, asked, pictures(2, 12))
    for answer in answers:
        told = {raw.task.method.name: (raw.rounding_error, raw.completeness_error) for raw in answer.maps}
        assert [name for name, (error, _) in told.items() if error is not None] == METHODS
        assert [name for name, (_, error) in told.items() if error is not None] == ["integrated_gradients"]


class Power(nn.Module):
    """Each channel's mean power."""

    def __init__(self, exponent: int) -> None:
        super().__init__()
        self.exponent = exponent

    def forward(self, x: Tensor) -> Tensor:
        return x.pow(self.exponent).mean(dim=(2, 3))


@pytest.mark.parametrize(
    ("exponent", "steps", "expected"), [(2, 1, 0.0), (3, 1, 1 / 4), (4, 1, 1 / 2), (4, 2, 0.0), (6, 2, 1 / 12)]
)
def test_the_completeness_error_is_the_share_on_paper(exponent: int, steps: int, expected: float) -> None:
    """The gradient n x^(n-1) in the middle of the path makes n / 2^(n-1) of x^n; s steps are exact up to n = 2 s."""
    asked = request(1, (0, 1, 2), methods=("integrated_gradients",), gen_params={"steps": steps})
    (answer,) = explain(model_of(program_of(Power(exponent), 4)), asked, pictures(1, 4))
    assert [raw.completeness_error for raw in answer.maps] == pytest.approx([expected] * 3, abs=1e-5)
