"""Networks whose pictures change one another's scores are told from those whose pictures don't."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from service.errors import ModelLoadError
from service.models.isolation import check_isolation
from tests.nets import Residual, Varied, deep, program_of, seeded

MIXTURES: dict[str, Callable[[Tensor], Tensor]] = {
    "the batch's mean": lambda x: x - x.mean(0),
    "the batch's maximum": lambda x: x / x.abs().amax(),
    "the next picture": lambda x: x + x.roll(1, 0),
    "the next but one": lambda x: x + x.roll(2, 0),
    "the pictures before": lambda x: x.cumsum(0),
    "the pictures behind": lambda x: x.flip(0).cumsum(0).flip(0),
    "a softmax over the batch": lambda x: x.softmax(0),
    "active dropout": lambda x: nn.functional.dropout(x, 0.5, training=True),
}


class Mixed(nn.Module):
    def __init__(self, mix: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.mix = mix
        self.body = seeded(Varied)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.body(self.mix(x))
        return scores


@pytest.mark.parametrize("mixture", list(MIXTURES))
def test_a_network_that_mixes_pictures_is_refused(mixture: str) -> None:
    with pytest.raises(ModelLoadError, match="change with the other pictures of its batch"):
        check_isolation(program_of(Mixed(MIXTURES[mixture]).eval(), 12))


def test_what_mixes_weakly_is_refused_and_rounding_is_not() -> None:
    """A hundred-thousandth of a neighbour is a hundred times what float32 rounds, a ten-millionth is its rounding."""
    with pytest.raises(ModelLoadError, match="change with the other pictures of its batch"):
        check_isolation(program_of(Mixed(lambda x: x + 1e-5 * x.roll(1, 0)).eval(), 12))
    check_isolation(program_of(Mixed(lambda x: x + 1e-7 * x.roll(1, 0)).eval(), 12))


def test_batch_statistics_are_refused() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten(), nn.Linear(400, 3)
    )
    with pytest.raises(ModelLoadError, match="batch statistics"):
        check_isolation(program_of(seeded(lambda: net), 12))


@pytest.mark.parametrize(
    "network", ["resnet18", "densenet121", "mobilenet_v3_small", "convnext_tiny", "vit_b_32", "swin_t"]
)
def test_honest_networks_pass(network: str) -> None:
    check_isolation(deep(network)[1])


def test_honest_small_networks_pass() -> None:
    for build in (Varied, Residual):
        check_isolation(program_of(seeded(build), 12))


def test_scores_that_are_not_finite_do_not_pass_for_mixed() -> None:
    class Overflowing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = seeded(Varied)

        def forward(self, x: Tensor) -> Tensor:
            scores: Tensor = self.body(x) + torch.tensor([0, -torch.inf, 0, 0, 0, 0, 0])
            return scores

    check_isolation(program_of(Overflowing().eval(), 12))
    with pytest.raises(ModelLoadError, match="change with the other pictures"):
        check_isolation(program_of(nn.Sequential(Mixed(MIXTURES["the batch's mean"]), Masked()).eval(), 12))


class Masked(nn.Module):
    def forward(self, scores: Tensor) -> Tensor:
        return scores + torch.tensor([0, -torch.inf, 0, 0, 0, 0, 0])


def test_scores_of_which_none_is_finite_are_refused() -> None:
    class Nothing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(dim=(2, 3)) * torch.nan

    with pytest.raises(ModelLoadError, match="finite"):
        check_isolation(program_of(Nothing(), 12))
