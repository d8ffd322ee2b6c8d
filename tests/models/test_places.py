"""Which layers are pictures, on networks whose truth is known by construction."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from service.models.grids import Grid
from service.models.isolation import check_isolation
from service.models.layers import Layer, LayerTable
from service.models.noise import Noise
from service.models.places import PATCHES, UNSHOWN, Patches, _judge, make_patches
from service.models.program import Program, capture
from tests.nets import deep, from_timm, program_of, seeded, table

SIDE = 32
TOKENS = 8  # a side of the grid of patches
Order = Callable[[Tensor], Tensor]

ORDERS: dict[str, Order] = {
    "the picture's": lambda x: x,
    "transposed": lambda x: x.transpose(2, 3),
    "upside down": lambda x: x.flip(2),
    "mirrored": lambda x: x.flip(3),
    "turned": lambda x: x.rot90(1, (2, 3)),
    "rolled by a half": lambda x: x.roll(4, 3),
    "2 x 2 units": lambda x: x.reshape(-1, 16, 4, 2, 4, 2).permute(0, 1, 2, 4, 3, 5).reshape(x.shape),
    "units of 4 x 4": lambda x: x.reshape(-1, 16, 2, 4, 2, 4).permute(0, 1, 2, 4, 3, 5).reshape(x.shape),
    "rows two by two": lambda x: x.reshape(-1, 16, 4, 2, 8).transpose(3, 4).reshape(x.shape),
}


class Tokens(nn.Module):
    """Patches flattened in some order, mixed a little by an attention, and read through their mean."""

    def __init__(self, order: Order) -> None:
        super().__init__()
        self.order = order
        self.patches = nn.Conv2d(3, 16, 4, stride=4)
        self.norm = nn.LayerNorm(16)
        self.mix = nn.Linear(16, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.order(self.patches(x)).flatten(2).transpose(1, 2))
        x = x + F.scaled_dot_product_attention(x, x, x)
        scores: Tensor = self.head(self.mix(x).relu().mean(dim=1))
        return scores


@pytest.mark.parametrize("order", list(ORDERS))
def test_only_tokens_in_the_order_of_the_picture_are_targets(order: str) -> None:
    of = LayerTable(program_of(seeded(lambda: Tokens(ORDERS[order])), SIDE))
    grids = {name: row(of, name).grid for name in ("patches", "norm", "mix")}
    right = Grid(TOKENS, TOKENS, channel_axis=2, prefix=0) if order == "the picture's" else None
    assert grids == {"patches": Grid(TOKENS, TOKENS, channel_axis=1), "norm": right, "mix": right}
    assert right or row(of, "norm").reason == UNSHOWN


@pytest.mark.parametrize("order", list(ORDERS))
def test_a_map_is_a_target_only_where_its_rows_and_columns_are_the_pictures(order: str) -> None:
    """Channels first, which no shape tells from a map in another order."""

    class Moved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 16, 4, stride=4)
            self.last = nn.Conv2d(16, 8, 3, padding=1)
            self.head = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.last(ORDERS[order](self.patches(x)).relu())
            scores: Tensor = self.head(x.relu().mean(dim=(2, 3)))
            return scores

    of = LayerTable(program_of(seeded(Moved), SIDE))
    assert row(of, "patches").grid is not None
    assert (row(of, "last").grid is not None) == (order == "the picture's")


class Branches(nn.Module):
    """Added to one right map: a branch that is 0, as a zero-initialised norm leaves it, and a mirrored one."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, stride=4)
        self.inside = nn.Conv2d(16, 16, 1)
        self.norm = nn.BatchNorm2d(16)
        nn.init.zeros_(self.norm.weight)
        self.mirror = Mirror()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.gate = nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x)
        x = x + self.norm(self.inside(x)) + 0.1 * self.mirror(x)
        scores: Tensor = self.head((x * self.gate(self.pool(x)).sigmoid()).mean(dim=(2, 3)))
        return scores


class Mirror(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flip(3)


def test_a_silent_layer_inherits_and_one_that_says_otherwise_does_not() -> None:
    of = LayerTable(program_of(seeded(Branches), SIDE))
    reasons = {name: row(of, name).reason for name in ("patches", "inside", "norm", "mirror", "gate")}
    assert reasons == {"patches": None, "inside": None, "norm": None, "mirror": UNSHOWN, "gate": "its output is 1x1"}


def test_a_silent_layer_without_a_right_neighbour_cannot_be_shown() -> None:
    """Nothing but reshapes leads from its four-dimensional zeros to the map."""

    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 16, 4, stride=4)
            self.parts = nn.Unflatten(2, (4, 16))
            self.norm = nn.BatchNorm2d(16)
            nn.init.zeros_(self.norm.weight)
            self.head = nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.patches(x)
            parts = self.norm(self.parts(x.flatten(2)))
            scores: Tensor = self.head((x + parts.reshape(x.shape)).mean(dim=(2, 3)))
            return scores

    of = LayerTable(program_of(seeded(Parts), SIDE))
    assert row(of, "patches").reason is None
    assert row(of, "norm").reason == UNSHOWN


@pytest.mark.parametrize(
    ("network", "side", "wrong", "right"),
    [
        ("mobilevitv2_050", 128, ["stages.4.1.transformer.1"], "stages.4.1.conv_1x1"),
        ("cait_xxs24_224", 96, ["blocks.0.attn.proj_l"], "blocks.0.attn.proj"),
        ("hiera_tiny_224", 96, ["blocks.1", "blocks.3"], "blocks.11"),
        ("hiera_tiny_224", 224, ["blocks.5"], "blocks.11"),
    ],
)
def test_what_has_the_shape_of_a_map_and_is_none_is_refused(
    network: str, side: int, wrong: list[str], right: str
) -> None:
    """Patches of patches (N,C,4,P), attention matrices (N,T,T,heads), tokens in the order of units."""
    of = table(from_timm(network, (side, side), resized=not network.startswith("mobile"))[1])
    assert [row(of, name).reason for name in wrong] == [UNSHOWN] * len(wrong)
    assert row(of, right).reason is None
    assert of.default is not None


class Silent(nn.Module):
    """Zeros made of a map by `between`, and of these more by `after`, which alone tells where they lie."""

    def __init__(self, between: nn.Module, after: nn.Module, tokens: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Linear(16, 16) if tokens else None
        self.patches = nn.Conv2d(3, 16, 4, stride=4)
        self.between = between
        self.after = after
        self.head = nn.Linear(16, 5)
        for parameter in between.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x)
        if self.embedding is not None:
            x = self.embedding(x.flatten(2).transpose(1, 2))
        beside = self.after(self.between(x))
        places = (2, 3) if self.embedding is None else 1
        scores: Tensor = self.head(x.mean(places) + beside.mean(places))
        return scores


@pytest.mark.parametrize(
    ("network", "grid"),
    [
        (lambda: Silent(nn.BatchNorm2d(16), nn.AvgPool2d(2)), Grid(4, 4, 1)),
        (lambda: Silent(nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3, bias=False)), Grid(6, 6, 1)),
        (lambda: Silent(nn.BatchNorm2d(16), nn.UpsamplingBilinear2d(scale_factor=2)), Grid(16, 16, 1)),
        (lambda: Silent(nn.BatchNorm2d(16), nn.GroupNorm(4, 16)), Grid(8, 8, 1)),
        (lambda: Silent(nn.LayerNorm(16), nn.Linear(16, 16, bias=False), tokens=True), Grid(8, 8, 2, prefix=0)),
        (lambda: Silent(nn.LayerNorm(16), nn.LayerNorm(16), tokens=True), Grid(8, 8, 2, prefix=0)),
    ],
    ids=["pool", "convolution", "upsampling", "group norm", "linear", "layer norm"],
)
def test_a_silent_layer_inherits_through_what_keeps_rows_and_columns(
    network: Callable[[], nn.Module], grid: Grid
) -> None:
    of = LayerTable(program_of(seeded(network), SIDE))
    assert row(of, "between").reason is None
    assert row(of, "after").grid == grid


def test_a_silent_layer_inherits_nothing_through_a_norm_over_all_its_places() -> None:
    of = LayerTable(program_of(seeded(lambda: Silent(nn.BatchNorm2d(16), nn.LayerNorm([16, 8, 8]))), SIDE))
    assert (row(of, "between").reason, row(of, "after").reason) == (None, UNSHOWN)


def at_patches(patches: Patches, size: int = 16, width: float = 0.0) -> Tensor:
    """A response (PATCHES,size,size) of 1 at each patch and e^-(d/width)^2 at a distance d, of 0.01 everywhere."""
    places = (torch.arange(size) + 0.5) / size
    down = (places - patches.rows[:, None])[:, :, None]
    across = (places - patches.columns[:, None])[:, None, :]
    return torch.exp(-(down**2 + across**2) / max(width, 0.5 / size) ** 2) + 0.01


@pytest.fixture(scope="module")
def patches() -> Patches:
    return make_patches(program_of(seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE**2, 2))), SIDE))


def test_peaks_at_their_places_show_a_picture_whose_centres_an_echo_moves(patches: Patches) -> None:
    """Six of eight patches are seen at their places best, and half as well at the opposite corner."""
    sharp = at_patches(patches)
    response = sharp + 0.5 * sharp.flip(1, 2).roll(3, 1)
    assert _judge(response, patches).strength >= 1
    for count, shown in ((6, True), (5, False)):
        moved = response.clone()
        moved[count:] = moved[count:].flip(1, 2)
        verdict = _judge(moved, patches)
        assert (verdict.strength >= 1, verdict.wrong) == (shown, not shown)


@pytest.mark.parametrize("axis", [1, 2])
def test_one_axis_alone_shows_nothing(patches: Patches, axis: int) -> None:
    """Faint along one axis, where it is reversed: it contradicts nothing, and shows nothing."""
    right, reversed_ = at_patches(patches, width=0.1), at_patches(patches, width=0.1).flip(axis)
    faint = right.sum(axis, keepdim=True) * (1 + 0.05 * reversed_.sum(3 - axis, keepdim=True))
    verdict = _judge(faint, patches)
    assert verdict.strength < 1
    assert not verdict.wrong


@pytest.mark.parametrize("size", [(32, 256), (40, 300), (256, 32), (64, 64)])
def test_every_map_of_a_resnet_is_a_target_on_thin_pictures(size: tuple[int, int]) -> None:
    """Where a few rows are all inside the receptive field they say nothing, and contradict nothing."""
    of = LayerTable(program_of(deep("resnet18")[0], size))
    assert [(one.name, one.reason) for one in of.rows if one.reason == UNSHOWN] == []


@pytest.mark.parametrize("padding", [(0, 16, 0, 0), (0, 0, 16, 0)])
def test_a_picture_that_the_network_pads_is_not_where_its_places_say(padding: tuple[int, int, int, int]) -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 16, 4, stride=4)
            self.head = nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            scores: Tensor = self.head(self.patches(F.pad(x, padding)).relu().mean(dim=(2, 3)))
            return scores

    assert row(LayerTable(program_of(seeded(Padded), 48)), "patches").reason == UNSHOWN


def test_what_only_takes_real_pixels_is_tried_with_those() -> None:
    """A gamma is no number where a pixel would be negative."""

    class Gamma(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Conv2d(3, 8, 3, padding=1)
            self.head = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            scores: Tensor = self.head(self.last(x.pow(1 / 2.2)).relu().mean(dim=(2, 3)))
            return scores

    graph = capture(seeded(Gamma), torch.zeros(2, 3, 16, 16))
    of = LayerTable(Program(graph, noise=Noise.of((0, 0, 0), (1, 1, 1))))
    assert row(of, "last").reason is None
    check_isolation(of._program)


@pytest.mark.parametrize("size", [(32, 32), (7, 3), (224, 100), (1, 9)])
def test_the_patches_are_where_they_are_said_to_be_and_nothing_else_changes(size: tuple[int, int]) -> None:
    program = program_of(seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * size[0] * size[1], 2))), size)
    patches = make_patches(program)
    assert patches.copies.shape == (PATCHES, 3, *size)
    for copy, down, across in zip(patches.copies, patches.rows, patches.columns, strict=True):
        where = (copy != patches.base[0]).any(dim=0).nonzero()
        top_left, bottom_right = where.amin(dim=0), where.amax(dim=0) + 1
        assert len(where) == (bottom_right - top_left).prod()
        assert torch.allclose((top_left + bottom_right) / 2 / torch.tensor(size), torch.stack([down, across]))
    assert patches.copies.abs().max() <= 2
    if min(size) >= PATCHES:
        assert torch.corrcoef(torch.stack([patches.rows, patches.columns]))[0, 1].abs() < 0.1


def row(of: LayerTable, name: str) -> Layer:
    return next(row for row in of.rows if row.name == name)
