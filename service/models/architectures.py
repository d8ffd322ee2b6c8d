"""From a spec to a network with its weights: in eval mode, fp32, on the CPU, without gradients of its parameters."""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import timm
import torch
import torchvision.models
from safetensors.torch import load_file
from torch import Tensor, nn

from service.errors import ModelLoadError, nearest
from service.models import published
from service.models.spec import PUBLISHED_WEIGHTS, ModelSpec, file_in

_DATA_PARALLEL = "module."
_NAMED_KEYS = 3


def build(spec: ModelSpec, folder: Path) -> nn.Module:
    """The network of a spec whose files lie in `folder`. The global random state stays as it is.

    Code of a `python:` architecture runs with the rights of this process; weights are read as tensors only.
    Raises ModelLoadError for whatever stops it, with a short reason.
    """
    with _reasons("architecture"), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(spec.seed or 0)  # torch.manual_seed would seed CUDA devices too
        module = _construct(spec, folder)
        weights = _weights(spec, folder, module)
        if weights is not None:
            _load(module, weights)
        return module.cpu().float().eval().requires_grad_(False)


def digest(spec: ModelSpec, labels: tuple[str, ...], module: nn.Module, folder: Path) -> str:
    """The model's revision: `sha256:` over its spec, labels, tensors and the folder's own code of a `python:` model."""
    content = hashlib.sha256()
    _add(content, [spec.model_dump(mode="json"), labels])
    if spec.architecture.startswith("python:"):
        content.update(_code_digest(folder))
    for name, tensor in sorted(module.state_dict().items()):
        _add(content, [name, str(tensor.dtype), list(tensor.shape)])
        content.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return f"sha256:{content.hexdigest()}"


def _add(content: hashlib._Hash, value: object) -> None:
    content.update(json.dumps(value, sort_keys=True, separators=(",", ":")).encode() + b"\n")


@contextmanager
def _reasons(what: str) -> Iterator[None]:
    """Turn whatever foreign code raises into a ModelLoadError of one short line."""
    try:
        yield
    except ModelLoadError:
        raise
    except (Exception, SystemExit) as error:
        first = str(error).strip().partition("\n")[0][:200]
        raise ModelLoadError(f"{what}: {type(error).__name__}: {first}") from error


def _construct(spec: ModelSpec, folder: Path) -> nn.Module:
    kind, _, name = spec.architecture.partition(":")
    match kind:
        case "torchvision":
            module = _torchvision(name, spec)
        case "timm":
            module = _timm(name, spec)
        case _:
            module = _python(name, spec, folder)
    if not isinstance(module, nn.Module):
        raise ModelLoadError(f"architecture: {name} made a {type(module).__name__}, not a torch.nn.Module")
    return module


def _torchvision(name: str, spec: ModelSpec) -> object:
    names = torchvision.models.list_models()
    if name not in names:
        raise ModelLoadError(f"architecture: torchvision has no builder {name!r}.{nearest(name, names)}")
    weights = "DEFAULT" if spec.weights == PUBLISHED_WEIGHTS else None
    return torchvision.models.get_model(name, weights=weights, progress=False, **spec.architecture_args)


def _timm(name: str, spec: ModelSpec) -> object:
    if not timm.is_model(name):
        raise ModelLoadError(f"architecture: timm has no model {name!r}.{nearest(name, timm.list_models())}")
    from_hub = spec.weights == PUBLISHED_WEIGHTS and not published.is_installed(name)
    module = timm.create_model(name, pretrained=from_hub, **spec.architecture_args)
    if from_hub:
        _refuse_other_classes(module)
    return module


def _refuse_other_classes(module: nn.Module) -> None:
    """Timm gives a network of other classes than its published weights a random last layer without a word."""
    config: Any = module.pretrained_cfg
    if module.num_classes != config["num_classes"]:
        raise ModelLoadError(
            f"architecture_args: {module.num_classes} classes, but the published weights have {config['num_classes']}"
        )


def _python(name: str, spec: ModelSpec, folder: Path) -> object:
    module_name, _, factory_name = name.partition(":")
    factory = _factory(_import(module_name, folder), factory_name)
    pretrained = {"pretrained": True} if spec.weights == PUBLISHED_WEIGHTS else {}
    return factory(**pretrained, **spec.architecture_args)


def _factory(module: ModuleType, name: str) -> Callable[..., object]:
    factory: Callable[..., object] | None = getattr(module, name, None)
    if factory is None:
        raise ModelLoadError(f"architecture: the module has no factory {name!r}.{nearest(name, vars(module))}")
    return factory


def _import(name: str, folder: Path) -> ModuleType:
    """A module from the model's folder where it lies there, else from the Python path."""
    path = folder.joinpath(*name.split("."))
    if not path.with_suffix(".py").is_file() and not (path / "__init__.py").is_file():
        return importlib.import_module(name)
    # The folder becomes a package named after its code: two models may each have a net.py, changed code is imported
    # anew while the old revision still serves, and relative imports work.
    root = f"heatmap_model_{hashlib.sha256(str(folder.resolve()).encode() + _code_digest(folder)).hexdigest()[:16]}"
    package = sys.modules.setdefault(root, ModuleType(root))
    package.__path__ = [str(folder)]
    with _no_bytecode():
        importlib.invalidate_caches()
        return importlib.import_module(f"{root}.{name}")


@contextmanager
def _no_bytecode() -> Iterator[None]:
    """Leave no __pycache__ in the model's folder: it is told apart by whole seconds, a quick edit would go unseen."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before


def _code_digest(folder: Path) -> bytes:
    code = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*.py") if path.is_file()):
        source = path.read_bytes()
        _add(code, [path.relative_to(folder).as_posix(), len(source)])
        code.update(source)
    return code.digest()


def _weights(spec: ModelSpec, folder: Path, module: nn.Module) -> Mapping[str, Tensor] | None:
    """The tensors that are still to be loaded, or None where the builder has seen to the weights."""
    kind, _, name = spec.architecture.partition(":")
    if spec.seed is not None:
        return None
    if spec.weights == PUBLISHED_WEIGHTS:
        return published.load_renamed(name, module) if kind == "timm" and published.is_installed(name) else None
    path = file_in(folder, spec.weights, "weights")
    with _reasons(f"weights: {spec.weights!r} cannot be read as tensors only"):
        if spec.weights.endswith(".safetensors"):  # a link's target may be called otherwise
            return load_file(path)
        return _state_dict(torch.load(path, map_location="cpu", weights_only=True))


def _state_dict(content: object) -> Mapping[str, Tensor]:
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ModelLoadError("weights: the file holds no state dict")
    return content


def _load(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    own = module.state_dict()
    weights = _with_versions(_without_data_parallel(weights, own), own, module)
    shapes = [
        f"{key} is {tuple(weights[key].shape)}, not {tuple(own[key].shape)}"
        for key in own
        if key in weights and weights[key].shape != own[key].shape
    ]
    _refuse("of another shape", shapes)
    rest = module.load_state_dict(weights, strict=False)
    _refuse("missing", rest.missing_keys)
    _refuse("unexpected", rest.unexpected_keys)


def _without_data_parallel(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    if any(key.startswith(_DATA_PARALLEL) for key in own):
        return weights
    renamed = OrderedDict((key.removeprefix(_DATA_PARALLEL), value) for key, value in weights.items())
    versions = getattr(weights, "_metadata", {})
    renamed._metadata = {f"{path}.".removeprefix(_DATA_PARALLEL)[:-1]: each for path, each in versions.items()}  # type: ignore[attr-defined]
    return renamed


def _with_versions(weights: Mapping[str, Tensor], own: Mapping[str, Tensor], module: nn.Module) -> Mapping[str, Tensor]:
    """The weights with their modules' versions, the network's own where the file has none (as in safetensors).

    Batch norms keep none then: old ones lack `num_batches_tracked`, and load without it.
    """
    versioned = OrderedDict(weights)
    norms = {path for path, part in module.named_modules() if isinstance(part, nn.modules.batchnorm._NormBase)}
    known = {path: each for path, each in getattr(own, "_metadata", {}).items() if path not in norms}
    versioned._metadata = getattr(weights, "_metadata", None) or known  # type: ignore[attr-defined]
    return versioned


def _refuse(what: str, keys: list[str]) -> None:
    if keys:
        rest = f" and {len(keys) - _NAMED_KEYS} more" if len(keys) > _NAMED_KEYS else ""
        raise ModelLoadError(f"weights: {what}: {', '.join(keys[:_NAMED_KEYS])}{rest}")
