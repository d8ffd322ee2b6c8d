"""The trace that a method reads: activations, gradients and scores, computed when they are first read and shared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor, fx

from service.explain.means import Means
from service.models.layers import Target
from service.models.program import Program, Rule, as_tuple, gradients_of

T = TypeVar("T")

TAIL_BYTES = 1 << 26
"""What the values at a cut may take in one chunk of altered activations."""


class Pass:
    """One run of a batch through a network, shared by all methods, layers and classes that are asked of it.

    The network is cut at its targets: what lies before them runs without a graph, and a gradient costs the tail alone.
    """

    def __init__(
        self,
        program: Program,
        images: Tensor,
        targets: Sequence[Target] = (),
        values: Sequence[Tensor] | None = None,
        means: Means | None = None,
        eps: float | None = None,
    ) -> None:
        """`images` is (N,3,H,W), normalised; `values` are the cut's roots and crossings where they are known, `eps` is
        the one of the dtype in which they were computed, the images' where it is None."""
        self.program = program
        self.images = images
        self.targets = targets
        self.means = means or Means()
        self.eps = torch.finfo(images.dtype).eps if eps is None else eps
        self._nodes = tuple(target.node for target in targets)
        self._values = values
        self._runs: dict[Rule | None, tuple[Tensor, dict[fx.Node, Tensor]]] = {}
        self._whole: dict[Rule | None, tuple[Tensor, Tensor]] = {}

    def backward(self, classes: Tensor) -> Backward:
        """The pass seen from one class per picture; `classes` is (N,), int64."""
        return Backward(self, classes)

    @property
    def values(self) -> Sequence[Tensor]:
        """What the head makes of the images: the cut's roots and crossings."""
        if self._values is None:
            with torch.no_grad():
                self._values = as_tuple(self.program.split(*self._nodes).head(self.images))
        return self._values

    @cached_property
    def logits(self) -> Tensor:
        """(N,classes), without a graph."""
        if self._values is not None or self._runs:
            return self.run()[0].detach()
        return self.predict(self.images)

    def predict(self, images: Tensor) -> Tensor:
        """The logits of any images, without a graph."""
        if self.means.predict is not None:
            return self.means.predict(images)
        with torch.no_grad():
            logits: Tensor = self.program.network()(images)
            return logits

    def run(self, rule: Rule | None = None) -> tuple[Tensor, dict[fx.Node, Tensor]]:
        """Scores with a graph back to the targets, and the targets' values; gradients follow `rule`."""
        if rule not in self._runs:
            split = self.program.split(*self._nodes, rule=rule)
            roots = [value.detach().requires_grad_() for value in self.values[: len(split.roots)]]
            with torch.enable_grad():
                scores, *later = as_tuple(split.tail(*roots, *self.values[len(roots) :]))
            self._runs[rule] = scores, dict(zip((*split.roots, *split.later), (*roots, *later), strict=True))
        return self._runs[rule]

    def whole(self, rule: Rule | None = None) -> tuple[Tensor, Tensor]:
        """The images, and their scores with a graph back to them; gradients follow `rule`."""
        if rule not in self._whole:
            inputs = self.images.detach().requires_grad_()
            with torch.enable_grad():
                self._whole[rule] = inputs, self.program.network(rule)(inputs)
        return self._whole[rule]


class Backward:
    """The backward passes of one class per picture, each run when it is first asked for and shared by all targets.

    The gradient is that of the sum of the pictures' logits: in eval mode pictures don't mix.
    """

    def __init__(self, of: Pass, classes: Tensor) -> None:
        self.of = of
        self.classes = classes
        self._at_targets: dict[Rule | None, dict[fx.Node, Tensor]] = {}
        self._at_images: dict[Rule | None, Tensor] = {}

    def trace(self, target: Target | None = None) -> Trace:
        """What a method reads, at one of the pass's targets if it has a target layer."""
        return Trace(self, target)

    def at_target(self, node: fx.Node, rule: Rule | None) -> Tensor:
        """dy/dA at the node of a target."""
        if rule not in self._at_targets:
            scores, at = self.of.run(rule)
            gradients = gradients_of(self._total(scores), list(at.values()))
            self._at_targets[rule] = dict(zip(at, gradients, strict=True))
        return self._at_targets[rule][node]

    def at_images(self, rule: Rule | None) -> Tensor:
        """dy/dx, (N,3,H,W)."""
        if rule not in self._at_images:
            inputs, scores = self.of.whole(rule)
            self._at_images[rule] = gradients_of(self._total(scores), [inputs])[0]
        return self._at_images[rule]

    def _total(self, scores: Tensor) -> Tensor:
        return scores.gather(1, self.classes[:, None]).sum()


class Trace:
    """What a pass shows of one class per picture at one target. Nothing is computed before it is read."""

    def __init__(self, backward: Backward, target: Target | None) -> None:
        self._backward = backward
        self._pass = backward.of
        self._target = target

    @property
    def program(self) -> Program:
        return self._pass.program

    @property
    def target(self) -> Target:
        """The target layer, of a method that has one."""
        assert self._target is not None, "a method without target_conv_layer reads no layer"
        return self._target

    @property
    def images(self) -> Tensor:
        """The network's input, (N,3,H,W), normalised."""
        return self._pass.images

    @property
    def eps(self) -> float:
        """How finely the activation is rounded, relative to 1: the head may run in reduced precision."""
        return self._pass.eps

    @property
    def classes(self) -> Tensor:
        """The class explained of each picture, (N,), int64."""
        return self._backward.classes

    @property
    def logits(self) -> Tensor:
        """All scores, (N,classes)."""
        return self._pass.logits

    @property
    def score(self) -> Tensor:
        """y: the logit of the class explained, (N,)."""
        return self._of_class(self.logits)

    @property
    def confidence(self) -> Tensor:
        """The probability of the class explained, (N,)."""
        return self._of_class(self.program.confidences(self.logits))

    @property
    def activation(self) -> Tensor:
        """A: the activation of the target layer, (N,C,h,w)."""
        return self.target.grid.fold(self._pass.run()[1][self.target.node].detach())

    @property
    def gradient(self) -> Tensor:
        """g = dy/dA: the gradient of the score at the target layer, (N,C,h,w)."""
        return self.gradient_under(None)

    def gradient_under(self, rule: Rule | None) -> Tensor:
        """The gradient at the target layer, where activation functions pass gradients by `rule`."""
        return self.target.grid.fold(self._backward.at_target(self.target.node, rule))

    def gradient_of(self, weights: Tensor) -> Tensor:
        """The gradient at the target layer of each picture's logits times `weights`, (N,classes) both."""
        scores, at = self._pass.run()
        return self.target.grid.fold(gradients_of((weights * scores).sum(), [at[self.target.node]])[0])

    @property
    def image_gradient(self) -> Tensor:
        """dy/dx: the gradient of the score at the images, (N,3,H,W)."""
        return self.image_gradient_under(None)

    def image_gradient_under(self, rule: Rule | None) -> Tensor:
        """The gradient at the images, where activation functions pass gradients by `rule`."""
        return self._backward.at_images(rule)

    def at(self, images: Tensor, picture: int | None = None) -> Trace:
        """The same for other images: (N,3,H,W), one per picture, or any number (M,3,H,W) made of one `picture`."""
        classes = self.classes if picture is None else self.classes[picture].expand(len(images))
        one = Pass(self.program, images, (self._target,) if self._target else (), means=self._pass.means)
        return Trace(one.backward(classes), self._target)

    def in_chunks(self, count: int, run: Callable[[slice], T]) -> list[T]:
        """`run` on slices of 0 to `count` whose images fit on the device together."""
        return self._pass.means.in_chunks(count, run)

    def scores_with(self, picture: int, count: int, activations: Callable[[slice], Tensor]) -> Tensor:
        """y of one picture had the target layer other activations, (count,): the tail alone runs.

        `activations` makes those of a slice of 0 to `count`, (M,C,h,w).
        """
        split = self.program.split(self.target.node)
        image, values = self.images[picture : picture + 1], self._alone.values

        def values_of(count: int) -> Sequence[Tensor]:
            if split.separable:
                return [value[picture].expand(count, *value.shape[1:]) for value in values]
            return as_tuple(split.head(image.expand(count, -1, -1, -1)))  # such as windows beside the batch

        def run(rows: slice) -> Tensor:
            made = activations(rows)
            with torch.no_grad():
                value, *crossing = values_of(len(made))
                scores: Tensor = split.tail(self.target.grid.unfold(made, value), *crossing)
            return scores[:, self.classes[picture]]

        size = sum(value.nbytes for value in values) // len(self.images)
        return torch.cat(self._pass.means.in_chunks(count, run, max(1, TAIL_BYTES // size)))

    @cached_property
    def _alone(self) -> Pass:
        """The pass cut at this target only."""
        if len(self._pass.targets) == 1:
            return self._pass
        return Pass(self.program, self.images, (self.target,), means=self._pass.means)

    def _of_class(self, values: Tensor) -> Tensor:
        return values.gather(1, self.classes[:, None])[:, 0]
