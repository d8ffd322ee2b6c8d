"""Which values of a captured network are activation functions, told by what they compute and not by their names.

An activation function is an element-wise function of one value that is not affine, whether one operation or several
(`x * sigmoid(1.702 * x)`). No activation functions are: factors that weigh another value (attention gates such as
squeeze-and-excitation's sigmoid, the denominators of norms and of a softmax by hand) and what they are made of.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from functools import cache
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx

from service.models.operations import (
    BOUNDED,
    CHOICES,
    CHOOSING,
    COMBINING,
    CONSTANTS,
    FILLS,
    FULL,
    IDENTITIES,
    NAMED,
    ONES,
    PRODUCTS,
    QUOTIENTS,
    REDUCTIONS,
    SHAPING,
    SUMS,
    UNDERSTOOD,
    WEIGHING,
    ZEROS,
    argument_of,
    is_elementwise,
    is_foreign,
    name_of,
)

aten = torch.ops.aten

PROBE = torch.cat([torch.linspace(-8, 8, 65), 2.0 ** torch.arange(-20, 21), -(2.0 ** torch.arange(-20, 21))]).double()
"""Where functions are compared with the ReLU, up to a million; numbers that any precision holds exactly."""


class Nonlinearities:
    """The activation functions of a graph whose value is `output`, as far as they depend on `images`."""

    def __init__(self, images: fx.Node, needed: set[fx.Node]) -> None:
        """`needed` are the nodes that the scores depend on."""
        self._nodes = [node for node in images.graph.nodes if node in needed]
        self._varying = {images}
        self._argument: dict[fx.Node, fx.Node] = {}  # of an element-wise function of one value
        self._inside: dict[fx.Node, set[fx.Node]] = {}  # what lies between a value's argument and it, where paths meet
        self._curved: set[fx.Node] = set()
        self._unknown: list[str] = []
        for node in self._nodes:
            if node.op == "call_function" and node.target not in CONSTANTS and self.inputs(node):
                self._varying.add(node)
                self._read(node)
        self._made_of = {part for parts in self._inside.values() for part in parts}
        ends = [node for node in self._nodes if self._carries(node) and not self._goes_on(node)]
        self.gated = frozenset(node for node in ends if _is_named(node) or not self._weighs(node))

    @property
    def unknown(self) -> str | None:
        """The first operation that may be an activation function and is not understood."""
        return self._unknown[0] if self._unknown else None

    def inputs(self, node: fx.Node) -> list[fx.Node]:
        """The inputs that depend on the images."""
        return [source for source in node.all_input_nodes if source in self._varying]

    def relu_argument(self, node: fx.Node) -> fx.Node | None:
        """What a gated node is the ReLU of, None where it is another function."""
        argument = self._argument.get(node)
        while argument is not None and self._carries(argument) and self._goes_on(argument):
            argument = self._argument[argument]
        if argument is None:
            return None
        probe = PROBE.to(node.meta["val"].device)
        return argument if _equals(self._evaluated(node, argument, probe), probe.relu()) else None

    def _read(self, node: fx.Node) -> None:
        """Tell what kind of operation the node is."""
        if is_foreign(node) or (node.target is aten.index_put.default and self._depends_on_mask(node)):
            self._unknown.append(_told(node))
        elif is_elementwise(node):
            self._read_elementwise(node)
        elif _chooses_among_stacked(node) or (name_of(node) not in UNDERSTOOD and self._keeps_shape(node)):
            self._unknown.append(_told(node))

    def _keeps_shape(self, node: fx.Node) -> bool:
        shapes = [value.shape for value in (source.meta.get("val") for source in self.inputs(node)) if _is_real(value)]
        return _is_floating(node) and node.meta["val"].shape in shapes

    def _depends_on_mask(self, node: fx.Node) -> bool:
        indices: Any = node.args[1]
        return any(index in self._varying for index in indices if isinstance(index, fx.Node))

    def _read_elementwise(self, node: fx.Node) -> None:
        inputs = self.inputs(node)
        argument = self._common(inputs)
        if argument is None:
            if _is_floating(node) and node.target not in COMBINING | NAMED:
                self._unknown.append(_told(node))
            return
        inside = self._between(argument, node) if len(inputs) > 1 else set()
        bent = {part for part in inside if part in self._curved or not _is_floating(part)}
        leaking = {part for part in bent if _is_floating(part) and not inside.issuperset(set(part.users) - {node})}
        if leaking:
            if not all(_is_named(part) or self._only_weighs_outside(part, inside | {node}) for part in leaking):
                self._unknown.append(_told(node))
            return
        self._argument[node] = argument
        if len(inputs) > 1:
            self._inside[node] = inside
            if bent or node.target not in SUMS:
                self._curved.add(node)
        elif not self._is_affine(node):
            self._curved.add(node)

    def _only_weighs_outside(self, part: fx.Node, inside: set[fx.Node]) -> bool:
        outside = [user for user in part.users if user not in inside]
        return _may_weigh(part) and all(user.target in PRODUCTS for user in outside)

    def _common(self, inputs: list[fx.Node]) -> fx.Node | None:
        """The nearest value of which all of `inputs` are element-wise functions."""
        chains = [list(self._chain(node)) for node in inputs]
        return next((node for node in chains[0] if all(node in chain for chain in chains)), None)

    def _chain(self, node: fx.Node | None) -> Iterator[fx.Node]:
        while node is not None:
            yield node
            node = self._argument.get(node)

    def _between(self, argument: fx.Node, node: fx.Node) -> set[fx.Node]:
        found: set[fx.Node] = set()
        waiting = self.inputs(node)
        while waiting:
            one = waiting.pop()
            if one is not argument and one not in found:
                found.add(one)
                waiting.extend(self.inputs(one))
        return found

    def _is_affine(self, node: fx.Node) -> bool:
        """Whether an element-wise operation on one varying value is affine in it."""
        if node.target in IDENTITIES | SUMS | {aten.neg.default, aten.lerp.Scalar}:
            return True
        varying = [isinstance(argument, fx.Node) and argument in self._varying for argument in node.args]
        if node.target in PRODUCTS | {aten.addcmul.default}:
            return not all(varying[-2:])
        if node.target in QUOTIENTS | {aten.addcdiv.default}:
            return not varying[-1]
        if node.target is aten.lerp.Tensor:
            return not varying[2] or not any(varying[:2])
        if node.target in CHOICES:
            return not varying[0]
        return node.target in FILLS and not varying[1]

    def _carries(self, node: fx.Node) -> bool:
        """Whether the value is a nonlinear function, maybe shifted and scaled by numbers after that."""
        if not _is_floating(node):
            return False
        if node in self._curved:
            return True
        source = self._argument.get(node)
        return source is not None and self._carries(source) and self._next(source) is node

    def _goes_on(self, node: fx.Node) -> bool:
        """Whether the function does not end here: the value is but a part of a larger one."""
        return node in self._made_of or self._next(node) is not None

    def _next(self, node: fx.Node) -> fx.Node | None:
        """The only reader of a value, where that goes on with the same function of one value."""
        readers = self._readers(node)
        if len(readers) != 1 or _is_named(node) or _is_named(readers[0]):
            return None
        reader = readers[0]
        if self._argument.get(reader) is not node or reader in self._inside:
            return None
        return reader if reader in self._curved or len(reader.all_input_nodes) == 1 else None

    def _readers(self, node: fx.Node) -> list[fx.Node]:
        return [user for user in node.users if user in self._varying]

    def _weighs(self, end: fx.Node) -> bool:
        """Whether the function is a factor of other values, or a statistic that becomes one, and nothing else."""
        last = end
        while last not in self._curved:
            last = self._argument[last]
        return self._is_factor(end, _may_weigh(last))

    def _is_factor(self, node: fx.Node, weighing: bool) -> bool:
        readers = self._readers(node)
        return bool(readers) and all(self._is_factor_of(reader, node, weighing) for reader in readers)

    def _is_factor_of(self, reader: fx.Node, node: fx.Node, weighing: bool) -> bool:
        if name_of(reader) in REDUCTIONS:
            return self._is_factor(reader, True)
        if name_of(reader) in SHAPING or (reader in self._argument and not _is_named(reader)):
            return self._is_factor(reader, weighing or _may_weigh(reader))
        if reader.target in QUOTIENTS:
            return weighing or node is not reader.args[0]
        return weighing and _is_multiplied(reader, node)

    def _evaluated(self, node: fx.Node, argument: fx.Node, probe: Tensor) -> Tensor | None:
        """The value of an element-wise function at `probe`, None where constants have a shape of their own."""

        @cache
        def value(one: fx.Node) -> Any:
            if one is argument:
                return probe
            if (number := _number(one)) is not None:
                return torch.tensor(number, dtype=probe.dtype, device=probe.device)
            if one.op != "call_function" or one.target in CONSTANTS:
                raise LookupError(one)
            args, kwargs = fx.map_arg((one.args, one.kwargs), value)
            operation: Any = one.target
            return operation(*args, **kwargs)

        try:
            result = value(node)
        except (LookupError, RuntimeError, TypeError):
            return None
        return result if isinstance(result, Tensor) else None


def _is_named(node: fx.Node) -> bool:
    """Whether the operation is a whole activation function; relu6(x + 3) / 6 is a hard sigmoid instead."""
    if node.target not in NAMED:
        return False
    if node.target not in BOUNDED or len(node.users) != 1:
        return True
    (reader,) = node.users
    scaled = reader.target in QUOTIENTS | PRODUCTS and len(reader.all_input_nodes) == 1
    return not (scaled and node.all_input_nodes[0].target in SUMS)


def _chooses_among_stacked(node: fx.Node) -> bool:
    """Whether the operation chooses among values that were stacked for it: such as x and 0, which makes a ReLU."""
    if name_of(node) not in CHOOSING or (chosen := argument_of(node, "dim")) is None:
        return False
    source = node.all_input_nodes[0]
    while source.target in IDENTITIES:
        source = source.all_input_nodes[0]
    if name_of(source) not in ("stack", "cat"):
        return False
    count = source.meta["val"].ndim
    dim = argument_of(source, "dim") % count
    single = name_of(source) == "stack" or all(part.meta["val"].shape[dim] == 1 for part in source.all_input_nodes)
    return single and dim in {one % count for one in (chosen if isinstance(chosen, list | tuple) else [chosen])}


def _may_weigh(node: fx.Node) -> bool:
    """Whether the operation makes a gate where its value only multiplies another one."""
    return node.target in WEIGHING or (
        node.target is aten.clamp.default and None not in node.args and _count(node) == 1 and len(node.args) == 3
    )


def _is_multiplied(product: fx.Node, factor: fx.Node) -> bool:
    """Whether the value is a factor of the product, and no summand beside it."""
    if product.target in PRODUCTS:
        return True
    first = {aten.addcmul.default: 1, aten.lerp.Tensor: 2}.get(product.target)  # type: ignore[call-overload]
    return first is not None and factor in product.args[first:] and factor not in product.args[:first]


def _number(node: fx.Node) -> float | None:
    """What a constant is that is the same everywhere, None where it is none."""
    if node.target in FULL:
        return float(node.args[-1])  # type: ignore[arg-type]
    if node.target in ZEROS | ONES:
        return float(node.target in ONES)
    if node.op != "get_attr":
        return None
    value: Any = operator.attrgetter(str(node.target))(node.graph.owning_module)
    return float(value) if isinstance(value, Tensor) and value.numel() == 1 else None


def _is_floating(node: fx.Node) -> bool:
    return _is_real(node.meta.get("val"))


def _is_real(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.is_floating_point()


def _count(node: fx.Node) -> int:
    return sum(isinstance(argument, fx.Node) for argument in node.args)


def _equals(ours: Tensor | None, other: Tensor) -> bool:
    return ours is not None and torch.equal(ours.double(), other)


def _told(node: fx.Node) -> str:
    """The operation, and the module that has it."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    module = str(stack[-1][0]) if stack else ""
    return f"{node.target} in {module!r}" if module else str(node.target)
