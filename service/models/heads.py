"""The heads of one model: from images to the values at a cut, each by the fastest means at hand."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from service.errors import InvalidRequest
from service.models.activations import ActivationCache, Values
from service.models.compiled import CompiledHead
from service.models.layers import LayerTable, Target
from service.models.program import MAX_SPLITS, Program, Split, as_tuple
from service.models.spec import Precision

logger = logging.getLogger(__name__)

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Head:
    """What comes before one cut of a network. Its means are swapped while others run it: each call reads them once."""

    def __init__(
        self,
        targets: tuple[Target, ...],
        exact: Split,
        reduced: Split | None,
        precision: Precision,
    ) -> None:
        """`targets` are those at the roots of the cut; `reduced` is the same cut of the network in `precision`."""
        self.targets = targets
        self.precision: Precision = precision if reduced else "fp32"
        self.dtype = DTYPES[self.precision]
        self.eager = reduced.head if reduced else exact.head
        self.compiled: CompiledHead | None = None
        self.separable = exact.separable
        self.uses = 0
        self.last_used = 0.0

    @property
    def name(self) -> str:
        """The layers of the cut; "scores" where the head is the whole network."""
        layers = (f"{target.name}{'' if target.use_conv_only else ' (ReLU)'}" for target in self.targets)
        return " + ".join(layers) or "scores"

    @property
    def eps(self) -> float:
        """Of the dtype in which it runs."""
        return torch.finfo(self.dtype).eps

    def __call__(self, images: Tensor) -> Values:
        """The values at the cut, roots and crossings, raised to fp32, of images (N,3,H,W)."""
        compiled = self.compiled
        if compiled is None or not compiled.takes(len(images)):
            return raised(self.eager, images.to(self.dtype))
        return raised(compiled, images.to(self.dtype))


def raised(head: Callable[[Tensor], Tensor | Sequence[Tensor]], images: Tensor) -> Values:
    """What a head in any precision makes of images, its floating-point values in fp32."""
    with torch.no_grad():
        return tuple(value.float() if value.is_floating_point() else value for value in as_tuple(head(images)))


class Heads:
    """The heads of one model that were asked for, made once; beyond MAX_SPLITS the least recently used are dropped."""

    def __init__(
        self,
        program: Program,
        precision: Precision = "fp32",
        reduced: tuple[Program, LayerTable] | None = None,
        activations: ActivationCache | None = None,
        revision: str = "",
    ) -> None:
        """`reduced` is the network captured anew in `precision`, None for fp32.

        `activations` may be shared with models of other revisions.
        """
        self.on_use: Callable[[Head], None] = lambda _head: None
        self._program = program
        self._precision: Precision = precision
        self._reduced = reduced
        self._activations = activations or ActivationCache(0)
        self._revision = revision
        self._made: OrderedDict[tuple[fx.Node, ...], Head] = OrderedDict()
        self._lock = threading.Lock()

    def at(self, *targets: Target) -> Head:
        """The head before the cut at `targets`."""
        split = self._program.split(*(target.node for target in targets))
        key = (*split.roots, *split.crossing)
        with self._lock:
            if key not in self._made:
                by_node = {target.node: target for target in targets}
                self._made[key] = self._make(tuple(by_node[node] for node in split.roots), split)
            self._made.move_to_end(key)
            if len(self._made) > MAX_SPLITS:
                self._made.popitem(last=False)
            return self._made[key]

    def values(self, head: Head, images: Tensor, pictures: NDArray[np.uint8]) -> Values:
        """What `head` makes of images (N,3,H,W), normalised from `pictures`; what is kept of them is not made again."""
        self.on_use(head)
        if not head.separable:
            return head(images)
        return self._activations.values((self._revision, head.name, head.precision), pictures, images, head)

    @property
    def compiled_layers(self) -> tuple[str, ...]:
        """The layers whose head runs compiled now."""
        return tuple(head.name for head in self._compiled())

    @property
    def compiled_bytes(self) -> int:
        """The size of their packages; resident they take about three times as much on a CPU."""
        return sum(head.compiled.bytes for head in self._compiled() if head.compiled)

    def _compiled(self) -> list[Head]:
        with self._lock:
            return [head for head in self._made.values() if head.compiled]

    def _make(self, roots: tuple[Target, ...], exact: Split) -> Head:
        return Head(roots, exact, self._reduce(roots, exact), self._precision)

    def _reduce(self, roots: tuple[Target, ...], exact: Split) -> Split | None:
        """The same cut in reduced precision, None where that capture has another structure there."""
        if self._reduced is None:
            return None
        program, layers = self._reduced
        try:
            nodes = tuple(layers.target(target.name, target.use_conv_only).node for target in roots)
        except InvalidRequest:
            nodes = ()
        split = program.split(*nodes)
        if split.roots == nodes and _shapes(split) == _shapes(exact):
            return split
        logger.warning("the %s network has no such cut at %s; its head runs in fp32", self._precision, roots)
        return None


def _shapes(split: Split) -> list[list[str]]:
    return [[str(size) for size in node.meta["val"].shape] for node in (*split.roots, *split.crossing)]
