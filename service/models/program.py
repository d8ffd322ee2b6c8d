"""A captured network: one pure graph from images to logits, which can be cut at a node or rewritten.

Nothing is ever registered on a module and no `.grad` is written: two requests cannot see each other.
"""

from __future__ import annotations

import functools
import io
import logging
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from service.errors import ModelLoadError
from service.models import kept
from service.models.aliases import unify
from service.models.grids import Grid
from service.models.noise import Noise
from service.models.nonlinearities import Nonlinearities
from service.models.outputs import Confidence, logits_of

logger = logging.getLogger(__name__)

aten = torch.ops.aten

Rule = Literal["guided", "deconv"]
"""How activation functions pass gradients: by the rule of guided backpropagation, or of a deconvolution network."""
REASON_LENGTH = 400
MAX_SPLITS = 64


def _copy_out_of_place(self: Tensor, source: Tensor, _non_blocking: bool = False) -> Tensor:
    """`copy_` as a value: without it the backward of networks that write into slices (MViT) fails."""
    return source.to(self.dtype).expand(self.shape).clone()


def capture(module: nn.Module, example: Tensor, file: Path | None = None) -> fx.GraphModule:
    """Capture `module` as a functional graph with a free batch size.

    `example` is a batch of two or more, (N,3,H,W). The graph is kept in `file`, or taken from it if it is there.
    Raises ModelLoadError where the network cannot be captured.
    """
    if file is not None and (known := _kept(file)) is not None:
        return known
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
    """What an earlier process captured. A file that is damaged or cannot be read costs a new capture, and no more."""
    if (data := kept.read(file)) is None:
        return None
    try:
        return _module(torch.export.load(io.BytesIO(data)))
    except Exception:
        logger.warning("the captured program %s cannot be loaded", file, exc_info=True)
        return None


def _keep(program: torch.export.ExportedProgram, file: Path) -> None:
    """Without the file each process captures the network anew, which takes longer and changes nothing."""
    memory = io.BytesIO()  # torch's writer aborts the process where a file has no room
    try:
        torch.export.save(program, memory)
        kept.write(file, memory.getbuffer())
    except Exception as error:
        kept.say_not_kept(f"{file.parent}: {getattr(error, 'strerror', None) or error}")


def _module(program: torch.export.ExportedProgram) -> fx.GraphModule:
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    unify(module)
    return module


@dataclass(frozen=True)
class Split:
    """A network cut at some of its nodes, the targets.

    `head`: images to (*roots, *crossing), bare if that is one value; `tail`: these to (logits, *later), or the bare
    logits. Roots are the targets that depend on no other target, `later` the others. Crossing are the values of the
    images beside the targets that the tail needs. `separable`: dimension 0 of each value at the cut is the batch.
    """

    head: fx.GraphModule
    tail: fx.GraphModule
    roots: tuple[fx.Node, ...]
    later: tuple[fx.Node, ...]
    crossing: tuple[fx.Node, ...]
    separable: bool


class Program:
    """A captured network and what is made of it: cuts, and rewrites with other gradients, made once and kept."""

    def __init__(
        self,
        graph_module: fx.GraphModule,
        activation: str = "logits",
        confidence: Confidence | None = None,
        noise: Noise | None = None,
    ) -> None:
        """`activation` says what the network returns; a trailing softmax or sigmoid is cut off.

        `confidence` says how probabilities are made of the logits, None: by what the network ends in. `noise` makes the
        pictures on which the network is tried.

        Raises ModelLoadError where the output is not one score per class.
        """
        self.source = graph_module
        self.noise = noise or Noise()
        self.places: dict[str, Grid | str] = {}
        """Where the places of nodes lie in the picture as far as that is known, by the node's name."""
        self.logits = logits_of(graph_module.graph, activation)
        self.nodes: tuple[fx.Node, ...] = tuple(graph_module.graph.nodes)
        self.images = next(node for node in self.nodes if node.op == "placeholder")
        self._batch: torch.SymInt = self.images.meta["val"].shape[0]
        self._check_scores()
        self.tainted = self.descendants(self.images)
        self._order = {node: index for index, node in enumerate(self.nodes)}
        self._confidence = confidence or ("sigmoid" if activation == "sigmoid" else "softmax")
        self._split = functools.lru_cache(MAX_SPLITS)(self._cut)
        self._observed = functools.lru_cache(MAX_SPLITS)(self._observe)
        self._lock = threading.Lock()

    @functools.cached_property
    def nonlinearities(self) -> Nonlinearities:
        """The network's activation functions, and what of it is not understood as one."""
        return Nonlinearities(self.images, self.ancestors([self.logits]))

    @property
    def num_classes(self) -> int:
        return int(self.logits.meta["val"].shape[1])

    def confidences(self, logits: Tensor) -> Tensor:
        """Probabilities (N,classes): softmax, or sigmoid where the classes are independent."""
        return logits.sigmoid() if self._confidence == "sigmoid" else logits.softmax(dim=1)

    def split(self, *targets: fx.Node, rule: Rule | None = None) -> Split:
        """The network cut at `targets`, kept for the next time; the tail holds what depends on them.

        Without targets the head is the whole network. With a rule activation functions pass gradients by it.
        """
        nodes = tuple(sorted(set(targets), key=self._order.__getitem__))
        with self._lock:
            return self._split(nodes, rule)

    def network(self, rule: Rule | None = None) -> fx.GraphModule:
        """The whole network, from images to logits.

        `guided` clips the output gradient of every activation function at 0: for a ReLU this is the paper's rule
        relu(g)·1[x>0] (Springenberg et al. 2015); every other activation function gets the same gate in front of its
        own derivative. `deconv` gives a ReLU the gradient relu(g) (Zeiler and Fergus 2014), and the others the gate.
        What an activation function is, `nonlinearities` tells; a function of several operations gets one gate.
        """
        return self.split(rule=rule).head

    def observed(self, *nodes: fx.Node) -> fx.GraphModule:
        """The whole network, from images to (logits, *values of the nodes)."""
        with self._lock:
            return self._observed(nodes)

    def _cut(self, nodes: tuple[fx.Node, ...], rule: Rule | None) -> Split:
        behind = {node: self.descendants(node) for node in nodes}
        later = tuple(node for node in nodes if any(node in behind[other] for other in nodes if other is not node))
        roots = tuple(node for node in nodes if node not in later)
        crossing = tuple(self.crossing(*roots))
        return Split(
            head=self._subgraph([self.images], [*roots, *crossing], rule),
            tail=self._subgraph([*roots, *crossing], [self.logits, *later], rule),
            roots=roots,
            later=later,
            crossing=crossing,
            separable=all(self.is_batched(node) for node in (*roots, *crossing)),
        )

    def _observe(self, nodes: tuple[fx.Node, ...]) -> fx.GraphModule:
        return self._subgraph([self.images], [self.logits, *nodes])

    def descendants(self, *nodes: fx.Node) -> frozenset[fx.Node]:
        """All nodes whose value depends on one of `nodes` (these too); sizes don't count."""
        found = set(nodes)
        for other in self.nodes:
            if not is_size(other) and any(source in found for source in other.all_input_nodes):
                found.add(other)
        return frozenset(found)

    def crossing(self, *roots: fx.Node) -> list[fx.Node]:
        """Values of the images beside `roots` that what follows them needs too, in the order of the graph."""
        behind = self.descendants(*roots)
        needed = self.ancestors([self.logits], stop=frozenset(roots))
        used = {source for user in needed & behind if user not in roots for source in user.all_input_nodes}
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

    def _relu_argument(self, node: fx.Node) -> fx.Node | None:
        return self.nonlinearities.relu_argument(node) if node in self.nonlinearities.gated else None

    def _is_batch_size(self, node: fx.Node) -> bool:
        return node.target is aten.sym_size.int and node.args[0] is self.images

    def _subgraph(
        self, inputs: Sequence[fx.Node], outputs: Sequence[fx.Node], rule: Rule | None = None
    ) -> fx.GraphModule:
        """The part between `inputs` and `outputs` over the same weights, whose gradients follow the rule.

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
            elif rule == "deconv" and (argument := self._relu_argument(node)) in new:
                new[node] = graph.call_function(deconv_relu, (new[argument], graph.node_copy(node, new.__getitem__)))
            else:
                new[node] = graph.node_copy(node, new.__getitem__)
                if node.target is aten.view.default:  # which refuses values that lie in memory otherwise than captured
                    new[node].target = aten.reshape.default
                if rule and node in self.nonlinearities.gated:
                    new[node] = graph.call_function(gate, (new[node],))
        results = tuple(new[node] for node in outputs)
        graph.output(results if len(results) > 1 else results[0])
        return fx.GraphModule(self.source, graph)


def is_size(node: fx.Node) -> bool:
    """Whether the node is a number (a size, or arithmetic on sizes) rather than a tensor."""
    return isinstance(node.meta.get("val"), torch.SymInt | int)


def as_tuple(values: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What a head or a tail returns, bare or not."""
    return (values,) if isinstance(values, Tensor) else tuple(values)


def gradients_of(total: Tensor, at: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The gradient of a number at each tensor, 0 where the network lets none through; the graph is kept."""
    tracked = [tensor for tensor in at if total.requires_grad and tensor.requires_grad]
    if not tracked:
        return tuple(torch.zeros_like(tensor) for tensor in at)
    found = iter(torch.autograd.grad(total, tracked, retain_graph=True, materialize_grads=True))
    return tuple(next(found) if tensor.requires_grad else torch.zeros_like(tensor) for tensor in at)


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


class _DeconvRelu(torch.autograd.Function):
    """A ReLU's value with the gradient relu(g) to its argument, whatever that was."""

    @staticmethod
    def forward(_ctx: Any, _argument: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(_ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].clamp(min=0), None


def deconv_relu(argument: Tensor, value: Tensor) -> Tensor:
    """`value`, which is the ReLU of `argument`, as a deconvolution network has it."""
    result: Tensor = _DeconvRelu.apply(argument, value)
    return result
