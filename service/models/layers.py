"""The layers of a captured network: their summary, the default and recommended target, and what a name stands for."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, fx

from service.errors import InvalidGenParams, UnknownLayer, echo, nearest
from service.models.grids import BATCH_NORMS, CONVOLUTIONS, Grid, propose_grids
from service.models.places import find_places
from service.models.program import Program, gradients_of, is_size

aten = torch.ops.aten

MAX_DIGITS = 10  # of a number in a layer's name; int() refuses some thousands

WEIGHTED = CONVOLUTIONS | {aten.linear.default, aten.matmul.default, aten.bmm.default}


@dataclass(frozen=True)
class Layer:
    """One call of one module, which ends at `position` in the graph.

    `grid` is None, and `reason` says why, where its output can't be a target. `output_shape` is for one picture.
    """

    name: str
    type: str
    position: int
    node: fx.Node | None
    output_shape: tuple[int, ...]
    parameters: int
    grid: Grid | None
    reason: str | None


@dataclass(frozen=True)
class Target:
    """Where a heatmap is taken: a node of the graph, how its value folds to a map, and what it was asked for as."""

    name: str
    use_conv_only: bool
    node: fx.Node
    grid: Grid


class LayerTable:
    """The layers of one program, in the order in which they finish."""

    def __init__(
        self, program: Program, places: Mapping[str, Grid | str] | None = None, *, trusted: bool = False
    ) -> None:
        """`places` says of every candidate, by the node's name, its grid or why it has none; found where not given.

        `trusted` takes shapes at their word: for a copy of a network whose layers were shown.
        """
        self._program = program
        self._order = {node: index for index, node in enumerate(program.nodes)}
        self._reaching = program.ancestors([program.logits])
        self._sizes = {key: parameter.numel() for key, parameter in program.source.named_parameters()}
        self._calls = _module_calls(program)
        program.places.update(places or {})
        if places is None:
            proposals = self._proposals()
            places = (
                {node.name: grids[0] for node, grids in proposals.items()}
                if trusted
                else find_places(program, proposals)
            )
        self.places: Mapping[str, Grid | str] = places
        last = dict(sorted(self._calls))
        rows = [self._row(path, call, path) for path, call in last.items()]
        self.rows: tuple[Layer, ...] = tuple(sorted(rows, key=lambda row: row.position))
        self._by_name = {row.name: row for row in self.rows}

    @cached_property
    def recommended(self) -> str | None:
        """The deepest layer through which every path to the scores goes and whose gradient is not zero.

        Where several modules end in that value, the outermost.
        """
        tried: dict[fx.Node, bool] = {}
        for row in sorted(self._targets(), key=lambda row: (-row.position, len(row.name))):
            assert row.node is not None
            assert row.grid is not None
            if row.node not in tried:
                alone = not self._program.crossing(row.node)
                tried[row.node] = alone and _has_gradient(self._program, row.node, row.grid)
            if tried[row.node]:
                return row.name
        return None

    @cached_property
    def default(self) -> str | None:
        """The deepest convolution whose output is not 1x1, or the recommended layer; None where neither will do.

        A convolution of the stem or in one of several parallel branches will not, nor will an early recommended layer.
        """
        convolutions = [row for row in self._targets() if row.node is not None and row.node.target in CONVOLUTIONS]
        if convolutions:
            deepest = max(convolutions, key=lambda row: (row.position, len(row.name)))
            if not self._is_early(deepest) and not self._is_branch(deepest):
                return deepest.name
        if self.recommended is None or self._is_early(self._by_name[self.recommended]):
            return None
        return self.recommended

    def relu(self, row: Layer) -> str | None:
        """The name of the ReLU fused with a convolution, None where there is none."""
        if row.node is None or row.node.target not in CONVOLUTIONS:
            return None
        node = _fused_relu(_folded(row.node))
        return None if node is None else module_of(node) or node.name

    def target(self, name: str | None, use_conv_only: bool) -> Target:
        """What `target_conv_layer` and `use_conv_only` (HALCON) stand for.

        `None` is the default layer, "recommended" the recommended one, `name@k` call k of a module that is called
        more than once. Raises UnknownLayer or InvalidGenParams.
        """
        name = self.default if name is None else name
        if name is None:
            raise UnknownLayer(
                "This network has no default layer: no late layer is on every path from the picture to the scores. "
                "Name one in target_conv_layer; GET /models/<id>/layers lists them."
            )
        row = self._find(name)
        if row.node is None or row.grid is None:
            hint = nearest(row.name, (other.name for other in self._targets()))
            raise UnknownLayer(f"Layer {row.name!r} cannot be a target: {row.reason}.{hint}")
        convolution = row.node.target in CONVOLUTIONS
        node = _folded(row.node) if convolution else row.node
        if not use_conv_only:
            relu = _fused_relu(node) if convolution else None
            if relu is None:
                what = "has no ReLU or ReLU6 as its only consumer" if convolution else "is no convolution"
                raise InvalidGenParams(
                    f"use_conv_only false takes the ReLU fused with a convolution, and {row.name!r} {what}."
                )
            node = relu
        return Target(row.name, use_conv_only, node, row.grid)

    def _find(self, name: str) -> Layer:
        if name == "recommended":
            if self.recommended is None:
                raise UnknownLayer("This network has no recommended layer: none has a gradient through every path.")
            name = self.recommended
        if name in self._by_name:
            return self._by_name[name]
        path, _, call = name.rpartition("@")
        if call.isdecimal() and len(call) < MAX_DIGITS and (path, int(call)) in self._calls:
            return self._row(path, int(call), name)
        hint = nearest(name, (row.name for row in self._targets()))
        raise UnknownLayer(f"The network has no layer {echo(name)}; GET /models/<id>/layers lists them.{hint}")

    def _targets(self) -> list[Layer]:
        return [row for row in self.rows if row.grid is not None]

    def _row(self, path: str, call: int, name: str) -> Layer:
        nodes = self._calls[path, call]
        output = self._output(nodes)
        node = None if isinstance(output, str) else output
        grid = output if isinstance(output, str) else self._grid(output)
        shown = node or nodes[-1]
        parameters = (size for key, size in self._sizes.items() if key.startswith(path + "."))
        return Layer(
            name=name,
            type=_type_of(nodes[-1], path),
            position=self._order[nodes[-1]],
            node=node,
            output_shape=_shape(shown),
            parameters=sum(parameters),
            grid=grid if isinstance(grid, Grid) else None,
            reason=grid if isinstance(grid, str) else None,
        )

    def _proposals(self) -> dict[fx.Node, tuple[Grid, ...]]:
        """The grids that shapes allow, of every call of every module that may be a target."""
        outputs = {node for nodes in self._calls.values() if isinstance(node := self._output(nodes), fx.Node)}
        proposed = {node: self._propose(node) for node in sorted(outputs, key=self._order.__getitem__)}
        return {node: grids for node, grids in proposed.items() if not isinstance(grids, str)}

    def _output(self, nodes: list[fx.Node]) -> fx.Node | str:
        """What a call returns, or why that can't be a target."""
        inside = set(nodes)
        outputs = [node for node in nodes if any(user not in inside for user in node.users)]
        if len(outputs) == 1:
            return outputs[0]
        return "it has several outputs" if outputs else "its output is not used"

    def _grid(self, node: fx.Node) -> Grid | str:
        proposed = self._propose(node)
        return proposed if isinstance(proposed, str) else self.places[node.name]

    def _propose(self, node: fx.Node) -> tuple[Grid, ...] | str:
        if not isinstance(value := node.meta.get("val"), Tensor) or not value.is_floating_point():
            return "its output is not a tensor of floating-point numbers"
        if node not in self._program.tainted:
            return "its output does not depend on the picture"
        if node not in self._reaching:
            return "the scores do not depend on it"
        if not self._program.is_batched(node):
            return "dimension 0 of its output is not the batch"
        return propose_grids(self._program.images.meta["val"], node)

    def _is_branch(self, row: Layer) -> bool:
        """Whether weighted operations run beside the convolution, on a path that does not lead through it.

        A shortcut around it, such as that of a residual block, is not a branch.
        """
        assert row.node is not None
        node = _folded(row.node)
        before = self._program.ancestors([node])
        beside = self._program.ancestors(self._program.crossing(node), stop=frozenset(before)) - before
        return any(other.target in WEIGHTED for other in beside)

    def _is_early(self, row: Layer) -> bool:
        """Whether most weighted operations on places of the picture come after the layer, as after a stem."""
        weighted = [
            index
            for node, index in self._order.items()
            if node.target in WEIGHTED and node in self._program.tainted and _has_places(node)
        ]
        before = sum(index <= row.position for index in weighted)
        return len(weighted) - before > before


def _has_places(node: fx.Node) -> bool:
    """Whether a weighted operation makes more than one vector: not the scores, and not of pooled channels."""
    shape = node.meta["val"].shape
    return len(shape) > 2 and not (node.target in CONVOLUTIONS and all(size == 1 for size in shape[2:]))


def _module_calls(program: Program) -> dict[tuple[str, int], list[fx.Node]]:
    """The nodes of each call of each module, by module path and number of the call."""
    calls: dict[tuple[str, int], list[fx.Node]] = {}
    for node in program.nodes:
        if node.op != "call_function" or is_size(node):
            continue
        for key, (path, _) in node.meta.get("nn_module_stack", {}).items():
            if path and path != key:
                call = key.rpartition("@")[2]
                calls.setdefault((path, int(call) if "@" in key and call.isdecimal() else 0), []).append(node)
    return calls


def _folded(convolution: fx.Node) -> fx.Node:
    """The convolution with its batch norm folded in: the batch norm's output where that is its only consumer."""
    users = list(convolution.users)
    if len(users) != 1 or users[0].target not in BATCH_NORMS:
        return convolution
    results = [user for user in users[0].users if user.target is operator.getitem and user.args[1] == 0]
    return results[0] if results else users[0]


def _fused_relu(node: fx.Node) -> fx.Node | None:
    """The ReLU or ReLU6 that alone reads the node's value."""
    users = list(node.users)
    if len(users) != 1:
        return None
    is_relu6 = users[0].target is aten.hardtanh.default and users[0].args[1:] == (0.0, 6.0)
    return users[0] if users[0].target in (aten.relu.default, aten.relu6.default) or is_relu6 else None


def module_of(node: fx.Node) -> str:
    """The path of the innermost module that the node belongs to; empty for the network itself."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]) if stack else ""


def _type_of(node: fx.Node, path: str) -> str:
    kind = next(kind for other, kind in node.meta["nn_module_stack"].values() if other == path)
    return (kind if isinstance(kind, str) else kind.__name__).rpartition(".")[2]


def _shape(node: fx.Node) -> tuple[int, ...]:
    """The shape of the node's value for one picture: without the batch, and without sizes that depend on it."""
    value = node.meta.get("val")
    value = value[0] if isinstance(value, tuple | list) else value
    return tuple(size for size in value.shape if isinstance(size, int)) if isinstance(value, Tensor) else ()


def _has_gradient(program: Program, node: fx.Node, grid: Grid) -> bool:
    """Whether the top score of a random picture has a gradient at the node's places that is not zero."""
    split = program.split(node)
    images = program.noise.pictures(1, program.images.meta["val"], seed=0)
    with torch.no_grad():
        activation = split.head(images).requires_grad_()
    with torch.enable_grad():
        score = split.tail(activation).amax(dim=1).sum()
    (gradient,) = gradients_of(score, [activation])
    return bool(grid.fold(gradient).count_nonzero())
