"""The layer table on transformers: which values are token grids, how they lie over the picture, what is the default."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.models.maxvit import MaxVit
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2

from service.models.layers import Layer, LayerTable
from service.models.places import UNSHOWN
from service.models.program import Program
from tests.nets import close_to, deep, images, program_of, seeded, table, trace_of


def of_timm(name: str, **keywords: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, **keywords)


def swin() -> nn.Module:
    net: nn.Module = SwinTransformer([4, 4], 24, depths=[2, 1], num_heads=[2, 4], window_size=[4, 4])
    return net


def swin_v2() -> nn.Module:
    of_v2 = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2}
    net: nn.Module = SwinTransformer([4, 4], 24, depths=[2, 1], num_heads=[2, 4], window_size=[4, 4], **of_v2)
    return net


def maxvit() -> nn.Module:
    small = {"block_channels": [8], "block_layers": [1], "stem_channels": 8, "head_dim": 8}
    net: nn.Module = MaxVit((64, 64), partition_size=2, stochastic_depth_prob=0.0, **small)
    return net


# Real networks, most with fewer blocks: what builds them (None: `deep`), the side of the picture, the side of the
# recommended grid, and an early layer, where little has come from one quarter of the picture to another.
NETWORKS: dict[str, tuple[Callable[[], nn.Module] | None, int, int, str]] = {
    "vit_b_32": (None, 96, 3, "encoder.layers.encoder_layer_0"),
    "swin_t": (swin, 64, 8, "features.1.0"),
    "swin_v2_t": (swin_v2, 64, 8, "features.1.0"),
    "maxvit_t": (maxvit, 64, 16, "blocks.0.layers.0.layers.window_attention"),
    "deit_tiny": (of_timm("deit_tiny_patch16_224", img_size=96, depth=3), 96, 6, "blocks.0"),
    "eva02_tiny": (of_timm("eva02_tiny_patch14_224", img_size=56, depth=3), 56, 4, "blocks.0"),
    "swinv2_tiny": (
        of_timm("swinv2_tiny_window8_256", img_size=64, depths=(1, 1, 1), num_heads=(3, 6, 12)),
        64,
        4,
        "layers.0.blocks.0",
    ),
    "swinv2_cr": (
        of_timm("swinv2_cr_tiny_ns_224", img_size=64, depths=(1, 1), num_heads=(3, 6)),
        64,
        8,
        "stages.0.blocks.0",
    ),
    "maxvit_pico": (
        of_timm("maxvit_pico_rw_256", img_size=64, depths=(1, 1, 1, 1)),
        64,
        2,
        "stages.0.blocks.0.attn_block",
    ),
}
names = pytest.mark.parametrize("name", list(NETWORKS))


@cache
def network(name: str) -> tuple[nn.Module, Program]:
    build, side, _, _ = NETWORKS[name]
    if build is None:
        return deep(name)
    module = seeded(build)
    return module, program_of(module, side)


@names
def test_default_and_recommended_layers_are_grids_with_a_gradient(name: str) -> None:
    _, side, expected, _ = NETWORKS[name]
    program = network(name)[1]
    of = table(program)
    target = of.target("recommended", use_conv_only=True)
    assert (target.grid.height, target.grid.width) == (expected, expected)
    assert not program.crossing(target.node)
    for one in (target, of.target(None, use_conv_only=True)):
        gradient = trace_of(program, images(2, side), one, [1, 2]).gradient
        assert gradient.shape[2:] == (one.grid.height, one.grid.width)
        assert (gradient.flatten(1).abs().amax(dim=1) > 0).all(), one.name


def eager(module: nn.Module, layer: str, pictures: Tensor) -> Tensor:
    kept: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        kept.append(output.clone())

    handle = module.get_submodule(layer).register_forward_hook(keep)
    module(pictures)
    handle.remove()
    return kept[0]


@names
def test_a_change_in_one_quarter_of_the_picture_stays_in_that_quarter_of_the_folded_grid(name: str) -> None:
    """The upper right one: rows and columns that change places, or a flip, would show it elsewhere."""
    _, side, _, layer = NETWORKS[name]
    program = network(name)[1]
    target = table(program).target(layer, use_conv_only=True)
    half, last = target.grid.height // 2, target.grid.width - target.grid.width // 2
    rows, columns = half * side // target.grid.height, last * side // target.grid.width
    picture, other = images(2, side)
    changed = picture.clone()
    changed[:, :rows, columns:] = other[:, :rows, columns:]
    both = torch.stack([picture, changed])
    activation = trace_of(program, both, target, [0, 0]).activation
    moved = (activation[1] - activation[0]).square().sum(dim=0)
    inside = moved[:half, last:]
    assert inside.min() > 0
    assert inside.sum() > 0.9 * moved.sum(), (inside.sum(), moved)


def is_inside_attention(row: Layer) -> bool:
    """Whether the row is one of windows, heads, or relative positions."""
    parts = ("attn", "partition", "mlp_layer", "departition_swap")
    return any(part in row.name for part in parts)


@names
def test_every_value_outside_attention_that_has_places_is_a_target(name: str) -> None:
    rows = table(network(name)[1]).rows
    refused = [row for row in rows if row.grid is None and not is_inside_attention(row)]
    wrong = [row for row in refused if len(row.output_shape) > 1 and row.reason != "its output is 1x1"]
    assert not wrong, [(row.name, row.output_shape, row.reason) for row in wrong]
    assert sum(row.grid is not None for row in rows) > 15


@pytest.mark.parametrize(("layer", "side"), [("layers.0.blocks.0.mlp.fc1", 16), ("layers.2.blocks.0.mlp", 4)])
def test_timms_swin_v2_flattens_its_map_to_tokens(layer: str, side: int) -> None:
    """(N,h,w,C) becomes (N,hw,C) for the MLP, after patches were merged: no convolution has this many places."""
    module, program = network("swinv2_tiny")
    pictures = images(2, 64)
    target = table(program).target(layer, use_conv_only=True)
    tokens = eager(module, layer, pictures)
    assert tokens.shape[1] == side * side
    expected = torch.stack([tokens[:, side * line : side * (line + 1)] for line in range(side)], dim=1)
    folded = trace_of(program, pictures, target, [0, 0]).activation
    assert close_to(folded, expected.permute(0, 3, 1, 2)) < 1e-5


@pytest.mark.parametrize("part", ["window_attention", "grid_attention"])
def test_windows_put_together_are_a_map(part: str) -> None:
    module, program = network("maxvit_t")
    pictures, layer = images(2, 64), f"blocks.0.layers.0.layers.{part}"
    target = table(program).target(layer, use_conv_only=True)
    expected = eager(module, layer, pictures)
    assert expected.shape == (2, 8, 16, 16)
    assert close_to(trace_of(program, pictures, target, [0, 0]).activation, expected) < 1e-5


class Unrolled(nn.Module):
    """Patches in the order of 2 x 2 units, as Hiera's, of which the score reads the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).permute(0, 2, 3, 1).reshape(-1, 2, 2, 2, 2, 8)
        x = self.norm(x.permute(0, 2, 4, 1, 3, 5).reshape(-1, 16, 8))
        scores: Tensor = self.head(x.relu().mean(dim=1))
        return scores


def test_tokens_in_another_order_than_the_pictures_are_refused() -> None:
    of = LayerTable(program_of(seeded(Unrolled), 16))
    assert {row.name: row.reason for row in of.rows}["norm"] == UNSHOWN
    assert of.recommended == "patches"
