"""Where the picture's rows and columns are in a value of the graph: the channel axis, or the grid of its tokens."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

aten = torch.ops.aten

CONVOLUTIONS = frozenset({aten.conv2d.default, aten.conv2d.padding, aten.convolution.default})
BATCH_NORMS = frozenset({aten._native_batch_norm_legit_no_training.default, aten.batch_norm.default})
CHANNELS_FIRST = (
    CONVOLUTIONS
    | BATCH_NORMS
    | {
        aten.group_norm.default,
        aten.native_group_norm.default,
        aten.max_pool2d.default,
        aten.avg_pool2d.default,
        aten.adaptive_avg_pool2d.default,
        aten.upsample_bilinear2d.vec,
        aten.upsample_nearest2d.vec,
    }
)
CHANNELS_LAST = frozenset({aten.linear.default, aten.layer_norm.default, aten.native_layer_norm.default})
FLATTENING = frozenset({aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.flatten.using_ints})
AXES_KEPT = frozenset({operator.getitem, aten.cat.default, aten.constant_pad_nd.default, aten.slice.Tensor})
MAX_PREFIX_TOKENS = 16


@dataclass(frozen=True)
class Grid:
    """How a batched value folds to (N,C,h,w): a map with its channels at `channel_axis`, or tokens (N,T,C).

    Of tokens the first `prefix` (class token, registers) belong to no place of the picture.
    """

    height: int
    width: int
    channel_axis: int
    prefix: int | None = None

    def fold(self, value: Tensor) -> Tensor:
        """`value` as (N,C,h,w), without prefix tokens."""
        if self.prefix is not None:
            value = value[:, self.prefix :].reshape(len(value), self.height, self.width, -1)
        return value.movedim(-1, 1) if self.prefix is not None or self.channel_axis == 3 else value

    def unfold(self, folded: Tensor, like: Tensor) -> Tensor:
        """What folds to `folded` (N,C,h,w), with the prefix tokens of `like`."""
        if self.prefix is not None:
            return torch.cat([like[:, : self.prefix], folded.flatten(2).mT], dim=1)
        return folded.movedim(1, -1) if self.channel_axis == 3 else folded


def propose_grids(images: Tensor, node: fx.Node) -> tuple[Grid, ...] | str:
    """The grids that the shape of a batched value allows, or why there is none; `places` shows which one is true.

    `images` is an example (N,3,H,W) of the network's input.
    """
    shape = node.meta["val"].shape
    if any(not isinstance(size, int) for size in shape[1:]):
        return "its shape depends on the batch in more than one dimension"
    if len(shape) == 4:
        axis = channel_axis(node)
        return _maps(shape, (1, 3) if axis is None else (axis,)) or "its output is 1x1"
    if len(shape) == 3:
        return _token_grids(shape[1], images) or f"no patch grid explains its {shape[1]} tokens"
    return f"its output has {len(shape)} dimensions: it is neither a map nor a token grid"


def _maps(shape: Sequence[int], axes: tuple[int, ...]) -> tuple[Grid, ...]:
    sides = ((axis, *(size for dim, size in enumerate(shape) if dim not in (0, axis))) for axis in axes)
    return tuple(Grid(height, width, axis) for axis, height, width in sides if height * width > 1)


def _token_grids(tokens: int, images: Tensor) -> tuple[Grid, ...]:
    """Grids of the picture's proportions, up to rounding both sides alike, behind some prefix tokens."""
    rows, columns = images.shape[2:]
    return tuple(
        Grid(height, places // height, channel_axis=2, prefix=tokens - places)
        for places in range(tokens, max(1, tokens - MAX_PREFIX_TOKENS - 1), -1)
        for height in range(1, places + 1)
        if places % height == 0 and abs(height * columns - places // height * rows) < max(rows, columns)
    )


def channel_axis(node: fx.Node) -> int | None:
    """The channel axis (1 or 3) of a four-dimensional value, from the operations that made it, else that read it."""
    return _axis_before(node) or _axis_after(node)


def _axis_before(node: fx.Node) -> int | None:
    if node.target in AXES_KEPT:
        return _axis_before(node.all_input_nodes[0])
    if node.target in CHANNELS_FIRST:
        return 1
    if node.target in CHANNELS_LAST:
        return 3
    if node.target in FLATTENING and (axis := _axis_of_view(node)) is not None:
        return axis
    if node.target is aten.permute.default:
        source = _axis_before(node.all_input_nodes[0])
        return None if source is None else _permutation(node).index(source)
    return next((axis for source in _same_shape(node, node.all_input_nodes) if (axis := _axis_before(source))), None)


def _axis_of_view(node: fx.Node) -> int | None:
    """The channel axis of tokens (N,hw,C) unfolded, or of windows (N,h/p,p,w/p,p,C) or (N,C,...) put together."""
    before, after = _shape(node.all_input_nodes[0]), _shape(node)
    if len(before) == 5:
        last = [before[0] * before[1], before[2] * before[3], before[4]]
        first = [before[0], before[1] * before[2], before[3] * before[4]]
        return 3 if after == last else 1 if after == first else None
    return 3 if len(before) == 2 and len(after) == 3 and before == [after[0] * after[1], after[2]] else None


def _axis_after(node: fx.Node) -> int | None:
    for user in node.users:
        if user.target in CHANNELS_FIRST:
            return 1
        if user.target in CHANNELS_LAST:
            return 3
        if user.target is aten.mean.dim and (axis := _axis_kept_by_mean(user)) is not None:
            return axis
        if user.target is aten.permute.default and (axis := _axis_after(user)) is not None:
            return _permutation(user)[axis]
    return next((axis for user in _same_shape(node, node.users) if (axis := _axis_after(user))), None)


def _axis_kept_by_mean(node: fx.Node) -> int | None:
    """The channel axis of a value whose places are averaged (global pooling)."""
    dims = node.args[1]
    averaged = {int(str(dim)) % 4 for dim in dims} if isinstance(dims, list | tuple) else set()
    return 1 if averaged == {2, 3} else 3 if averaged == {1, 2} else None


def _permutation(node: fx.Node) -> list[int]:
    dims = node.args[1]
    assert isinstance(dims, list | tuple)
    return [int(str(dim)) % 4 for dim in dims]


def _same_shape(node: fx.Node, others: object) -> list[fx.Node]:
    """Those of `others` that an element-wise operation links with `node`: their values have the same shape."""
    assert hasattr(others, "__iter__")
    values = [(other, other.meta.get("val")) for other in (node, *others)]
    maps = {other: value.shape for other, value in values if isinstance(value, Tensor) and value.ndim == 4}
    return [other for other, shape in maps.items() if other is not node and shape == maps.get(node)]


def _shape(node: fx.Node) -> list[int]:
    """The shape of the node's value without its first dimension; empty where more depends on the batch."""
    value = node.meta.get("val")
    shape = list(value.shape[1:]) if isinstance(value, Tensor) else []
    return shape if all(isinstance(size, int) for size in shape) else []
