"""Every layer that is listed as a target lies over the picture as its fold says, on networks of many families."""

from __future__ import annotations

import pytest
from torch import Tensor

from service.models.grids import Grid
from service.models.layers import LayerTable
from tests.models.matrix import NETWORKS, Network, Verdict, examine, faults, judge, localise, of_timm, of_torchvision
from tests.nets import program_of

# Small networks of kinds that differ in how places become values; the oracle looks at some layers of each.
EVERYDAY = (
    of_timm("ResNet", "test_resnet", 64),
    of_timm("ByobNet", "test_byobnet", 64),
    of_timm("EfficientNet", "test_efficientnet", 64),
    of_timm("ConvNeXt", "test_convnext", 64),
    of_timm("ViT", "test_vit", 64, img_size=64),
    of_timm("MobileViTv2", "mobilevitv2_050", 64),
    of_timm("CaiT", "cait_xxs24_224", 64, img_size=64, depth=2),
    of_timm("RepVGG", "repvgg_a0", 64),
    of_timm("MaxViT", "test_maxvit", 64, img_size=64),
    of_torchvision("SqueezeNet", "squeezenet1_1", 64),
)
SAMPLE = 16


@pytest.mark.parametrize("network", EVERYDAY, ids=lambda network: network.family)
def test_targets_of_ten_small_networks_lie_where_their_folds_say(network: Network) -> None:
    assert faults(examine(network, SAMPLE)) == []


@pytest.mark.matrix
@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.architecture)
def test_all_targets_of_the_matrix_lie_where_their_folds_say(network: Network) -> None:
    assert faults(examine(network)) == []


def test_the_matrix_holds_forty_families() -> None:
    assert len({network.family for network in NETWORKS}) >= 40


class Transposed(Grid):
    """The same values with rows and columns exchanged."""

    def fold(self, value: Tensor) -> Tensor:
        return super().fold(value).mT


class Flipped(Grid):
    """The same values from right to left."""

    def fold(self, value: Tensor) -> Tensor:
        return super().fold(value).flip(3)


class Mixed(Grid):
    """The same values with their places in the order of columns of two, as windows leave them."""

    def fold(self, value: Tensor) -> Tensor:
        folded = super().fold(value)
        return folded.reshape(*folded.shape[:3], -1, 2).movedim(4, 2).reshape(folded.shape)


KNOWN = (
    (of_timm("ResNet", "test_resnet", 128), "layer3"),
    (of_timm("ViT", "test_vit", 128, img_size=128), "blocks.1"),
)


@pytest.mark.parametrize(("network", "layer"), KNOWN, ids=["ResNet", "ViT"])
def test_the_oracle_tells_a_right_fold_from_wrong_ones(network: Network, layer: str) -> None:
    program = program_of(network.build(), network.side)
    row = next(row for row in LayerTable(program).rows if row.name == layer)
    assert row.node is not None
    assert row.grid is not None
    assert row.grid.height == row.grid.width == 8
    localise(program.source)
    grid = (row.grid.height, row.grid.width, row.grid.channel_axis, row.grid.prefix)
    right, *wrong = judge(program, [(row.node, kind(*grid)) for kind in (Grid, Transposed, Flipped, Mixed)])
    assert right.right
    assert min(right.rows, right.columns) > 0.8 or right.hits > 0.9
    for verdict in wrong:
        assert not verdict.right
        assert min(verdict.rows, verdict.columns) < 0.6
        assert verdict.hits < 0.6


def test_a_verdict_needs_both_axes_or_most_places() -> None:
    assert Verdict(rows=0.9, columns=0.9, hits=0).right
    assert not Verdict(rows=0.9, columns=0.7, hits=0.7).right
    assert Verdict(rows=0.1, columns=0.1, hits=0.8).right
