"""IS-CAM against numbers worked out by hand, a plain loop in float64, and Score-CAM, which it is with one step."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from service.explain.method import REGISTRY
from service.methods.is_cam import IsCam, IsCamParams
from tests.nets import (
    Varied,
    close_to,
    explain,
    hand,
    hand_picture,
    images,
    peer_copy,
    request,
    seeded,
    table,
    trace_of,
    varied,
)

CLASSES = [1, 6]
STRONG = 100.0
"""What pictures are multiplied by, so that confidences differ and weights are not all the same."""


def ours(method: str, pictures: Tensor, classes: list[int], **params: int) -> Tensor:
    one = REGISTRY[method]
    trace = trace_of(varied(), pictures, table(varied()).target("second", True), classes)
    return one.heatmap(trace, one.Params.model_validate(params))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_equals_the_numbers_on_paper() -> None:
    # Score-CAM's masks lead to logits that differ by -2 and -7 (see there); the network is linear: half at half.
    scores = [(sigmoid(-1) + sigmoid(-2)) / 2, (sigmoid(-3.5) + sigmoid(-7)) / 2]
    first = sigmoid(scores[0] - scores[1])
    expected = first * np.array([[1, 2], [3, 4]]) + (1 - first) * np.array([[-2, 2], [2, -2]])
    asked = request(1, (0,), methods=("is_cam",), gen_params={"n": 2})
    (answer,) = explain(hand(), asked, hand_picture())
    np.testing.assert_allclose(answer.maps[0].values, expected, rtol=0, atol=1e-5 * 4)


def oracle_64(module: nn.Module, layer: str, pictures: Tensor, classes: list[int], n: int) -> Tensor:
    twin = peer_copy(module, torch.float64).requires_grad_(False)
    seen: list[Tensor] = []
    with twin.get_submodule(layer).register_forward_hook(lambda *args: seen.append(args[2].clone())):
        twin(pictures.double())
    scores = torch.zeros(seen[0].shape[:2], dtype=torch.float64)
    for index, (picture, number) in enumerate(zip(pictures.double(), classes, strict=True)):
        for k, channel in enumerate(seen[0][index]):
            mask = F.interpolate(channel[None, None], picture.shape[1:], mode="bilinear", align_corners=False)[0]
            mask = (mask - mask.min()) / (mask.max() - mask.min())
            for i in range(1, n + 1):
                scores[index, k] += twin((picture * mask * i / n)[None]).softmax(dim=1)[0, number] / n
    assert scores.std(dim=1).max() > 0.01, "weights that are all the same prove little"
    return torch.einsum("nk,nkhw->nhw", scores.softmax(dim=1), seen[0])


def test_equals_a_plain_loop_in_float64() -> None:
    pictures = STRONG * images(2, 12)
    oracle = oracle_64(seeded(Varied), "second", pictures, CLASSES, 5)
    assert close_to(ours("is_cam", pictures, CLASSES, n=5), oracle) < 1e-5
    assert close_to(ours("score_cam", pictures, CLASSES), oracle) > 1e-3, "it is no other method"


def test_with_one_step_it_is_score_cam() -> None:
    pictures = STRONG * images(2, 12)
    assert torch.equal(ours("is_cam", pictures, CLASSES, n=1), ours("score_cam", pictures, CLASSES))


def test_alone_equals_in_a_batch() -> None:
    pictures = STRONG * images(2, 12)
    both = ours("is_cam", pictures, CLASSES, n=3)
    for index, number in enumerate(CLASSES):
        assert close_to(ours("is_cam", pictures[index : index + 1], [number], n=3)[0], both[index]) < 1e-5


def test_serves_every_layer_with_the_paper_s_ten_steps() -> None:
    assert IsCam().refusal(varied(), table(varied()).target("second", True)) is None
    assert IsCamParams().n == 10
