"""Operations that keep each place of a picture where it is, and what a value inherits through them."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx

from service.models.grids import BATCH_NORMS, CHANNELS_FIRST, FLATTENING, Grid

aten = torch.ops.aten

POINTWISE = frozenset(
    {
        aten.clone.default,
        aten._to_copy.default,
        aten.alias.default,
        aten.detach.default,
        aten.hardswish.default,
        aten.prelu.default,
        aten.dropout.default,
    }
)
"""Beside those that PyTorch tags as such."""
LAYER_NORMS = frozenset({aten.layer_norm.default, aten.native_layer_norm.default})
GROUP_NORMS = frozenset({aten.group_norm.default, aten.native_group_norm.default})
RESAMPLING = (CHANNELS_FIRST - BATCH_NORMS - GROUP_NORMS) | {aten.constant_pad_nd.default, aten.pad.default}
"""Convolution, pooling, padding and upsampling: rows and columns stay in order, their number changes."""
JOINS: dict[object, int] = {aten.cat.default: 1, aten.slice.Tensor: 1}
SPLITS: dict[object, int] = {aten.split.Tensor: 2, aten.split_with_sizes.default: 2, aten.chunk.default: 2}
"""Operations along one dimension, and the place of that among their arguments."""


def spread(
    shown: Mapping[fx.Node, Grid], wrong: Container[fx.Node], proposals: Mapping[fx.Node, Sequence[Grid]]
) -> dict[fx.Node, Grid]:
    """The grids of further nodes with proposals, inherited from the `shown` ones; nothing passes a `wrong` one.

    Each step goes to what reads a value or to what made it, where the operation between them keeps each place.
    """
    found = dict(shown)
    inherited: dict[fx.Node, Grid] = {}
    waiting = deque(shown.items())
    while waiting:
        node, grid = waiting.popleft()
        for other, of_other in _neighbours(node, grid):
            if other in found or other in wrong:
                continue
            found[other] = of_other
            waiting.append((other, of_other))
            if of_other in proposals.get(other, ()):
                inherited[other] = of_other
    return inherited


def _neighbours(node: fx.Node, grid: Grid) -> Iterator[tuple[fx.Node, Grid]]:
    links = [(source, node, source) for source in node.all_input_nodes]
    links += [(node, user, user) for user in node.users]
    for source, user, other in links:
        if (of_other := _carried(source, user, other, grid)) is not None:
            yield other, of_other


def _carried(source: fx.Node, user: fx.Node, other: fx.Node, grid: Grid) -> Grid | None:
    """The grid of `other`, one end of the link from `source` to `user` of which the other end has `grid`."""
    if user.target in RESAMPLING:
        return _map_of(other) if user.args[0] is source and grid.channel_axis == 1 else None
    if user.target is aten.permute.default:
        return _permuted(user, other, grid)
    if user.target in JOINS or user.target in SPLITS:
        return grid if _is_along_channels(user, grid) else None
    if source.target in SPLITS:
        return grid if _is_along_channels(source, grid) else None
    last = grid.channel_axis != 1
    if user.target in FLATTENING:
        return grid if last and _keeps_rows(source, user) else None
    if user.target is aten.linear.default:
        return grid if last and user.args[0] is source else None
    return grid if _shape(source) == _shape(user) and _keeps_places(source, user, last) else None


def _keeps_places(source: fx.Node, user: fx.Node, last: bool) -> bool:
    """Whether an operation that keeps the shape treats each place by itself; `last`: channels are last."""
    norms = BATCH_NORMS | GROUP_NORMS | LAYER_NORMS
    if user.target is operator.getitem:
        return source.target in norms and user.args[1:] == (0,)
    if user.target in norms:
        return user.args[0] is source and (user.target not in LAYER_NORMS or (last and _normalises_channels(user)))
    return _is_pointwise(user)


def _is_along_channels(node: fx.Node, grid: Grid) -> bool:
    position = JOINS.get(node.target) or SPLITS[node.target]
    dim = int(str(node.args[position])) if len(node.args) > position else 0
    dimensions = len(_shape(node))
    return dim % dimensions == (1 if grid.channel_axis == 1 else dimensions - 1)


def _map_of(node: fx.Node) -> Grid | None:
    shape = _shape(node)
    if len(shape) != 4 or shape[2:] == [1, 1]:
        return None
    return Grid(int(str(shape[2])), int(str(shape[3])), 1)


def _permuted(user: fx.Node, other: fx.Node, grid: Grid) -> Grid | None:
    """Channels first become channels last, or the other way round; no other permutation keeps rows and columns."""
    dims = [int(str(dim)) % 4 for dim in user.args[1]] if isinstance(user.args[1], list | tuple) else []
    axes = {1: ([0, 2, 3, 1], 3), 3: ([0, 3, 1, 2], 1)}  # before: the permutation, after
    for before, (permutation, after) in axes.items():
        from_, to = (before, after) if other is user else (after, before)
        if dims == permutation and grid.prefix is None and grid.channel_axis == from_:
            return replace(grid, channel_axis=to)
    return None


def _keeps_rows(source: fx.Node, user: fx.Node) -> bool:
    """Whether tokens (N,T,C) become (N·T,C), or the other way round."""
    before, after = _shape(source), _shape(user)
    return {len(before), len(after)} == {2, 3} and before[-1] == after[-1]


def _is_pointwise(node: fx.Node) -> bool:
    tagged = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
    return tagged or node.target in POINTWISE


def _normalises_channels(node: fx.Node) -> bool:
    normalised = node.args[1]
    return isinstance(normalised, list | tuple) and len(normalised) == 1


def _shape(node: fx.Node) -> list[object]:
    value = node.meta.get("val")
    value = value[0] if isinstance(value, tuple | list) else value
    return list(value.shape) if isinstance(value, Tensor) else []
