"""Plan, compute and scaling on paper; batches, chunks and threads change nothing; the model stays untouched."""

import contextlib
import functools
import itertools
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import cache

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from service.errors import DeadlineExceeded, OutOfDeviceMemory
from service.imaging.geometry import Geometry
from service.imaging.maps import Scaling, degeneracy, resample, scale
from service.models.resident import Model
from service.workers.compute import Explained
from service.workers.device import Device
from service.workers.plan import make_plan
from tests.nets import (
    IMAGENET,
    SMALL,
    Dense,
    Residual,
    close_to,
    deep,
    explain,
    hand,
    hand_picture,
    model_of,
    pictures,
    program_of,
    request,
    seeded,
    varied,
)
from tests.server import OPTIONS_OFF

BOTH = ("grad_cam", "guided_grad_cam")
# Class by class and layer by layer; the raw maps follow from the numbers in tests.nets.Hand:
# class 0, convolution: 0.5 A0 + 0.5 A1, where the ReLU lets only [[., 3], [-1, .]] of A1's weights through
# class 0, ReLU: 0.5 A0 - 3.5 relu(A1); class 1, convolution: -A0 + 2 A1; class 1, ReLU: -A0 + 2 relu(A1)
RAW_MAPS: dict[tuple[int, bool], list[list[float]]] = {
    (0, True): [[-0.5, 2], [2.5, 1]],
    (0, False): [[0.5, -6], [-5.5, 2]],
    (1, True): [[-5, 2], [1, -8]],
    (1, False): [[-1, 2], [1, -4]],
}
SCALED: dict[tuple[int, bool, str], list[list[float]]] = {
    (0, True, "scale_after_relu"): [[0, 0.8], [1, 0.4]],
    (0, True, "scale_before_relu"): [[0, 0.8], [1, 0.4]],  # the largest absolute value is 2.5 as well
    (0, False, "scale_after_relu"): [[0.25, 0], [0, 1]],
    (0, False, "scale_before_relu"): [[1 / 12, 0], [0, 1 / 3]],  # by 6
    (1, True, "scale_after_relu"): [[0, 1], [0.5, 0]],
    (1, True, "scale_before_relu"): [[0, 0.25], [0.125, 0]],  # by 8
    (1, False, "scale_after_relu"): [[0, 1], [0.5, 0]],
    (1, False, "scale_before_relu"): [[0, 0.5], [0.25, 0]],  # by 4
}


@pytest.mark.parametrize("scaling", ["scale_after_relu", "scale_before_relu", "none"])
@pytest.mark.parametrize("use_conv_only", [True, False])
@pytest.mark.parametrize("class_id", [0, 1])
def test_layer_and_scaling_follow_halcon_on_paper(class_id: int, use_conv_only: bool, scaling: Scaling) -> None:
    params = {"use_conv_only": use_conv_only, "scaling": scaling}
    asked = request(1, (class_id,), methods=("grad_cam",), gen_params=params)
    (answer,) = explain(hand(nn.ReLU()), asked, hand_picture())
    (raw,) = answer.maps
    assert raw.class_id == class_id
    assert raw.task.effective == {"target_conv_layer": ["conv"], **params, **OPTIONS_OFF}
    expected = RAW_MAPS[class_id, use_conv_only]
    np.testing.assert_allclose(raw.values, expected, rtol=0, atol=1e-5 * 8)
    scaled = scale(raw.values, scaling)
    np.testing.assert_allclose(scaled, SCALED.get((class_id, use_conv_only, scaling), expected), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("use_conv_only", "expected"),
    [(True, [[-0.75, 1.5], [1.75, 1]]), (False, [[0.5, -6], [-5.5, 3]])],
)
def test_a_relu6_is_fused_as_a_relu_is(use_conv_only: bool, expected: list[list[float]]) -> None:
    """Red 8 at the last place is cut off at 6: 6 is what the ReLU6 gives, and no gradient passes there."""
    asked = request(1, (0,), methods=("grad_cam",), gen_params={"use_conv_only": use_conv_only})
    (answer,) = explain(hand(nn.ReLU6()), asked, hand_picture(last_red=8))
    np.testing.assert_allclose(answer.maps[0].values, expected, rtol=0, atol=1e-4)


def test_the_raw_map_is_upsampled_before_it_is_scaled() -> None:
    # [1, -4] becomes 1, 0.75 - 1, 0.25 - 3, -4: what is negative goes after the bilinear step, not before it.
    raw = np.array([[1, -4], [-5, -2]], np.float32)
    fine, _ = resample(raw, Geometry(4, 2, (0, 0, 4, 2), (2, 2)), "original")
    np.testing.assert_allclose(fine, [[1, -0.25, -2.75, -4], [-5, -4.25, -2.75, -2]], atol=1e-6)
    np.testing.assert_allclose(scale(fine, "scale_after_relu"), [[1, 0, 0, 0], [0, 0, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(scale(fine, "scale_before_relu"), [[0.2, 0.0, 0.0, 0.0], [0.0] * 4], atol=1e-6)


def test_confidences_and_the_top_class_on_paper() -> None:
    # The logits are 9 and 6: 1 / (1 + exp(-3)).
    (answer,) = explain(hand(nn.ReLU()), request(1, methods=("grad_cam",)), hand_picture())
    np.testing.assert_allclose(answer.confidences, [0.95257413, 0.04742587], atol=1e-5)
    assert [raw.class_id for raw in answer.maps] == [0]


def test_without_methods_there_are_confidences_alone() -> None:
    (answer,) = explain(hand(nn.ReLU()), request(1), hand_picture())
    np.testing.assert_allclose(answer.confidences, [0.95257413, 0.04742587], atol=1e-5)
    assert answer.maps == ()


def test_maps_stand_in_the_order_asked_methods_outer_and_classes_inner() -> None:
    asked = request(2, (4, 1, 4), (), methods=BOTH)
    several, single = explain(tiny("varied"), asked, pictures(2, 12))
    assert [(raw.task.method.name, raw.class_id) for raw in several.maps] == [
        (method, number) for method in BOTH for number in (4, 1, 4)
    ]
    top = int(single.confidences.argmax())
    assert [(raw.task.method.name, raw.class_id) for raw in single.maps] == [(method, top) for method in BOTH]
    np.testing.assert_array_equal(several.maps[0].values, several.maps[2].values)
    assert several.maps[0].values.shape == (6, 6)
    assert several.maps[3].values.shape == (12, 12, 3)


@cache
def tiny(name: str) -> Model:
    if name == "varied":
        return model_of(varied(), values=IMAGENET)
    return model_of(program_of(seeded({"residual": Residual, "dense": Dense}[name]), 12), values=IMAGENET)


@cache
def resnet() -> Model:
    return model_of(deep("resnet18")[1], values=IMAGENET)


TARGETS: tuple[tuple[int | str, ...], ...] = ((3,), (), (1, 4, 0), (2, 2), ())


def singly(model: Model, shown: NDArray[np.uint8]) -> list[Explained]:
    return [
        explain(model, request(1, wanted, methods=BOTH), shown[index : index + 1])[0]
        for index, wanted in enumerate(TARGETS)
    ]


def assert_same(ours: list[Explained], others: list[Explained], tolerance: float) -> None:
    assert len(ours) == len(others)
    seen: set[str] = set()
    for one, other in zip(ours, others, strict=True):
        np.testing.assert_allclose(one.confidences, other.confidences, atol=1e-5)
        assert [(raw.task.method.name, raw.class_id) for raw in one.maps] == [
            (raw.task.method.name, raw.class_id) for raw in other.maps
        ]
        for raw, same in zip(one.maps, other.maps, strict=True):
            if degeneracy(same.values) == "all_zero":  # Grad-CAM was negative everywhere
                assert not raw.values.any()
            else:
                seen.add(raw.task.method.name)
                assert close_to(raw.values, same.values) < tolerance, raw.task.method.name
    assert seen == set(BOTH), "maps that are all zero prove nothing"


@pytest.mark.parametrize("name", ["varied", "residual", "dense"])
def test_a_picture_has_the_same_maps_alone_as_in_any_batch(name: str) -> None:
    model, shown = tiny(name), pictures(5, 12)
    alone = singly(model, shown)
    for max_batch in (1, 2, 3, 5):
        batch = explain(model, request(5, *TARGETS, methods=BOTH), shown, max_batch)
        assert_same(batch, alone, 1e-5)


def test_a_picture_has_the_same_maps_alone_as_in_a_batch_of_a_deep_network() -> None:
    model, shown = resnet(), pictures(5, SMALL)
    for max_batch in (2, 5):
        batch = explain(model, request(5, *TARGETS, methods=BOTH), shown, max_batch)
        assert_same(batch, singly(model, shown), 1e-4)


def test_eight_threads_at_once_equal_one_after_the_other() -> None:
    model = tiny("residual")
    shown = [pictures(3, 12, seed=number) for number in range(8)]
    plans = [make_plan(request(3, (number % 5,), (), (0, 3), methods=BOTH), model) for number in range(8)]
    with closing(Device("cpu", 2, 2)) as device, ThreadPoolExecutor(8) as clients:
        serial = [device.run(model, plan, one) for plan, one in zip(plans, shown, strict=True)]
        for _ in range(3):
            futures = [clients.submit(device.run, model, plan, one) for plan, one in zip(plans, shown, strict=True)]
            for future, alone in zip(futures, serial, strict=True):
                assert_same(future.result(), alone, 1e-5)


def state_of(model: Model) -> list[tuple[str, bool, int, list[tuple[str, torch.Tensor, bool]]]]:
    """Everything on the model's modules that a request could leave a trace in."""
    parts: list[nn.Module] = [model.program.source, model.program.split().head, model.program.network("guided")]
    parts += [part for row in model.layers.rows if row.grid and row.node for part in halves(model, row.name)]
    state = []
    for part in parts:
        for name, module in part.named_modules():
            hooks = sum(len(value) for key, value in vars(module).items() if key.endswith("_hooks"))
            tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            assert all(tensor.grad is None for _, tensor in tensors)
            kept = [(key, tensor.detach().clone(), tensor.requires_grad) for key, tensor in tensors]
            state.append((name, module.training, hooks, kept))
    return state


def halves(model: Model, layer: str) -> tuple[nn.Module, nn.Module]:
    split = model.program.split(model.layers.target(layer, True).node)
    return split.head, split.tail


def assert_untouched(model: Model, before: list[tuple[str, bool, int, list[tuple[str, torch.Tensor, bool]]]]) -> None:
    after = state_of(model)
    assert [entry[:3] for entry in after] == [entry[:3] for entry in before]
    for (*_, kept), (*_, now) in zip(before, after, strict=True):
        assert [(key, wanted) for key, _, wanted in kept] == [(key, wanted) for key, _, wanted in now]
        assert all(torch.equal(old, new) for (_, old, _), (_, new, _) in zip(kept, now, strict=True))
        assert not any(wanted for *_, wanted in now)


@pytest.mark.parametrize("name", ["residual", "dense"])
def test_a_request_leaves_no_trace_on_the_model(name: str) -> None:
    model = tiny(name)
    before = state_of(model)
    explain(model, request(5, *TARGETS, methods=BOTH), pictures(5, 12), max_batch=2)
    assert_untouched(model, before)


def test_a_request_given_up_in_the_middle_leaves_no_trace_either() -> None:
    model, shown = tiny("residual"), pictures(5, 12)
    asked = make_plan(request(5, *TARGETS, methods=BOTH), model)
    before = state_of(model)
    with closing(Device("cpu", 1, 5)) as device:
        first = device.run(model, asked, shown)
        for last in itertools.count():  # given up at every moment at which it can be
            asks = itertools.count()
            with contextlib.suppress(DeadlineExceeded):
                device.run(model, asked, shown, functools.partial(lambda asks, last: next(asks) >= last, asks, last))
                break
            assert_untouched(model, before)
        assert last > 12, "at least once for every class of every method"
        again = device.run(model, asked, shown)
    for one, other in zip(first, again, strict=True):
        for raw, same in zip(one.maps, other.maps, strict=True):
            np.testing.assert_array_equal(raw.values, same.values)


def test_too_little_memory_halves_the_batch_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, shown = tiny("residual"), pictures(5, 12)
    alone = singly(model, shown)
    sizes: list[int] = []
    normalise = Model.normalise

    def stingy(self: Model, chunk: NDArray[np.uint8]) -> torch.Tensor:
        sizes.append(len(chunk))
        if len(chunk) > limit:
            raise torch.OutOfMemoryError("none left")
        return normalise(self, chunk)

    monkeypatch.setattr(Model, "normalise", stingy)
    limit = 1
    assert_same(explain(model, request(5, *TARGETS, methods=BOTH), shown), alone, 1e-5)
    assert sizes == [3, 1, 2, 1, 1, 1, 1], "those with as many classes together"
    limit = 0
    with pytest.raises(OutOfDeviceMemory):
        explain(model, request(5, *TARGETS, methods=BOTH), shown)
