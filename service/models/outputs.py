"""What a network returns: the squashing function that its graph ends in, the logits before it, a check on numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

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
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.to.dtype,
    aten._to_copy.default,
    aten.dropout.default,
}
"""Operations after a squashing function that leave each score what it is, or only bound it."""
TOLERANCE = 1e-3
"""By how much the sum of a softmax's row may differ from 1."""


def logits_of(graph: fx.Graph, activation: str) -> fx.Node:
    """The scores before a trailing softmax or sigmoid, in the shape of the output; the graph is changed for that.

    Raises ModelLoadError where the graph ends in something else than `activation` says.
    """
    output = _output(graph)
    behind = list(_passed(output))
    squashing = behind.pop()
    ending = next((name for name, targets in SQUASHING.items() if squashing.target in targets), "logits")
    if ending != activation:
        raise ModelLoadError(f"the network ends in {ending}, but output.activation says {activation!r}")
    if ending == "logits":
        return output
    if ending == "softmax" and _runs_over_the_batch(squashing):
        raise ModelLoadError("the network's softmax runs over the batch (dimension 0), not over the classes")
    return _without(squashing, behind)


def check_scores(scores: Tensor, activation: str) -> None:
    """Check what the eager network returns for pictures of noise, (N,classes), against what it is declared to be.

    Raises ModelLoadError where the rows of a softmax (or their exponentials) don't sum to 1, or those of logits do.
    """
    values = scores.double()
    sums_to_one = any(bool(((rows.sum(dim=1) - 1).abs() < TOLERANCE).all()) for rows in (values, values.exp()))
    if activation == "softmax" and not sums_to_one:
        raise ModelLoadError("output.activation says 'softmax', but the network's scores of a picture don't sum to 1")
    if activation == "logits" and sums_to_one and scores.shape[1] > 1:
        raise ModelLoadError(
            "output.activation says 'logits', but the network's scores of a picture sum to 1 as those of a softmax do"
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
