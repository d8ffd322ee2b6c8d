"""The networks that are measured: the same weights for everybody, in a folder that the service can serve."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
import torchvision.models
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Pixels = NDArray[np.uint8]
Triple = tuple[float, float, float]

SIDE = 224
RESIZE = 256
HEAD_STD = 0.02
EMBEDDED = "efficientnet_lite0"

TOML = """architecture = "{architecture}"
weights = "weights.safetensors"
[input]
size = [{side}, {side}]
resize = {resize}
interpolation = "{interpolation}"
mean = {mean}
std = {std}
[serving]
precision = "{precision}"
"""


@dataclass(frozen=True)
class Network:
    """A network, and where a peer finds the value at which the service takes its default heatmap.

    `layer` is that value's module. `tokens`: it is (N,1+T,C), a class token before a square grid, and not (N,C,h,w).
    """

    name: str
    architecture: str
    layer: str
    tokens: bool = False
    interpolation: str = "bilinear"
    mean: Triple = (0.485, 0.456, 0.406)
    std: Triple = (0.229, 0.224, 0.225)

    def build(self) -> nn.Module:
        """The bare network in eval mode, without its weights."""
        origin, _, name = self.architecture.partition(":")
        built = timm.create_model(name) if origin == "timm" else torchvision.models.get_model(name, weights=None)
        module: nn.Module = built
        return module.eval()

    def load(self, weights: Path, device: str) -> nn.Module:
        """The plain eager network, fp32, with gradients of its parameters, as a user of a peer has it."""
        module = self.build()
        module.load_state_dict(load_file(weights))
        return module.to(device)

    def normalise(self, pixels: Pixels) -> Tensor:
        """The network's input, float32 (N,3,H,W), from fitted pictures (N,H,W,3)."""
        mean, std = torch.tensor(self.mean)[:, None, None], torch.tensor(self.std)[:, None, None]
        return (torch.from_numpy(pixels).movedim(3, 1).contiguous().float() / 255 - mean) / std

    def weights(self) -> Mapping[str, Tensor]:
        """Real weights of the embedded model; of others seeded ones, as they are before a training.

        Their batch norms keep their fresh statistics: statistics of a few like pictures make a network that blows
        roundings up, so that its bf16 maps are others. The head is normal(0.02), for torchvision's ViT has a zero one,
        without any gradient.
        """
        if self.name == EMBEDDED:
            return _embedded_weights()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.default_generator.manual_seed(1)
            module = self.build()
            head = [part for part in module.modules() if isinstance(part, nn.Linear)][-1]
            nn.init.normal_(head.weight, std=HEAD_STD)
        return module.state_dict()

    def write(self, folder: Path, precision: str, weights: Path) -> None:
        """Make `folder` a model's folder of the service; `weights` becomes a link in it."""
        folder.mkdir(parents=True)
        os.link(weights, folder / "weights.safetensors")
        values = {name: list(getattr(self, name)) for name in ("mean", "std")}
        text = TOML.format(
            architecture=self.architecture,
            side=SIDE,
            resize=RESIZE,
            interpolation=self.interpolation,
            precision=precision,
            **values,
        )
        (folder / "model.toml").write_text(text)


HALF: Triple = (0.5, 0.5, 0.5)
NETWORKS = {
    network.name: network
    for network in (
        Network("resnet50", "torchvision:resnet50", "layer4.2.bn3"),
        Network("mobilenet_v3_large", "torchvision:mobilenet_v3_large", "features.16.1"),
        # timm's batch norm has its activation inside; what comes before that leaves its empty dropout.
        Network(EMBEDDED, "timm:tf_efficientnet_lite0", "bn2.drop", False, "bicubic", HALF, HALF),
        Network("vit_b_16", "torchvision:vit_b_16", "encoder.layers.encoder_layer_10", tokens=True),
    )
}


def _embedded_weights() -> Mapping[str, Tensor]:
    from service.models.architectures import build
    from service.models.repository import EMBEDDED as ROOT
    from service.models.spec import read_spec

    folder = ROOT / EMBEDDED
    return build(read_spec(folder), folder).state_dict()


class Workplace:
    """A temporary folder with the weights of each network, and model repositories around them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def weights(self, network: Network) -> Path:
        path = self.folder / f"{network.name}.safetensors"
        if not path.exists():
            save_file({key: value.contiguous() for key, value in network.weights().items()}, path)
        return path

    def repository(self, network: Network, precision: str) -> Path:
        """A model repository of this one network, under its name."""
        root = self.folder / f"{network.name}-{precision}"
        if not root.exists():
            network.write(root / network.name, precision, self.weights(network))
        return root
