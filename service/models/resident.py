"""A model as it resides on a device: its captured program, its layers, its labels, how pictures go in."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from service.errors import ModelLoadError
from service.imaging.geometry import Fit
from service.models.architectures import build, digest
from service.models.labels import read_labels
from service.models.layers import LayerTable
from service.models.program import Program, capture
from service.models.spec import ModelSpec


@dataclass(frozen=True)
class Model:
    """A loaded classifier. All of it is read-only, so that threads share it."""

    id: str
    spec: ModelSpec
    revision: str
    labels: tuple[str, ...]
    program: Program
    layers: LayerTable
    device: torch.device
    fit: Fit

    def normalise(self, pictures: NDArray[np.uint8]) -> Tensor:
        """The network's input, float32 (N,3,H,W), from fitted pictures (N,H,W,3)."""
        images = torch.from_numpy(pictures).to(self.device).movedim(3, 1).contiguous()
        mean, std = self._mean_std
        return (images.float() / 255 - mean) / std

    @cached_property
    def _mean_std(self) -> tuple[Tensor, Tensor]:
        values = torch.tensor([self.spec.input.mean, self.spec.input.std], device=self.device)
        return values[0, :, None, None], values[1, :, None, None]

    def confidences(self, logits: Tensor) -> Tensor:
        """Probabilities (N,classes): softmax, or sigmoid where the classes are independent."""
        return logits.sigmoid() if self.spec.output.activation == "sigmoid" else logits.softmax(dim=1)


def load(model_id: str, spec: ModelSpec, folder: Path, device: torch.device, captured: Path | None = None) -> Model:
    """Build, capture and place a model. `captured` is a folder in which captured programs are kept.

    Raises ModelLoadError with the reason where the model cannot be served.
    """
    module = build(spec, folder)
    height, width = spec.input.size
    module = module.to(device)
    example = torch.zeros(2, 3, height, width, device=device)
    labels = read_labels(spec, folder, _count_classes(module, example))
    revision = digest(spec, labels, module, folder)
    file = captured / f"{revision.removeprefix('sha256:')}-{device}.pt2".replace(":", "-") if captured else None
    program = Program(capture(module, example, file), spec.output.activation)
    fit = Fit(spec.input.size, spec.input.fit, spec.input.resize, spec.input.interpolation, spec.input.mean)
    return Model(model_id, spec, revision, labels, program, LayerTable(program), device, fit)


def _count_classes(module: nn.Module, example: Tensor) -> int:
    try:
        with torch.no_grad():
            scores = module(example)
    except Exception as error:
        raise ModelLoadError(f"the network fails on its input {tuple(example.shape)}: {error}") from error
    if not isinstance(scores, Tensor) or scores.ndim != 2:
        shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ModelLoadError(f"the network's output is no (batch, classes) tensor of scores but {shape}")
    return scores.shape[1]
