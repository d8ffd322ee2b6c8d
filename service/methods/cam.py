"""Class activation mapping (Zhou et al. 2016)."""

from __future__ import annotations

import re
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx

from service.explain.mathematics import channels_weighted
from service.explain.method import WeightedCam, WeightedCamParams, register
from service.explain.trace import Trace
from service.models.grids import Grid
from service.models.layers import Target, module_of
from service.models.program import Program, is_size

aten = torch.ops.aten

RESHAPES = frozenset(
    {
        aten.view.default,
        aten._unsafe_view.default,
        aten.reshape.default,
        aten.flatten.using_ints,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.clone.default,
    }
)
LINEAR: dict[Any, tuple[int, int]] = {  # where its input and its weight are among its arguments
    aten.linear.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.mm.default: (0, 1),
    aten.matmul.default: (0, 1),
}
NEEDS = "only global average pooling and one linear layer may stand between the layer and the scores"


@register
class Cam(WeightedCam):
    name = "cam"
    paper = "https://arxiv.org/abs/1512.04150"
    description = "Feature maps of the last layer, weighted by the classifier's own weights for the class."
    cost = "one forward pass"

    def refusal(self, program: Program, target: Target | None) -> str | None:
        assert target is not None
        found = _classifier(program, target)
        return None if isinstance(found, fx.Node) else f"{NEEDS}, but {found}"

    def weighted(self, trace: Trace, params: WeightedCamParams) -> Tensor:
        """W[c,k] A_k, the summands of eq. 2 of the paper."""
        found = _classifier(trace.program, trace.target)
        assert isinstance(found, fx.Node), found
        weight: Tensor = _constant(found.args[LINEAR[found.target][1]], trace.program)
        of_class = weight if found.target is aten.linear.default else weight.mT
        return channels_weighted(trace.activation, of_class.detach()[trace.classes])


def _classifier(program: Program, target: Target) -> fx.Node | str:
    """The linear layer that reads the target's pooled activation and gives the logits, or why there is none."""
    if target.grid.prefix:
        return "its class token has no place in the picture"
    needed = program.ancestors([program.logits])
    node, places = target.node, _places(target.grid)
    while node is not program.logits:
        users = [user for user in node.users if user in needed and not is_size(user)]
        if len(users) > 1:
            return f"{len(users)} paths lead on from {_told(node)}"
        (user,) = users
        if places and user.target is aten.permute.default:
            places = _permuted(places, user)
        elif places and _pools(user, places):
            places = frozenset()
        elif not places and user is program.logits and _is_linear(user, node, program):
            return user
        elif places or user.target not in RESHAPES:
            return f"{_told(user)} does"
        node = user
    return "no linear layer does"


def _told(node: fx.Node) -> str:
    """The operation, without the number of its call, and the module that has it."""
    operation, module = re.sub(r"_\d+$", "", node.name), module_of(node)
    return f"{operation} in {module!r}" if module else operation


def _places(grid: Grid) -> frozenset[int]:
    """The dimensions of the value that are places of the picture."""
    if grid.prefix is not None:
        return frozenset({1})
    return frozenset({1, 2} if grid.channel_axis == 3 else {2, 3})


def _permuted(places: frozenset[int], permute: fx.Node) -> frozenset[int]:
    order: Any = permute.args[1]
    return frozenset(new for new, old in enumerate(order) if old % len(order) in places)


def _pools(node: fx.Node, places: frozenset[int]) -> bool:
    """Whether the node is the mean over exactly the places."""
    if node.target in (aten.adaptive_avg_pool2d.default, aten._adaptive_avg_pool2d.default):
        sizes: Any = node.args[1]
        return places == {2, 3} and list(sizes) == [1, 1]
    if node.target is not aten.mean.dim:
        return False
    dims: Any = node.args[1] or ()
    return {dim % node.all_input_nodes[0].meta["val"].ndim for dim in dims} == places


def _is_linear(node: fx.Node, of: fx.Node, program: Program) -> bool:
    """Whether the node multiplies a matrix of constants with the value of the node before it."""
    if node.target not in LINEAR or node.kwargs:
        return False
    value, weight = (node.args[place] for place in LINEAR[node.target])
    return value is of and weight not in program.tainted


def _constant(node: Any, program: Program) -> Any:
    """The value of a node that does not depend on the pictures."""
    if node.op == "get_attr":
        return attrgetter(node.target)(program.source)
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda one: _constant(one, program))
    return node.target(*args, **kwargs)
