"""What a network returns: the squashing function that its graph ends in, the logits before it, a check on numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, fx

from service.errors import ModelLoadError

aten = torch.ops.aten

Confidence = Literal["softmax", "sigmoid"]
LOGARITHMS = frozenset({aten.log_softmax.int, aten._log_softmax.default})
SQUASHING = {  # the logarithm of a softmax is not the logit either
    "softmax": frozenset({aten.softmax.int, aten._softmax.default}) | LOGARITHMS,
    "sigmoid": frozenset({aten.sigmoid.default}),
}
CLAMPS = frozenset({aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default})
PASSING = CLAMPS | {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.numpy_T.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.to.dtype,
    aten._to_copy.default,
    aten.dropout.default,
}
"""Operations after a squashing function that leave each score what it is, or only bound it."""
SUMMING = frozenset({aten.add.Tensor, aten.sub.Tensor, aten.rsub.Scalar, aten.mul.Tensor, aten.cat.default})
SUMMING |= {aten.stack.default, aten.mean.dim, aten.sum.dim_IntList, aten.log.default, aten.neg.default}
"""Operations that make scores of nothing but probabilities where all of their varying inputs are such."""
TOLERANCE = 1e-3
"""By how much the sum of a softmax's row may differ from 1."""


def logits_of(graph: fx.Graph, activation: str) -> fx.Node:
    """The scores before a trailing softmax or sigmoid, in the shape of the output; the graph is changed for that.

    Raises ModelLoadError where the graph ends in something else than `activation` says.
    """
    output = _output(graph)
    behind = list(_passed(output))
    squashing = behind.pop()
    _check_no_more(squashing)
    ending = next((name for name, targets in SQUASHING.items() if squashing.target in targets), "logits")
    if ending != activation:
        raise ModelLoadError(f"the network ends in {ending}, but output.activation says {activation!r}")
    if ending == "logits":
        return output
    if ending == "softmax" and _runs_over_the_batch(squashing):
        raise ModelLoadError("the network's softmax runs over the batch (dimension 0), not over the classes")
    if ending == "softmax" and not _sums_to_one(squashing, behind):
        raise _probabilities(squashing, output)
    return _without(squashing, behind)


def check_scores(scores: Tensor, activation: str) -> None:
    """Check what the eager network returns for pictures of noise, (N,classes), against what it is declared to be.

    Raises ModelLoadError where the rows of logits (or their exponentials) sum to 1. A softmax is told by the graph.
    """
    values = scores.double()
    sums_to_one = any(bool(((rows.sum(dim=1) - 1).abs() < TOLERANCE).all()) for rows in (values, values.exp()))
    if activation == "logits" and sums_to_one and scores.shape[1] > 1:
        raise ModelLoadError(
            "output.activation says 'logits', but the network's scores of a picture sum to 1 as those of a softmax do: "
            "let it return logits"
        )


def confidence_of(activation: str, declared: Confidence | None, classes: int) -> Confidence:
    """How confidences are made of logits: as declared, else by what the network ends in.

    Raises ModelLoadError for a softmax over one class that was not declared: it is 1 whatever the picture shows.
    """
    confidence: Confidence = declared or ("sigmoid" if activation == "sigmoid" else "softmax")
    if classes == 1 and declared is None and confidence == "softmax":
        raise ModelLoadError(
            "the network has one class, whose softmax is 1 for every picture: declare output.confidence = 'sigmoid' "
            "if the sigmoid of its score is the probability"
        )
    return confidence


def _output(graph: fx.Graph) -> fx.Node:
    (outputs,) = graph.output_node().args
    if isinstance(outputs, tuple | list) and len(outputs) == 1:
        outputs = outputs[0]
    if not isinstance(outputs, fx.Node):
        raise ModelLoadError("the network returns more than one value; a classifier returns one tensor of scores")
    return outputs


def _passed(node: fx.Node) -> Iterator[fx.Node]:
    """The operations from the output back to the first one that makes the scores."""
    yield node
    while node.target in PASSING:
        node = node.all_input_nodes[0]
        yield node


def _check_no_more(made: fx.Node) -> None:
    """Raises ModelLoadError where the output is made of probabilities in a way that cannot be taken off."""
    if not _squashes(made) and (squashing := _squashed(made)) is not None:
        raise _probabilities(squashing, made)


def _squashes(node: fx.Node) -> bool:
    return any(node.target in targets for targets in SQUASHING.values())


def _squashed(node: fx.Node) -> fx.Node | None:
    """A squashing function, where nothing but such functions makes the value; None where anything else does."""
    if _squashes(node):
        return node
    scaled = node.target is aten.div.Tensor and isinstance(node.args[1], int | float)
    if node.target not in PASSING | SUMMING and not scaled:
        return None
    sources = [source for source in node.all_input_nodes if _varies(source)]
    found = [_squashed(source) for source in sources]
    return found[0] if found and None not in found else None


def _varies(node: fx.Node) -> bool:
    return node.op == "call_function" and isinstance(node.meta.get("val"), Tensor)


def _probabilities(squashing: fx.Node, last: fx.Node) -> ModelLoadError:
    made = dict.fromkeys((str(squashing.target), str(last.target)))
    return ModelLoadError(f"the network returns probabilities made by {' and '.join(made)}; let it return logits")


def _sums_to_one(softmax: fx.Node, behind: list[fx.Node]) -> bool:
    """Whether the classes of the output are those that the softmax runs over, told by numbers before any bounds."""
    shape = [_at_two(size) for size in softmax.meta["val"].shape]
    rows = torch.randn(shape, dtype=torch.float64).softmax(int(str(softmax.args[1])))
    last = softmax
    for node in reversed(behind):
        if node.target not in CLAMPS and node.target not in (aten.to.dtype, aten._to_copy.default):
            known = {last: rows}
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda one: known.get(one, _at_two(one.meta["val"])))  # noqa: B023
            operation: Any = node.target
            rows = operation(*args, **kwargs)
        last = node
    return rows.ndim != 2 or bool(((rows.sum(dim=1) - 1).abs() < TOLERANCE).all())


def _at_two(size: Any) -> Any:
    """A size for a batch of two pictures."""
    if not isinstance(size, torch.SymInt):
        return size
    expression = size.node.expr
    return int(expression.xreplace(dict.fromkeys(expression.free_symbols, 2)))


def _runs_over_the_batch(softmax: fx.Node) -> bool:
    dimension = softmax.args[1]
    return isinstance(dimension, int) and dimension % softmax.meta["val"].ndim == 0


def _without(squashing: fx.Node, behind: list[fx.Node]) -> fx.Node:
    """The input of the squashing function after the operations `behind` it, last first, bounds left out."""
    last = squashing.all_input_nodes[0]
    for node in reversed(behind):
        if node.target not in CLAMPS:
            node.replace_input_with(node.all_input_nodes[0], last)
            last = node
    return last
