"""What holds for every method that is registered, on six kinds of networks: the canon's contract."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import VisionTransformer

import service.methods  # noqa: F401  (registers the methods)
from service.explain.fusion import heatmap_of
from service.explain.means import Means
from service.explain.method import REGISTRY, GenParams, LayerParams, Method
from service.explain.trace import Backward, Pass
from service.models.layers import Target
from service.models.program import Program
from tests.nets import SMALL, close_to, deep, images, program_of, residual, seeded, table

NETWORKS = ["resnet18", "densenet121", "mobilenet_v3_small", "convnext_tiny", "vit_b_32", "swin_t"]
CLASSES = [3, 7]
FEW = {"n": 1, "steps": 2, "window": 48, "stride": 48, "noise_on": "input"}
"""Parameters that make the slow methods quick."""
NARROW = {
    "resnet18": "layer1.1.conv2",
    "densenet121": "features.denseblock1.denselayer1.conv2",
    "mobilenet_v3_small": "features.0.0",
    "convnext_tiny": "features.1.0.block.0",
    "swin_t": "features.1.0",
}
"""Layers of few channels, for methods that run the network once for each."""
REFUSED = {
    *(("cam", network) for network in NETWORKS if network != "swin_t"),  # the others' default layer is not the last one
    *(("attention_rollout", network) for network in NETWORKS if network != "vit_b_32"),
}


ALL_ZERO = {("hires_cam", "vit_b_32")}
"""A layer norm follows, and its gradient is orthogonal to what it norms: g A adds up to 0 at every place."""
CANCELLING = {"hires_cam", "xgrad_cam"}
"""Where the sum of g A, or S_k by which it is divided, nearly cancels, rounding is much of it."""


@cache
def thin_vit() -> Program:
    """vit_b_32 with 2 layers of 48 channels: 768 passes through the true one take a minute."""
    return program_of(seeded(lambda: VisionTransformer(SMALL, 32, 2, 3, 48, 96, num_classes=10)), SMALL)


def params_of(method: Method) -> GenParams:
    fields = method.Params.model_fields
    return method.Params.model_validate({name: value for name, value in FEW.items() if name in fields})


def targets_of(method: Method, program: Program, layer: str | None = None) -> tuple[Target, ...]:
    return (table(program).target(layer, True),) if issubclass(method.Params, LayerParams) else ()


def refusal_of(method: Method, program: Program) -> str | None:
    targets = targets_of(method, program)
    return method.refusal(program, targets[0] if targets else None)


def pass_over(program: Program, layer: str | None, shown: Tensor, classes: Sequence[int]) -> Backward:
    one = Pass(program, shown, (table(program).target(layer, True),), means=Means(chunk=8))
    return one.backward(torch.tensor(classes))


def maps(method: Method, program: Program, shown: Tensor, classes: Sequence[int], layer: str | None = None) -> Tensor:
    targets = targets_of(method, program, layer)
    return heatmap_of(method, pass_over(program, layer, shown, classes), targets, params_of(method))


@cache
def all_maps(network: str, pictures: tuple[int, ...], run: int) -> dict[str, Tensor]:
    """The maps of every method that runs the network a few times, over one pass that they share, as in one request."""
    _, program = deep(network)
    shown = images(2, SMALL)[list(pictures)]
    backward = pass_over(program, None, shown, [CLASSES[index] for index in pictures])
    quick = {name: method for name, method in REGISTRY.items() if not method.alone and not refusal_of(method, program)}
    return {
        name: heatmap_of(method, backward, targets_of(method, program), params_of(method))
        for name, method in quick.items()
    }


def same(ours: Tensor, oracle: Tensor, method: Method) -> bool:
    """Equal up to rounding, which for gradients at the pixels, chaotic from kernel to kernel, means: correlated."""
    if method.family != "pixel" and method.name not in CANCELLING:
        return close_to(ours, oracle) < 1e-4
    both = torch.stack([ours.flatten(), oracle.flatten()]).double()
    return float(torch.corrcoef(both)[0, 1]) >= 0.999


def assert_sound(found: Tensor, method: Method, count: int) -> None:
    """Float32 maps of the right shape, each finite and not zero."""
    assert found.dtype == torch.float32
    assert found.shape == (count, SMALL, SMALL, 3) if method.channels == 3 else found.ndim == 3
    assert len(found) == count
    assert found.isfinite().all()
    assert all(one.any() for one in found)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", [name for name, method in REGISTRY.items() if not method.alone])
def test_maps_are_sound_deterministic_and_the_same_alone_as_in_a_batch(name: str, network: str) -> None:
    method, (_, program) = REGISTRY[name], deep(network)
    assert (refusal_of(method, program) is not None) == ((name, network) in REFUSED)
    if (name, network) in REFUSED:
        return
    both = all_maps(network, (0, 1), 0)[name]
    if (name, network) in ALL_ZERO:
        assert not both.any()
        return
    assert_sound(both, method, 2)
    if method.family == "cam":
        grid = table(program).target(None, True).grid
        assert both.shape == (2, grid.height, grid.width)
    assert torch.equal(all_maps(network, (0, 1), 1)[name], both)
    for index in range(2):
        assert same(all_maps(network, (index,), 0)[name][0], both[index], method)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", [name for name, method in REGISTRY.items() if method.alone])
def test_maps_of_many_passes_are_sound(name: str, network: str) -> None:
    """Each of their pictures is worked out by itself: batches are tested with each method, on small networks."""
    method = REGISTRY[name]
    program = thin_vit() if network == "vit_b_32" else deep(network)[1]
    assert refusal_of(method, program) is None
    layer = NARROW.get(network) if method.family == "cam" else None
    found = maps(method, program, images(1, SMALL), CLASSES[:1], layer)
    assert_sound(found, method, 1)
    assert torch.equal(maps(method, program, images(1, SMALL), CLASSES[:1], layer), found)


def state(module: nn.Module) -> dict[str, Any]:
    """All that a method might leave behind."""
    hooks = [
        (name, len(part._forward_hooks), len(part._forward_pre_hooks), len(part._backward_hooks), part.training)
        for name, part in module.named_modules()
    ]
    parameters = [(name, one.grad, one.requires_grad) for name, one in module.named_parameters()]
    return {"hooks": hooks, "parameters": parameters, "grad": torch.is_grad_enabled()}


class Breaks(TorchDispatchMode):
    """Counts operations, and raises at one of them."""

    def __init__(self, at: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0
        self.at = at

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count == self.at:
            raise ZeroDivisionError
        return func(*args, **(kwargs or {}))


SERVED = [name for name in REGISTRY if name not in ("cam", "attention_rollout")]


@pytest.mark.parametrize("name", SERVED)
def test_eight_threads_get_the_serial_maps(name: str) -> None:
    method, program = REGISTRY[name], residual()
    shown = [images(2, 12, seed) for seed in range(8)]

    def run(one: Tensor) -> Tensor:
        return maps(method, program, one, [1, 4])

    serial = [run(one) for one in shown]
    with ThreadPoolExecutor(8) as threads:
        for ours, oracle in zip(threads.map(run, shown), serial, strict=True):
            assert torch.equal(ours, oracle)


@pytest.mark.parametrize("name", SERVED)
def test_the_model_is_untouched_also_after_an_exception_in_the_middle(name: str) -> None:
    method, program = REGISTRY[name], residual()
    shown = images(2, 12)
    parts: list[nn.Module] = [program.source, program.network(), program.network("guided"), program.network("deconv")]
    weights = {key: value.clone() for key, value in program.source.state_dict().items()}
    before = [state(part) for part in parts]
    with Breaks() as counted:
        first = maps(method, program, shown, [1, 4])
    for at in (1, counted.count // 2, counted.count - 1):
        with pytest.raises(ZeroDivisionError), Breaks(at):
            maps(method, program, shown, [1, 4])
    assert [state(part) for part in parts] == before
    assert all(torch.equal(value, weights[key]) for key, value in program.source.state_dict().items())
    assert torch.equal(maps(method, program, shown, [1, 4]), first)
