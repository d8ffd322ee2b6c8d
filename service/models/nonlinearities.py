"""Which values of a captured network are activation functions, told by what they compute and not by their names.

An activation function is an element-wise function of one value that is not affine, whether one operation or several
(`x * sigmoid(1.702 * x)`). No activation functions are: factors that weigh another value (attention gates such as
squeeze-and-excitation's sigmoid, the denominators of norms and of a softmax by hand) and what they are made of.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten

NAMED = frozenset(
    {
        aten.relu.default,
        aten.relu6.default,
        aten.hardtanh.default,
        aten.silu.default,
        aten.gelu.default,
        aten.hardswish.default,
        aten.leaky_relu.default,
        aten.prelu.default,
        aten.elu.default,
        aten.selu.default,
        aten.celu.default,
        aten.mish.default,
        aten.rrelu.default,
    }
)
"""Operations that are whole activation functions. Each is one of its own, also right behind another one."""
IDENTITIES = frozenset(
    {
        aten.clone.default,
        aten.alias.default,
        aten.detach.default,
        aten.contiguous.default,
        aten.dropout.default,
        aten.to.dtype,
        aten._to_copy.default,
    }
)
SUMS = frozenset({aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Scalar})
PRODUCTS = frozenset({aten.mul.Tensor, aten.mul.Scalar})
QUOTIENTS = frozenset({aten.div.Tensor, aten.div.Scalar})
CHOICES = frozenset({aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar})
FILLS = frozenset({aten.masked_fill.Scalar, aten.masked_fill.Tensor})
COMBINING = SUMS | PRODUCTS | QUOTIENTS | {aten.addcmul.default, aten.addcdiv.default, aten.lerp.Tensor}
"""Operations of two values or more that leave each one's own nonlinearity to be gated where it is made."""
UNTAGGED = NAMED | IDENTITIES | CHOICES | {aten.log_sigmoid.default}
"""Element-wise operations, of which torch does not tag all as such."""
CONSTANTS = frozenset({aten.zeros_like.default, aten.ones_like.default, aten.full_like.default})
"""Operations whose value does not depend on that of their input."""
BOUNDED = frozenset({aten.relu6.default, aten.hardtanh.default})
WEIGHING = frozenset(
    {aten.sigmoid.default, aten.hardsigmoid.default, aten.tanh.default, aten.exp.default, aten.rsqrt.default}
    | {aten.sqrt.default, aten.reciprocal.default, aten.pow.Tensor_Scalar}
    | BOUNDED
    | QUOTIENTS
)
"""Operations that make a gate or a norm's factor where their value only multiplies another one."""
REDUCTIONS = frozenset(
    {aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim, aten.amax.default, aten.amin.default}
    | {aten.var.correction, aten.linalg_vector_norm.default, aten.adaptive_avg_pool2d.default}
)
SHAPING = frozenset(
    {aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.expand.default, aten.unsqueeze.default}
    | {aten.squeeze.dim, aten.squeeze.dims, aten.permute.default, aten.transpose.int}
)
OWN = ("aten", "prims", "prim")


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
        probe = torch.linspace(-8, 8, 65, dtype=torch.float64)
        return argument if _equals(self._evaluated(node, argument, probe), probe.relu()) else None

    def _read(self, node: fx.Node) -> None:
        """Tell what kind of operation the node is."""
        if _is_foreign(node) or (node.target is aten.index_put.default and self._depends_on_mask(node)):
            self._unknown.append(_told(node))
        elif _is_elementwise(node):
            self._read_elementwise(node)

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
        elif not self._is_affine(node) or (node.target in PRODUCTS and len(node.all_input_nodes) < _count(node)):
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
        if node.target in IDENTITIES | SUMS | PRODUCTS | {aten.neg.default, aten.addcmul.default}:
            return True
        if node.target in QUOTIENTS:
            return node.args[0] in self._varying and node.args[1] not in self._varying
        if node.target in CHOICES:
            return node.args[0] not in self._varying
        return node.target in FILLS and node.args[1] not in self._varying

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
        if reader.target in REDUCTIONS:
            return self._is_factor(reader, True)
        if reader.target in SHAPING or (reader in self._argument and not _is_named(reader)):
            return self._is_factor(reader, weighing or _may_weigh(reader))
        if reader.target in QUOTIENTS:
            return weighing or node is not reader.args[0]
        return reader.target in PRODUCTS and weighing

    def _evaluated(self, node: fx.Node, argument: fx.Node, probe: Tensor) -> Tensor | None:
        """The value of an element-wise function at `probe`, None where constants have a shape of their own."""

        @cache
        def value(one: fx.Node) -> Any:
            if one is argument:
                return probe
            if one in self._varying or one.target in CONSTANTS:
                args, kwargs = fx.map_arg((one.args, one.kwargs), value)
                operation: Any = one.target
                return operation(*args, **kwargs)
            if one.target in (aten.full.default, aten.zeros.default):
                return float(one.args[1]) if one.target is aten.full.default else 0.0  # type: ignore[arg-type]
            raise LookupError(one)

        try:
            result = value(node)
        except (LookupError, RuntimeError, TypeError):
            return None
        return result if isinstance(result, Tensor) else None


def _is_foreign(node: fx.Node) -> bool:
    """Whether the operation is none of torch's own, or holds a graph of its own."""
    foreign = isinstance(node.target, torch._ops.OpOverload) and node.target.namespace not in OWN
    return foreign or isinstance(node.target, torch._ops.HigherOrderOperator)


def _is_elementwise(node: fx.Node) -> bool:
    operation = node.target
    return operation in UNTAGGED or (
        isinstance(operation, torch._ops.OpOverload) and torch.Tag.pointwise in operation.tags
    )


def _is_named(node: fx.Node) -> bool:
    """Whether the operation is a whole activation function; relu6(x + 3) / 6 is a hard sigmoid instead."""
    if node.target not in NAMED:
        return False
    if node.target not in BOUNDED or len(node.users) != 1:
        return True
    (reader,) = node.users
    scaled = reader.target in QUOTIENTS | PRODUCTS and len(reader.all_input_nodes) == 1
    return not (scaled and node.all_input_nodes[0].target in SUMS)


def _may_weigh(node: fx.Node) -> bool:
    """Whether the operation makes a gate where its value only multiplies another one."""
    return node.target in WEIGHING or (
        node.target is aten.clamp.default and None not in node.args and _count(node) == 1 and len(node.args) == 3
    )


def _is_floating(node: fx.Node) -> bool:
    value = node.meta.get("val")
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
