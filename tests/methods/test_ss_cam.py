"""SS-CAM against a plain loop in float64 under the same noise, and Score-CAM, which it is without noise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from service.explain.mathematics import noise
from service.explain.method import REGISTRY
from service.methods.ss_cam import SsCam, SsCamParams
from tests.nets import Varied, close_to, images, peer_copy, seeded, table, trace_of, varied

CLASSES = [1, 6]
STRONG = 100.0
"""What pictures are multiplied by, so that confidences differ and weights are not all the same."""
PLACES = ["activation", "input"]


def ours(method: str, pictures: Tensor, classes: list[int], **params: Any) -> Tensor:
    one = REGISTRY[method]
    trace = trace_of(varied(), pictures, table(varied()).target("second", True), classes)
    return one.heatmap(trace, one.Params.model_validate(params))


def oracle_64(module: nn.Module, pictures: Tensor, classes: list[int], n: int, sigma: float, noise_on: str) -> Tensor:
    """At the layer `second`, with seed 3."""
    twin = peer_copy(module, torch.float64).requires_grad_(False)
    seen: list[Tensor] = []
    with twin.get_submodule("second").register_forward_hook(lambda *args: seen.append(args[2].clone())):
        twin(pictures.double())
    scores = torch.zeros(seen[0].shape[:2], dtype=torch.float64)
    for index, (picture, number) in enumerate(zip(pictures.double(), classes, strict=True)):
        for k, channel in enumerate(seen[0][index]):
            for i in range(n):
                on_maps, on_input = noise(seen[0][0], 3, i)[k].double(), noise(picture, 3, i).double()
                noisy = channel + sigma * on_maps if noise_on == "activation" else channel
                mask = F.interpolate(noisy[None, None], picture.shape[1:], mode="bilinear", align_corners=False)[0]
                masked = picture * (mask - mask.min()) / (mask.max() - mask.min())
                masked = masked + sigma * on_input if noise_on == "input" else masked
                scores[index, k] += twin(masked[None]).softmax(dim=1)[0, number] / n
    assert scores.std(dim=1).max() > 0.01, "weights that are all the same prove little"
    return torch.einsum("nk,nkhw->nhw", scores.softmax(dim=1), seen[0])


@pytest.mark.parametrize(("noise_on", "sigma"), [("activation", 20.0), ("input", 50.0)])
def test_equals_a_plain_loop_in_float64(noise_on: str, sigma: float) -> None:
    pictures = STRONG * images(2, 12)
    oracle = oracle_64(seeded(Varied), pictures, CLASSES, 4, sigma, noise_on)
    answer = ours("ss_cam", pictures, CLASSES, n=4, sigma=sigma, noise_on=noise_on, seed=3)
    assert close_to(answer, oracle) < 1e-5
    assert close_to(ours("score_cam", pictures, CLASSES), oracle) > 1e-3, "the noise does something"


@pytest.mark.parametrize("noise_on", PLACES)
def test_without_noise_it_is_score_cam(noise_on: str) -> None:
    pictures = STRONG * images(2, 12)
    plain = ours("score_cam", pictures, CLASSES)
    assert torch.equal(ours("ss_cam", pictures, CLASSES, n=1, sigma=0.0, noise_on=noise_on), plain)
    assert close_to(ours("ss_cam", pictures, CLASSES, n=3, sigma=0.0, noise_on=noise_on), plain) < 1e-5


@pytest.mark.parametrize("noise_on", PLACES)
def test_the_noise_depends_on_the_seed_alone(noise_on: str) -> None:
    pictures = STRONG * images(2, 12)
    params = {"n": 2, "sigma": 20.0, "noise_on": noise_on}
    both = ours("ss_cam", pictures, CLASSES, **params)
    assert torch.equal(ours("ss_cam", pictures, CLASSES, **params, seed=0), both)
    assert close_to(ours("ss_cam", pictures, CLASSES, **params, seed=1), both) > 1e-3
    for index, number in enumerate(CLASSES):
        alone = ours("ss_cam", pictures[index : index + 1], [number], **params)
        assert close_to(alone[0], both[index]) < 1e-5


def test_defaults_are_the_paper_s() -> None:
    defaults = SsCamParams()
    assert (defaults.n, defaults.sigma, defaults.noise_on) == (35, 2.0, "activation")
    with pytest.raises(ValidationError):
        SsCamParams(sigma=float("nan"))


def test_serves_every_layer() -> None:
    assert SsCam().refusal(varied(), table(varied()).target("second", True)) is None
