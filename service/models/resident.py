"""A model as it resides on a device: its captured program, its layers, its labels, how pictures go in."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from service.errors import ModelLoadError
from service.imaging.geometry import Fit
from service.models.activations import ActivationCache
from service.models.architectures import build, digest
from service.models.heads import DTYPES, Heads
from service.models.labels import read_labels
from service.models.layers import LayerTable, Target
from service.models.noise import Noise
from service.models.outputs import check_scores, confidence_of
from service.models.program import Program, capture
from service.models.proof import proven_layers
from service.models.spec import ModelSpec


@dataclass(frozen=True)
class Model:
    """A loaded classifier, shared by threads. Only `heads` changes: they are made, and swapped for faster ones."""

    id: str
    spec: ModelSpec
    revision: str
    labels: tuple[str, ...]
    program: Program
    layers: LayerTable
    heads: Heads
    device: torch.device
    fit: Fit

    def normalise(self, pictures: NDArray[np.uint8]) -> Tensor:
        """The network's input, float32 (N,3,H,W), from fitted pictures (N,H,W,3)."""
        pixels = torch.from_numpy(pictures)
        if self.device.type == "cuda":  # only from pinned memory does a copy leave the other streams alone
            pixels = pixels.pin_memory().to(self.device, non_blocking=True)
        images = pixels.movedim(3, 1).contiguous()
        mean, std = self._mean_std
        return (images.float() / 255 - mean) / std

    def predict(self, images: Tensor) -> Tensor:
        """The logits of images (N,3,H,W), without a graph, through the head that is compiled first."""
        head = self.heads.at(*self.cut)
        self.heads.on_use(head)
        values = head(images)
        with torch.no_grad():
            logits: Tensor = self.program.split(*(target.node for target in self.cut)).tail(*values)
            return logits

    @cached_property
    def cut(self) -> tuple[Target, ...]:
        """Where the network is cut if nothing else is asked for: at the default layer, nowhere if it has none."""
        return () if self.layers.default is None else (self.layers.target(None, True),)

    @cached_property
    def class_ids(self) -> dict[str, list[int]]:
        """The classes that bear each name, in order."""
        found: dict[str, list[int]] = {}
        for class_id, name in enumerate(self.labels):
            found.setdefault(name, []).append(class_id)
        return found

    @cached_property
    def _mean_std(self) -> tuple[Tensor, Tensor]:
        values = torch.tensor([self.spec.input.mean, self.spec.input.std], device=self.device)
        return values[0, :, None, None], values[1, :, None, None]


def load(
    model_id: str,
    spec: ModelSpec,
    folder: Path,
    device: torch.device,
    captured: Path | None = None,
    activations: ActivationCache | None = None,
) -> Model:
    """Build, capture and place a model. `captured` is a folder in which captured programs are kept.

    Raises ModelLoadError with the reason where the model cannot be served.
    """
    module = build(spec, folder)
    height, width = spec.input.size
    module = module.to(device)
    example = torch.zeros(2, 3, height, width, device=device)
    noise = Noise.of(spec.input.mean, spec.input.std)
    scores = _scores(module, noise.pictures(2, example, seed=0))
    confidence = confidence_of(spec.output.activation, spec.output.confidence, scores.shape[1])
    labels = read_labels(spec, folder, scores.shape[1])
    revision = digest(spec, labels, module, folder)
    stem = f"{revision.removeprefix('sha256:')}-{device}".replace(":", "-")
    graph = capture(module, example, captured and captured / f"{stem}.pt2")
    program = Program(graph, spec.output.activation, confidence, noise)
    check_scores(scores, spec.output.activation)
    layers = proven_layers(program, captured and captured / f"{stem}.layers.json")
    reduced = _reduced(module, spec, example, captured and captured / f"{stem}-{spec.serving.precision}.pt2")
    heads = Heads(program, spec.serving.precision, reduced, activations, revision)
    fit = Fit(spec.input.size, spec.input.fit, spec.input.resize, spec.input.interpolation, spec.input.mean)
    return Model(model_id, spec, revision, labels, program, layers, heads, device, fit)


def _reduced(
    module: nn.Module, spec: ModelSpec, example: Tensor, file: Path | None
) -> tuple[Program, LayerTable] | None:
    """The network captured anew from a copy in reduced precision: a cast of the graph would cast the tail with it."""
    dtype = DTYPES[spec.serving.precision]
    if dtype == torch.float32:
        return None
    program = Program(capture(copy.deepcopy(module).to(dtype), example.to(dtype), file), spec.output.activation)
    return program, LayerTable(program, trusted=True)


def _scores(module: nn.Module, noise: Tensor) -> Tensor:
    """What the eager network returns for pictures of noise, (N,classes)."""
    try:
        with torch.no_grad():
            scores = module(noise)
    except Exception as error:
        raise ModelLoadError(f"the network fails on its input {tuple(noise.shape)}: {error}") from error
    if not isinstance(scores, Tensor) or scores.ndim != 2:
        shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ModelLoadError(f"the network's output is no (batch, classes) tensor of scores but {shape}")
    return scores
