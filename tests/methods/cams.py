"""What the tests of the family `cam` share: our raw map, a peer's, and activations and gradients in float64."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from pytorch_grad_cam.base_cam import BaseCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn

from service.explain.method import REGISTRY
from service.explain.trace import Trace
from service.models.program import Program
from tests.nets import peer_copy, program_of, seeded, table, trace_of


def raw(method: str, program: Program, layer: str, pictures: Tensor, classes: list[int], **params: Any) -> Tensor:
    """A method's raw map of one class per picture at a layer, with parameters as a request gives them."""
    one = REGISTRY[method]
    checked = one.Params.model_validate(params)
    target = table(program).target(layer, bool(params.get("use_conv_only", True)))
    assert one.refusal(program, target) is None
    return one.heatmap(trace_of(program, pictures, target, classes), checked)


def of_numbers(method: str, activation: Tensor, gradient: Tensor, **params: Any) -> Tensor:
    """A method's raw map of numbers, without a network."""
    one = REGISTRY[method]
    trace = SimpleNamespace(activation=activation, gradient=gradient)
    return one.heatmap(cast(Trace, trace), one.Params.model_validate(params))


@cache
def modular() -> tuple[nn.Module, Program]:
    """Convolutions with ReLU modules and no pooling, which hooks can watch: gradients differ from place to place."""
    module = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(6, 5, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(5 * 36, 7),
        )
    )
    return module, program_of(module, 12)


def eager_64(
    module: nn.Module, layer: str, pictures: Tensor, weights: Tensor | list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """A, g and the logits in float64 by plain autograd; g is of one class per picture, or of weighted logits."""
    twin = peer_copy(module, torch.float64)
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        seen.append(output)
        return output.clone()  # `out += identity` would overwrite what was kept

    handle = twin.get_submodule(layer).register_forward_hook(keep)
    logits = twin(pictures.double())
    handle.remove()
    if isinstance(weights, list):
        weights = torch.eye(logits.shape[1], dtype=torch.float64)[weights]
    (gradient,) = torch.autograd.grad((weights * logits).sum(), seen[0])
    assert gradient.abs().max() > 0
    return seen[0].detach(), gradient, logits.detach()


def peer(
    kind: type[BaseCAM],
    module: nn.Module,
    layer: str,
    pictures: Tensor,
    classes: list[int],
    targets: list[Any] | None = None,
    eigen_smooth: bool = False,
) -> Tensor:
    """pytorch-grad-cam's raw map at a module, and a check that its gradient is not zero."""
    twin = peer_copy(module)
    target = twin.get_submodule(layer)
    targets = targets or [ClassifierOutputTarget(number) for number in classes]
    with kind(twin, [target]) as cam:
        # A copy goes on, since `out += identity` would overwrite what the peer has kept.
        target.register_forward_hook(lambda _module, _inputs, output: output.clone())
        cam.uses_gradients = True
        cam(pictures, targets)
        (activation,) = cam.activations_and_grads.activations
        (gradient,) = cam.activations_and_grads.gradients
    assert np.abs(gradient.numpy()).max() > 0
    answer = cam.get_cam_image(pictures, target, targets, activation.numpy(), gradient.numpy(), eigen_smooth)
    return torch.from_numpy(np.asarray(answer))
