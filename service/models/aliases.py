"""Operations under one name: torch keeps the aliases of an operation, and a capture keeps what the network wrote."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

NAMES = {
    "absolute": "abs",
    "clip": "clamp",
    "concat": "cat",
    "concatenate": "cat",
    "divide": "div",
    "fix": "trunc",
    "greater": "gt",
    "greater_equal": "ge",
    "less": "lt",
    "less_equal": "le",
    "multiply": "mul",
    "negative": "neg",
    "not_equal": "ne",
    "special_expit": "sigmoid",
    "special_gammainc": "igamma",
    "special_gammaincc": "igammac",
    "special_gammaln": "lgamma",
    "special_multigammaln": "mvlgamma",
    "special_psi": "digamma",
    "subtract": "sub",
    "true_divide": "div",
    **{f"arc{name}": f"a{name}" for name in ("cos", "cosh", "sin", "sinh", "tan", "tan2", "tanh")},
    **{
        f"special_{name}": name
        for name in (
            *("digamma", "erf", "erfc", "erfinv", "exp2", "expm1", "i0", "log1p", "logit", "logsumexp", "polygamma"),
            "sinc",
        )
    },
}
"""Names of the same operations with the same overloads."""
OVERLOADS = {
    aten.max.other: aten.maximum.default,
    aten.min.other: aten.minimum.default,
    aten.special_log_softmax.default: aten.log_softmax.int,
    aten.special_softmax.default: aten.softmax.int,
    aten.special_xlogy.default: aten.xlogy.Tensor,
    aten.special_xlogy.other_scalar: aten.xlogy.Scalar_Other,
    aten.special_xlogy.self_scalar: aten.xlogy.Scalar_Self,
}


def unify(module: fx.GraphModule) -> None:
    """Give every operation of a captured graph its one name; the values stay what they are."""
    for node in module.graph.nodes:
        node.target = _base(node.target)
    module.recompile()


def _base(target: Any) -> Any:
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return target
    if target in OVERLOADS:
        return OVERLOADS[target]
    name = NAMES.get(target._opname)
    return getattr(getattr(aten, name), target._overloadname) if name else target
