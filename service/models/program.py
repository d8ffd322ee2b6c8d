"""A captured network: one pure graph from images to logits, which can be cut at a node or rewritten.

Nothing is ever registered on a module and no `.grad` is written: two requests cannot see each other.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from service.errors import ModelLoadError

logger = logging.getLogger(__name__)

aten = torch.ops.aten

ACTIVATIONS = frozenset(
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
    }
)
REASON_LENGTH = 400
SQUASHING = {  # the logarithm of a softmax is not the logit either
    "softmax": (aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default),
    "sigmoid": (aten.sigmoid.default,),
}


def _copy_out_of_place(self: Tensor, source: Tensor, _non_blocking: bool = False) -> Tensor:
    """`copy_` as a value: without it the backward of networks that write into slices (MViT) fails."""
    return source.to(self.dtype).expand(self.shape).clone()


def capture(module: nn.Module, example: Tensor, file: Path | None = None) -> fx.GraphModule:
    """Capture `module` as a functional graph with a free batch size.

    `example` is a batch of two or more, (N,3,H,W). The graph is kept in `file`, or taken from it if it is there.
    Raises ModelLoadError where the network cannot be captured.
    """
    if file is not None and (kept := _kept(file)) is not None:
        return kept
    batch = torch.export.Dim("batch", min=1, max=1 << 16)
    try:
        program = torch.export.export(module, (example,), dynamic_shapes=({0: batch},), strict=False)
        program = program.run_decompositions({aten.copy.default: _copy_out_of_place})
    except Exception as error:
        reason = " ".join(str(error).split())[:REASON_LENGTH]
        raise ModelLoadError(f"torch.export cannot capture the network: {type(error).__name__}: {reason}") from error
    if file is not None:
        _keep(program, file)
    return _module(program)


def _kept(file: Path) -> fx.GraphModule | None:
    """What an earlier process captured. A file that cannot be read costs a new capture, and nothing else."""
    try:
        return _module(torch.export.load(file)) if file.exists() else None
    except Exception:
        logger.warning("the captured program %s cannot be read", file, exc_info=True)
        return None


def _keep(program: torch.export.ExportedProgram, file: Path) -> None:
    partial = file.with_suffix(f".{threading.get_native_id()}.pt2")
    try:
        torch.export.save(program, partial)
        partial.replace(file)
    except Exception:
        logger.warning("the captured program could not be kept in %s", file, exc_info=True)


def _module(program: torch.export.ExportedProgram) -> fx.GraphModule:
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    return module


@dataclass(frozen=True)
class Split:
    """A network cut at one node. `head`: images to (activation, *crossing); `tail`: these to the logits."""

    head: fx.GraphModule
    tail: fx.GraphModule


class Program:
    """A captured network and what is made of it: cuts and the guided rewrite, made once and kept."""

    def __init__(self, graph_module: fx.GraphModule, activation: str = "logits") -> None:
        """`activation` says what the network returns; a trailing softmax or sigmoid is cut off.

        Raises ModelLoadError where the output is not one score per class.
        """
        self.source = graph_module
        self.nodes: tuple[fx.Node, ...] = tuple(graph_module.graph.nodes)
        self.images = next(node for node in self.nodes if node.op == "placeholder")
        self._batch: torch.SymInt = self.images.meta["val"].shape[0]
        self.logits = _logits(graph_module.graph, activation)
        self._check_scores()
        self.tainted = self.descendants(self.images)
        self.forward = self._subgraph([self.images], [self.logits])
        self._splits: dict[fx.Node, Split] = {}
        self._guided: fx.GraphModule | None = None
        self._lock = threading.Lock()

    @property
    def num_classes(self) -> int:
        return int(self.logits.meta["val"].shape[1])

    def split(self, node: fx.Node) -> Split:
        """The network cut at `node`. Parallel branches cross the cut: the tail holds what depends on the node alone."""
        with self._lock:
            if node not in self._splits:
                crossing = self.crossing(node)
                self._splits[node] = Split(
                    head=self._subgraph([self.images], [node, *crossing]),
                    tail=self._subgraph([node, *crossing], [self.logits]),
                )
            return self._splits[node]

    def guided(self) -> fx.GraphModule:
        """The network with every activation function's output gradient clipped at 0 (guided backpropagation).

        For a ReLU this is the paper's rule relu(g)·1[x>0] (Springenberg et al. 2015); every other activation
        function gets the same gate in front of its own derivative.
        """
        with self._lock:
            if self._guided is None:
                self._guided = self._subgraph([self.images], [self.logits], after=dict.fromkeys(ACTIVATIONS, gate))
            return self._guided

    def descendants(self, node: fx.Node) -> frozenset[fx.Node]:
        """All nodes whose value depends on that of `node` (itself too); sizes don't count."""
        found = {node}
        for other in self.nodes:
            if not is_size(other) and any(source in found for source in other.all_input_nodes):
                found.add(other)
        return frozenset(found)

    def crossing(self, node: fx.Node) -> list[fx.Node]:
        """Values of the images beside `node` that the scores need too, in the order of the graph."""
        behind = self.descendants(node)
        needed = self.ancestors([self.logits], stop=frozenset({node}))
        used = {source for user in needed & behind if user is not node for source in user.all_input_nodes}
        if self.logits not in behind:
            used.add(self.logits)
        return [other for other in self.nodes if other in used and other in self.tainted and other not in behind]

    def is_batched(self, node: fx.Node) -> bool:
        """Whether dimension 0 of the node's value is exactly the batch."""
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.ndim == 0:
            return False
        first: torch.SymInt | int = value.shape[0]
        return isinstance(first, torch.SymInt) and bool(first.node.expr == self._batch.node.expr)

    def _check_scores(self) -> None:
        value = self.logits.meta["val"]
        if not isinstance(value, Tensor) or value.ndim != 2:
            raise ModelLoadError("the network's output is no (batch, classes) tensor of scores")
        if not self.is_batched(self.logits):
            raise ModelLoadError("the batch does not pass through the network: its output has another first dimension")

    def ancestors(self, nodes: Iterable[fx.Node], stop: frozenset[fx.Node] = frozenset()) -> set[fx.Node]:
        """All nodes that the values of `nodes` depend on (themselves too), not looking behind `stop`."""
        found: set[fx.Node] = set()
        waiting = list(nodes)
        while waiting:
            node = waiting.pop()
            if node in found:
                continue
            found.add(node)
            if node not in stop and not self._is_batch_size(node):
                waiting.extend(node.all_input_nodes)
        return found

    def _is_batch_size(self, node: fx.Node) -> bool:
        return node.target is aten.sym_size.int and node.args[0] is self.images

    def _subgraph(
        self,
        inputs: Sequence[fx.Node],
        outputs: Sequence[fx.Node],
        after: dict[Any, Callable[[Tensor], Tensor]] | None = None,
    ) -> fx.GraphModule:
        """The part between `inputs` and `outputs` over the same weights, with `after[op]` behind each such operation.

        The first input carries the batch in dimension 0: sizes are read off it. One output is returned bare.
        """
        graph = fx.Graph()
        new: dict[fx.Node, fx.Node] = {node: graph.placeholder(node.name) for node in inputs}
        needed = self.ancestors(outputs, stop=frozenset(inputs))
        for node in self.nodes:
            if node not in needed or node in new:
                continue
            if self._is_batch_size(node):
                new[node] = graph.call_function(aten.sym_size.int, (new[inputs[0]], 0))
                continue
            new[node] = graph.node_copy(node, new.__getitem__)
            if after and node.target in after:
                new[node] = graph.call_function(after[node.target], (new[node],))
        results = tuple(new[node] for node in outputs)
        graph.output(results if len(results) > 1 else results[0])
        return fx.GraphModule(self.source, graph)


def is_size(node: fx.Node) -> bool:
    """Whether the node is a number (a size, or arithmetic on sizes) rather than a tensor."""
    return isinstance(node.meta.get("val"), torch.SymInt | int)


def _logits(graph: fx.Graph, activation: str) -> fx.Node:
    (outputs,) = graph.output_node().args
    if isinstance(outputs, tuple | list) and len(outputs) == 1:
        outputs = outputs[0]
    if not isinstance(outputs, fx.Node):
        raise ModelLoadError("the network returns more than one value; a classifier returns one tensor of scores")
    ending = next((name for name, targets in SQUASHING.items() if outputs.target in targets), "logits")
    if ending != activation:
        raise ModelLoadError(f"the network ends in {ending}, but output.activation says {activation!r}")
    return outputs if ending == "logits" else outputs.all_input_nodes[0]


def gradient_of(total: Tensor, at: Tensor) -> Tensor:
    """The gradient of a number at a tensor, 0 where the network lets none through; the graph is kept."""
    if not total.requires_grad:
        return torch.zeros_like(at)
    return torch.autograd.grad(total, at, retain_graph=True, materialize_grads=True)[0]


class _Gate(torch.autograd.Function):
    """The identity whose gradient is clipped at 0."""

    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(_ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].clamp(min=0)


def gate(x: Tensor) -> Tensor:
    """`x`, whose gradient passes where it is positive."""
    result: Tensor = _Gate.apply(x)
    return result
