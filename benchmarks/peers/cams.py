"""Grad-CAM by pytorch-grad-cam, torch-cam and captum: from the network's input to one map per picture."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Maps = Callable[[Tensor, list[int]], Tensor]
"""From the network's input (N,3,H,W) and a class per picture to maps without negatives, (N,h,w) on the host."""


class Copied(nn.Module):
    """A copy goes on: `out += identity` and in-place activations would overwrite what the peer has kept."""

    def forward(self, value: Tensor) -> Tensor:
        return value.clone()


def tokens_to_map(value: Tensor) -> Tensor:
    """(N,1+T,C) without its class token as (N,C,h,w), as pytorch-grad-cam's page on vision transformers has it."""
    side = round((value.shape[1] - 1) ** 0.5)
    return value[:, 1:].reshape(len(value), side, side, -1).permute(0, 3, 1, 2)


def prepare(net: nn.Module, layer: str) -> tuple[nn.Module, str]:
    """A copy of the network for one peer alone, and the module in it whose output the map is made of."""
    twin = copy.deepcopy(net).eval()
    parent, _, leaf = layer.rpartition(".")
    setattr(twin.get_submodule(parent), leaf, nn.Sequential(twin.get_submodule(layer), Copied()))
    return twin, f"{layer}.0"


def pytorch_grad_cam(net: nn.Module, layer: str, tokens: bool) -> Maps:
    """Its maps come at the network's input size, scaled to [0,1]."""
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    twin, name = prepare(net, layer)
    cam = GradCAM(twin, [twin.get_submodule(name)], reshape_transform=tokens_to_map if tokens else None)
    return lambda images, classes: torch.from_numpy(cam(images, [ClassifierOutputTarget(one) for one in classes]))


def torch_cam(net: nn.Module, layer: str, tokens: bool) -> Maps:
    from torchcam.methods import GradCAM

    twin, name = prepare(net, layer)
    cam: Any = GradCAM(twin, name, reshape_transform=tokens_to_map if tokens else None)

    def maps(images: Tensor, classes: list[int]) -> Tensor:
        found: Tensor = cam(classes, twin(images), normalized=False)[0]
        return found.cpu()

    return maps


def captum(net: nn.Module, layer: str, tokens: bool) -> Maps:
    from captum.attr import LayerGradCam

    if tokens:
        raise ValueError("takes no tokens")
    twin, name = prepare(net, layer)
    cam = LayerGradCam(twin, twin.get_submodule(name))

    def maps(images: Tensor, classes: list[int]) -> Tensor:
        found: Tensor = cam.attribute(images, classes, relu_attributions=True)
        return found.detach()[:, 0].cpu()

    return maps


PEERS: dict[str, Callable[[nn.Module, str, bool], Maps]] = {
    "pytorch-grad-cam": pytorch_grad_cam,
    "torch-cam": torch_cam,
    "captum": captum,
}
