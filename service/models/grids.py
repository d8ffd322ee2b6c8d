"""Where the picture's rows and columns are in a value of the graph: the channel axis, or the grid of its tokens."""

from __future__ import annotations

import operator
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


def find_grid(node: fx.Node) -> Grid | str:
    """The grid of a batched value, or why it has none."""
    shape = node.meta["val"].shape
    if any(not isinstance(size, int) for size in shape[1:]):
        return "its shape depends on the batch in more than one dimension"
    if len(shape) == 4:
        axis = channel_axis(node)
        if axis is None:
            return "nothing near it tells which of its dimensions are rows and columns"
        height, width = (size for dim, size in enumerate(shape) if dim not in (0, axis))
        if axis == 3 and not _like_the_picture(node, height, width):
            return f"its {height} x {width} places are no rows and columns of the picture"
        return Grid(height, width, axis) if height * width > 1 else "its output is 1x1"
    if len(shape) == 3:
        return token_grid(node, shape[1])
    return f"its output has {len(shape)} dimensions: it is no map and no token grid"


def token_grid(node: fx.Node, tokens: int) -> Grid | str:
    """The grid of (N,T,C) from the nearest map before it whose places became the tokens.

    That is a convolution or pooling, or (N,h,w,C) that is flattened. A value of six dimensions or more is not looked
    behind: it cuts the picture into parts, and the tokens may be in the order of these (Hiera).
    """
    seen: set[fx.Node] = set()
    layer = [node]
    while layer:
        before = dict.fromkeys(source for other in layer for source in other.all_input_nodes if source not in seen)
        seen.update(before)
        for source in before:
            height, width = _places(source)
            if 0 <= tokens - height * width <= MAX_PREFIX_TOKENS and height * width > 1:
                return Grid(height, width, channel_axis=2, prefix=tokens - height * width)
        layer = [source for source in before if not _is_cut(source)]
    return f"no patch grid explains its {tokens} tokens"


def _places(node: fx.Node) -> tuple[int, int]:
    """Rows and columns of a map whose places may become tokens, (0,0) of what is none."""
    shape = _shape(node)
    if len(shape) != 3:
        return 0, 0
    if node.target in CHANNELS_FIRST:
        return shape[1], shape[2]
    height, width, channels = shape
    flat = any(user.target in FLATTENING and _shape(user) == [height * width, channels] for user in node.users)
    return (height, width) if flat and _like_the_picture(node, height, width) else (0, 0)


def _is_cut(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.ndim >= 6


def _like_the_picture(node: fx.Node, height: int, width: int) -> bool:
    """Whether one stride leads from the picture to the grid, up to rounding: attention heads and windows fail."""
    images = next(other for other in node.graph.nodes if other.op == "placeholder").meta["val"]
    rows, columns = images.shape[2:]
    return bool(abs(height * columns - width * rows) < rows + columns)


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
    shape = node.meta["val"].shape
    assert hasattr(others, "__iter__")
    values = [(other, other.meta.get("val")) for other in others]
    return [other for other, value in values if isinstance(value, Tensor) and value.ndim == 4 and value.shape == shape]


def _shape(node: fx.Node) -> list[int]:
    """The shape of the node's value without its first dimension; empty where more depends on the batch."""
    value = node.meta.get("val")
    shape = list(value.shape[1:]) if isinstance(value, Tensor) else []
    return shape if all(isinstance(size, int) for size in shape) else []
