"""The layer table against the modules themselves: what a layer is, which is the default, and where its map lies."""

from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.maxvit import MaxVit

from service.errors import InvalidGenParams, UnknownLayer
from service.models.grids import Grid
from service.models.layers import Layer, LayerTable
from service.models.program import Program
from tests.nets import (
    SMALL,
    Dense,
    Residual,
    Varied,
    close_to,
    deep,
    from_timm,
    images,
    program_of,
    seeded,
    table,
    trace_of,
)


def row(of: LayerTable, name: str) -> Layer:
    return next(row for row in of.rows if row.name == name)


@cache
def residual() -> LayerTable:
    return table(program_of(seeded(Residual), 12))


@pytest.mark.parametrize("network", ["resnet18", "mobilenet_v3_small", "vit_b_32", "swin_t"])
def test_rows_are_the_modules_with_their_types_shapes_and_parameters(network: str) -> None:
    """Every module that computes something, in the order in which it finishes."""
    module, program = deep(network)
    module.requires_grad_(False)
    shapes: dict[str, tuple[int, ...]] = {}

    def keep(name: str, output: Tensor | tuple[Tensor, ...]) -> None:
        shapes[name] = tuple((output if isinstance(output, Tensor) else output[0]).shape)

    handles = [
        part.register_forward_hook(lambda _module, _inputs, output, name=name: keep(name, output))
        for name, part in module.named_modules()
    ]
    module(images(3, SMALL))
    for handle in handles:
        handle.remove()
    rows = table(program).rows
    assert len({one.name for one in rows}) == len(rows) > 50
    assert [one.position for one in rows] == sorted(one.position for one in rows)
    for one in rows:
        part = module.get_submodule(one.name)
        assert one.type == type(part).__name__
        assert one.parameters == sum(parameter.numel() for parameter in part.parameters()), one.name
        assert (one.grid is None) == (one.reason is not None)
        if one.grid is not None:
            assert shapes[one.name] == (3, *one.output_shape), one.name
    leaves = {name for name, part in module.named_modules() if name in shapes and not list(part.children())}
    silent = {name for name in leaves if isinstance(module.get_submodule(name), nn.Dropout | nn.Identity)}
    missing = leaves - silent - {one.name for one in rows}
    assert all(type(module.get_submodule(name)).__name__ == "StochasticDepth" for name in missing), missing


@pytest.mark.parametrize(
    ("network", "default"),
    [
        ("resnet18", "layer4.1.conv2"),
        ("densenet121", "features.denseblock4.denselayer16.conv2"),
        ("mobilenet_v3_small", "features.12.0"),
        ("convnext_tiny", "features.7.2.block.0"),
    ],
)
def test_the_default_is_the_deepest_convolution_that_is_not_1x1(network: str, default: str) -> None:
    of = table(deep(network)[1])
    assert of.default == default
    assert of.target(None, use_conv_only=True).name == default


def test_squeeze_and_excitation_convolutions_are_no_targets() -> None:
    of = table(deep("mobilenet_v3_small")[1])
    assert row(of, "features.11.block.2.fc2").reason == "its output is 1x1"
    with pytest.raises(UnknownLayer, match="1x1"):
        of.target("features.11.block.2.fc2", use_conv_only=True)


def test_the_embedded_network_defaults_to_conv_head_with_its_relu6() -> None:
    of = table(from_timm("tf_efficientnet_lite0", (SMALL, SMALL))[1])
    assert of.default == "conv_head"
    assert of.relu(row(of, "conv_head")) == "bn2.act"
    assert of.target("conv_head", use_conv_only=False).node.target is torch.ops.aten.hardtanh.default


@pytest.mark.parametrize("network", ["vit_b_32", "swin_t"])
def test_a_network_whose_convolution_is_the_stem_defaults_to_recommended(network: str) -> None:
    program = deep(network)[1]
    of = table(program)
    assert of.default == of.recommended
    target = of.target("recommended", use_conv_only=True)
    assert target.name == of.recommended
    assert (target.grid.height, target.grid.width) == (3, 3)
    assert not program.crossing(target.node)
    gradient = trace_of(program, images(2, SMALL), target, [1, 2]).gradient
    assert (gradient.flatten(1).abs().amax(dim=1) > 0).all()


def test_no_deeper_value_of_a_vit_than_the_recommended_one_has_a_gradient_at_its_patches() -> None:
    """After the last block only the class token is read."""
    program = deep("vit_b_32")[1]
    of = table(program)
    assert of.recommended == "encoder.layers.encoder_layer_10"
    last = of.target("encoder.layers.encoder_layer_11", use_conv_only=True)
    assert trace_of(program, images(1, SMALL), last, [1]).gradient.count_nonzero() == 0


def activation_of(program: Program, layer: str, pictures: Tensor) -> Tensor:
    return trace_of(program, pictures, table(program).target(layer, use_conv_only=True), [0] * len(pictures)).activation


def eager(module: nn.Module, layer: str, pictures: Tensor) -> Tensor:
    kept: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        kept.append(output)
        return output.clone()

    handle = module.get_submodule(layer).register_forward_hook(keep)
    module(pictures)
    handle.remove()
    return kept[0]


def test_the_tokens_of_a_non_square_picture_fold_to_its_own_grid() -> None:
    """96 x 160 pixels in patches of 16: 6 rows and 10 columns behind one class token."""
    module, program = from_timm("vit_tiny_patch16_224", (96, 160), resized=True)
    of = table(program)
    assert of.default == of.recommended == "blocks.10"
    pictures = images(2, (96, 160))
    tokens = eager(module, "blocks.10", pictures)
    assert tokens.shape == (2, 61, 192)
    folded = torch.stack([tokens[:, 1 + 10 * line : 11 + 10 * line] for line in range(6)], dim=1).permute(0, 3, 1, 2)
    assert torch.equal(activation_of(program, "blocks.10", pictures), folded)


@pytest.mark.parametrize("layer", ["features.7.1", "features.5.2.mlp.0", "features.2.norm", "norm"])
def test_swins_channels_are_last(layer: str) -> None:
    module, program = deep("swin_t")
    pictures = images(2, SMALL)
    expected = eager(module, layer, pictures).permute(0, 3, 1, 2)
    if layer == "features.2.norm":  # the picture 24 x 24 after the stem, merged two by two
        assert expected.shape == (2, 4 * 96, 12, 12)
    assert close_to(activation_of(program, layer, pictures), expected) < 1e-6


def test_swins_windows_are_refused_since_they_are_not_the_batch() -> None:
    of = table(deep("swin_t")[1])
    windowed = [one for one in of.rows if one.reason == "dimension 0 of its output is not the batch"]
    with pytest.raises(UnknownLayer):
        of.target("features.1.0.attn.qkv", use_conv_only=True)
    assert not windowed or all("attn" in one.name for one in windowed)


def test_windows_beside_the_batch_are_no_map() -> None:
    """torchvision's MaxViT keeps (N, windows, places, C): four dimensions, and yet no rows and columns."""
    net = seeded(
        lambda: MaxVit(
            input_size=(64, 64),
            stem_channels=8,
            partition_size=2,
            block_channels=[8],
            block_layers=[1],
            head_dim=8,
            stochastic_depth_prob=0.0,
        )
    )
    of = table(program_of(net, 64))
    inside = ("partition_op", "partition_swap", "attn_layer", "mlp_layer")
    wrong = [one.name for one in of.rows if one.grid and any(f"attention.{part}" in one.name for part in inside)]
    wrong = [name for name in wrong if "departition_op" not in name]
    assert wrong == []


class Odd(nn.Module):
    """A module of two outputs, one whose output nobody reads, one of constants, and a Dropout."""

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.conv(x)
            return F.relu(x), F.silu(x)

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1, 4, 8, 8))

        def forward(self) -> Tensor:
            return self.weight * 2

    def __init__(self) -> None:
        super().__init__()
        self.halves = self.Halves()
        self.unused = nn.Conv2d(4, 4, 1)
        self.aside = nn.Conv2d(4, 2, 1)
        self.positions = self.Table()
        self.drop = nn.Dropout()
        self.head = nn.Linear(256, 5)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.halves(x)
        self.unused(a)
        self.aside(a).relu()
        scores: Tensor = self.head(self.drop(a * b + self.positions()).flatten(1))
        return scores


def test_what_cannot_be_a_target_says_why() -> None:
    of = table(program_of(seeded(Odd), 8))
    reasons = {one.name: one.reason for one in of.rows}
    assert reasons["halves"] == "it has several outputs"
    assert reasons["positions"] == "its output does not depend on the picture"
    assert reasons["head"] == "its output has 2 dimensions: it is neither a map nor a token grid"
    assert reasons["halves.conv"] is None
    assert "drop" not in reasons
    for name in ("unused", "aside"):  # torch.export may drop what nobody reads
        assert reasons.get(name, "gone") is not None
    with pytest.raises(UnknownLayer, match="cannot be a target: it has several outputs"):
        of.target("halves", use_conv_only=True)


def test_a_module_called_twice_is_its_last_call_and_at_k_picks_another() -> None:
    of = residual()
    # The ReLU runs behind the stem, behind the shortcut, and behind the last convolution.
    calls = [of.target(f"relu@{call}", use_conv_only=True) for call in range(3)]
    assert [call.name for call in calls] == ["relu@0", "relu@1", "relu@2"]
    assert len({call.node for call in calls}) == 3
    assert of.target("relu", use_conv_only=True).node is calls[2].node
    with pytest.raises(UnknownLayer, match="'relu'"):
        of.target("relu@3", use_conv_only=True)
    pictures, module, program = images(2, 12), seeded(Residual), residual()._program
    stem = F.relu(module.get_submodule("stem")(pictures))
    assert torch.equal(trace_of(program, pictures, calls[0], [0]).activation, stem)


def test_an_unknown_layer_names_its_nearest_matches() -> None:
    of = table(deep("resnet18")[1])
    with pytest.raises(UnknownLayer, match=r"no layer 'layer4\.1\.conv3'.*'layer4\.1\.conv2'"):
        of.target("layer4.1.conv3", use_conv_only=True)


def test_recommended_is_a_name_on_any_network() -> None:
    assert residual().target("recommended", use_conv_only=True).name == "relu"
    assert table(deep("resnet18")[1]).target("recommended", use_conv_only=True).name == "layer4"
    with pytest.raises(InvalidGenParams, match="is no convolution"):
        residual().target("recommended", use_conv_only=False)


def test_parallel_branches_are_not_recommended() -> None:
    """The convolutions' outputs are all concatenated: only before the first branch do all paths go through one."""
    of = table(program_of(seeded(Dense), 12))
    assert (of.default, of.recommended) == ("third", "first")


def test_the_fused_relu_is_the_only_reader_of_the_folded_convolution() -> None:
    fused = {one.name: residual().relu(one) for one in residual().rows}
    assert fused == {"stem": "relu", "conv": None, "norm": None, "last": "relu", "relu": None, "head": None}
    of = table(deep("resnet18")[1])
    assert of.relu(row(of, "layer4.1.conv1")) == "layer4.1.relu"  # behind its batch norm
    assert of.relu(row(of, "layer4.1.conv2")) is None  # the shortcut is added first


def test_a_functional_relu6_is_fused_too() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)
            self.head = nn.Linear(256, 5)

        def forward(self, x: Tensor) -> Tensor:
            scores: Tensor = self.head(F.relu6(self.conv(x)).flatten(1))
            return scores

    of = table(program_of(seeded(Net), 8))
    assert of.relu(row(of, "conv")) is not None


def test_the_grid_of_a_map_is_its_rows_and_columns() -> None:
    program = program_of(
        seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 6 * 2, 3))), (8, 4)
    )
    assert row(table(program), "0").grid == Grid(height=6, width=2, channel_axis=1)
    folded = activation_of(program, "0", images(2, (8, 4)))
    assert folded.shape == (2, 4, 6, 2)


def test_prefix_tokens_of_a_distilled_vit_are_dropped() -> None:
    class Tokens(nn.Module):
        """Two extra tokens before 3 x 5 patches."""

        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 8, 4, stride=4)
            self.extra = nn.Parameter(torch.randn(1, 2, 8))
            self.mix = nn.Linear(8, 8)
            self.more = nn.Linear(8, 8)
            self.head = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.patches(x).flatten(2).transpose(1, 2)
            x = torch.cat([self.extra.expand(x.shape[0], -1, -1), x], dim=1)
            scores: Tensor = self.head(self.more(self.mix(x).relu()).mean(dim=1))
            return scores

    module = seeded(Tokens)
    program = program_of(module, (12, 20))
    pictures = images(2, (12, 20))
    assert table(program).default == "more"
    expected = eager(module, "mix", pictures)[:, 2:].reshape(2, 3, 5, 8).permute(0, 3, 1, 2)
    assert torch.equal(activation_of(program, "mix", pictures), expected)


class Heads(nn.Module):
    """Tokens in two heads, normalised as qk_norm does, and folded back to rows and columns (N,3,5,8) before the end."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.q_norm = nn.LayerNorm(4)
        self.fold = nn.Unflatten(1, (3, 5))
        self.head = nn.Linear(120, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        heads = x.reshape(x.shape[0], 15, 2, 4).transpose(1, 2)
        x = x + self.q_norm(heads).transpose(1, 2).reshape(x.shape[0], 15, 8)
        scores: Tensor = self.head(self.fold(x).flatten(1))
        return scores


def test_tokens_folded_back_have_their_channels_last() -> None:
    of = table(program_of(seeded(Heads), (12, 20)))
    assert row(of, "fold").grid == Grid(height=3, width=5, channel_axis=3)


def test_attention_heads_are_no_rows() -> None:
    of = table(program_of(seeded(Heads), (12, 20)))
    assert row(of, "q_norm").grid is None


def test_every_varied_layer_is_a_target() -> None:
    of = table(program_of(seeded(Varied), 12))
    assert [(one.name, one.grid is not None) for one in of.rows] == [
        ("first", True),
        ("second", True),
        ("third", True),
        ("head", False),
    ]
