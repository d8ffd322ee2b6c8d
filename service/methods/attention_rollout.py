"""Attention rollout (Abnar and Zuidema 2020)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, fx

from service.explain.mathematics import quotient
from service.explain.method import COSTLESS, GenParams, Method, ScaledParams, register
from service.explain.trace import Trace
from service.models.grids import Grid, propose_grids
from service.models.layers import Target
from service.models.places import find_places
from service.models.program import Program, as_tuple, gradients_of, is_size

aten = torch.ops.aten

FUSED = aten.scaled_dot_product_attention.default
SOFTMAX = frozenset({aten.softmax.int, aten._softmax.default})
PRODUCTS = frozenset({aten.matmul.default, aten.bmm.default, aten.einsum.default})
SHAPING = frozenset(
    {
        aten.view.default,
        aten._unsafe_view.default,
        aten.reshape.default,
        aten.expand.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.to.dtype,
        aten._to_copy.default,
        aten.dropout.default,
    }
)

WINDOWS = "its attention is within parts of the picture (windows), not over one grid of tokens"
OTHERS = "its attention is not always from all tokens of one grid to the same tokens"
BRANCHES = "its attention operations do not follow one another: several of one block are combined"
UNSEEN = "it cannot be seen which tokens its scores read"
UNFOLDED = "no value before its attention has one row per token"
CHANGED = "its attention weights are changed before they meet the values"


class AttentionRolloutParams(ScaledParams):
    head_fusion: Literal["mean", "max", "min"] = Field("mean", description="how the heads of a layer become one")
    discard_ratio: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="the share, 0 to 1, of each layer's smallest attention weights that counts as 0",
        json_schema_extra=COSTLESS,
    )


@dataclass(frozen=True)
class Attentions:
    """A network's attention operations, in the order in which they run, all over the same tokens."""

    nodes: tuple[fx.Node, ...]
    pool: fx.Node | None
    """The attention by which one query reads the tokens of the last of them, where the network ends so."""
    behind: fx.Node
    """The first batched value of all tokens from the last attention on; the pool's result where there is one."""
    grid: Grid
    tokens: int

    @property
    def sources(self) -> tuple[fx.Node, ...]:
        """What their weights are computed from: queries, keys and masks, or the softmax itself."""
        return tuple(dict.fromkeys(source for node in self._all for source in _sources(node)))

    @property
    def mixed(self) -> bool:
        """Whether batch and heads share a dimension."""
        return any(node.meta["val"].ndim == 3 for node in self._all)

    @property
    def _all(self) -> tuple[fx.Node, ...]:
        return (*self.nodes, *((self.pool,) if self.pool else ()))


@register
class AttentionRollout(Method):
    name = "attention_rollout"
    family = "pixel"
    paper = "https://arxiv.org/abs/2005.00928"
    description = (
        "How much attention reaches each patch through all layers of a vision transformer, whatever the class."
    )
    cost = "two forward passes without gradients, one of them a single picture's, and a matrix product per layer"
    Params = AttentionRolloutParams

    def refusal(self, program: Program, target: Target | None) -> str | None:
        found = attentions_of(program)
        return found if isinstance(found, str) else None

    def heatmap(self, trace: Trace, params: GenParams) -> Tensor:
        """Rows of the product over all layers of A + I, each row normalised (eq. 1 of the paper), (N,h,w).

        The rows are those of the tokens that the scores read: the class token, or all patches, whose mean is taken. A
        query that pools the tokens reads them by its own attention, which has no I: it is none of them.
        """
        assert isinstance(params, AttentionRolloutParams)
        found = attentions_of(trace.program)
        assert isinstance(found, Attentions), found
        start = None if found.pool else tokens_read(trace.program, found)
        count = 1 if found.mixed else len(trace.images)  # alone, it is all the same whether batch or heads come first
        run = trace.program.observed(*found.sources)
        rows = []
        for images in torch.split(trace.images, count):
            with torch.no_grad():
                _, *values = run(images)
            known = dict(zip(found.sources, values, strict=True))
            layers = (fused_heads(_weights(node, known, len(images)), params) for node in reversed(found.nodes))
            if found.pool:
                row = fused_heads(_weights(found.pool, known, len(images)), params)[:, 0]
            else:
                assert start is not None
                row = start.expand(len(images), -1)
            rows.append(rollout(row, layers))
        return found.grid.fold(torch.cat(rows)[:, :, None])[:, 0]


def rollout(row: Tensor, layers: Iterable[Tensor]) -> Tensor:
    """A row (N,T) times the product of A + I over the layers' (N,T,T), the last layer first, each row normalised."""
    for attention in layers:
        mixed = attention + torch.eye(attention.shape[1], device=attention.device)
        row = torch.einsum("nt,nts->ns", row, quotient(mixed, mixed.sum(dim=2, keepdim=True)))
    return row


def fused_heads(weights: Tensor, params: AttentionRolloutParams) -> Tensor:
    """One layer's attention (N,T,T) of that of its heads (N,heads,T,T), its smallest weights set to 0."""
    match params.head_fusion:
        case "mean":
            one = weights.mean(dim=1)
        case "max":
            one = weights.amax(dim=1)
        case "min":
            one = weights.amin(dim=1)
    flat = one.flatten(1)
    smallest = flat.topk(int(params.discard_ratio * flat.shape[1]), largest=False).indices
    return flat.scatter(1, smallest, 0).reshape(one.shape)


def tokens_read(program: Program, found: Attentions) -> Tensor:
    """The share (1,T) that each token has in what the scores read after the last attention, for a picture of noise."""
    split = program.split(found.behind)
    noise = program.noise.pictures(1, program.images.meta["val"], seed=0)
    with torch.no_grad():
        value, *crossing = as_tuple(split.head(noise))
    value.requires_grad_()
    with torch.enable_grad():
        scores = split.tail(value, *crossing)
    (gradient,) = gradients_of(scores.amax(dim=1).sum(), [value])
    read = (gradient.reshape(-1, found.tokens, gradient.shape[-1]) != 0).any(dim=2).any(dim=0).float()
    return quotient(read, read.sum())[None]


def attentions_of(program: Program) -> Attentions | str:
    """The network's attention operations, or why a rollout over them would mean nothing."""
    nodes = tuple(node for node in program.nodes if node.target is FUSED or _is_softmax(node))
    if not nodes:
        return "it has no attention"
    shapes = [_shape(node) for node in nodes]
    tokens = shapes[0][-1]
    pooled = len(nodes) > 1 and shapes[-1][-2:] == (1, tokens)
    if any(
        len(shape) > 4 or (len(shape) == 4 and not program.is_batched(node))
        for node, shape in zip(nodes, shapes, strict=True)
    ):
        return WINDOWS
    if any(shape[-2:] != (tokens, tokens) for shape in (shapes[:-1] if pooled else shapes)):
        return OTHERS
    if any(node.target is not FUSED and not set(_readers(node)) <= PRODUCTS for node in nodes):
        return CHANGED
    if not _are_chained(program, nodes):
        return BRANCHES
    grid = _grid(program, nodes[0], tokens)
    if isinstance(grid, str):
        return grid
    if pooled:
        return Attentions(nodes[:-1], nodes[-1], nodes[-1], grid, tokens)
    behind = _behind(program, nodes[-1], tokens)
    return UNSEEN if behind is None else Attentions(nodes, None, behind, grid, tokens)


def _grid(program: Program, first: fx.Node, tokens: int) -> Grid | str:
    """Where the first attention's tokens lie in the picture, or why that is not known; measured if no layer tells."""
    before = program.ancestors([first])
    rows = [
        node
        for node in reversed(program.nodes)
        if node in before and program.is_batched(node) and node.meta["val"].shape[1:-1] == (tokens,)
    ]
    if not rows:
        return UNFOLDED
    node = next((node for node in rows if node.name in program.places), rows[0])
    proposed = propose_grids(program.images.meta["val"], node)
    return proposed if isinstance(proposed, str) else find_places(program, {node: proposed})[node.name]


def _behind(program: Program, last: fx.Node, tokens: int) -> fx.Node | None:
    if program.is_batched(last):
        return last
    descendants = program.descendants(last)
    batched = (node for node in program.nodes if node in descendants and program.is_batched(node))
    return next((node for node in batched if node.meta["val"].shape[1:-1] == (tokens,)), None)


def _is_softmax(node: fx.Node) -> bool:
    """Whether it is a softmax over the last of three or more dimensions."""
    if node.target not in SOFTMAX:
        return False
    dimensions = node.meta["val"].ndim
    return dimensions >= 3 and node.args[1] in (-1, dimensions - 1)


def _shape(node: fx.Node) -> tuple[int, ...]:
    """The shape of an attention's weights."""
    if node.target is not FUSED:
        return tuple(node.meta["val"].shape)
    queries, keys, *_ = _sources(node)
    return (*queries.meta["val"].shape[:-1], keys.meta["val"].shape[-2])


def _sources(node: fx.Node) -> tuple[fx.Node, ...]:
    """What an attention's weights are made from: first the queries and keys, where it is a fused operation."""
    if node.target is not FUSED:
        return (node,)
    queries, keys, _, *others = (*node.args, *node.kwargs.values())
    return tuple(source for source in (queries, keys, *others) if isinstance(source, fx.Node))


def _weights(node: fx.Node, known: Mapping[fx.Node, Tensor], count: int) -> Tensor:
    """An attention's weights (N,heads,T,T); those of a fused operation are what it makes of unit vectors as values."""
    if node.target is FUSED:
        arguments: Any = fx.map_arg(node.args, known.get)
        queries, keys, _, *others = arguments
        keywords: Any = fx.map_arg(node.kwargs, known.get)
        unit = torch.eye(keys.shape[-2], device=keys.device, dtype=keys.dtype).expand(*keys.shape[:-1], -1)
        weights: Tensor = FUSED(queries, keys, unit, *others, **keywords)
    else:
        weights = known[node]
    return weights.reshape(count, -1, *weights.shape[-2:])


def _readers(node: fx.Node) -> Iterator[object]:
    """The operations that use the node's value, in whatever shape."""
    for user in node.users:
        if user.target in SHAPING:
            yield from _readers(user)
        else:
            yield user.target


def _are_chained(program: Program, nodes: Sequence[fx.Node]) -> bool:
    """Whether each of the nodes depends on the one before it."""
    found = set(nodes)
    behind: dict[fx.Node, int] = {}  # how many of them follow one another up to here
    for node in program.nodes:
        sources = () if is_size(node) else node.all_input_nodes
        behind[node] = max((behind[source] for source in sources), default=0) + (node in found)
    return [behind[node] for node in nodes] == [*range(1, len(nodes) + 1)]
