"""Slots and their batches: who shares one, whose turn it is, who is dropped, and that company changes no result."""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import cache, partial

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from service.errors import DeadlineExceeded, OutOfDeviceMemory, ServiceError
from service.models.resident import Model
from service.workers.compute import Explained
from service.workers.device import Computed, Device, Item, Order
from service.workers.messages import BATCH_DELAY_S
from service.workers.plan import make_plan
from tests.nets import IMAGENET, close_to, hand, hand_picture, model_of, pictures, request, residual, varied
from tests.server import wait_until

Pixels = NDArray[np.uint8]
BOTH = ("grad_cam", "guided_grad_cam")


@cache
def net(name: str = "varied") -> Model:
    return model_of({"varied": varied, "residual": residual}[name](), values=IMAGENET)


@cache
def blocker() -> Model:
    return hand()


class Watch:
    """Sees every batch as it enters a network, and does before what a test wants."""

    def __init__(self) -> None:
        self.batches: list[Pixels] = []
        self.before: Callable[[Pixels], None] = lambda pixels: None

    @contextlib.contextmanager
    def held(self, device: Device) -> Iterator[None]:
        """Keeps the only slot busy, so that what is put meanwhile waits together."""
        self._entered, self._go = threading.Event(), threading.Event()
        busy = Item(Order(blocker(), (), lambda: False), hand_picture()[0], ())
        device.put([busy])
        assert self._entered.wait(60)
        try:
            yield
        finally:
            self._go.set()
        busy.result.result(60)

    def see(self, model: Model, pixels: Pixels) -> None:
        if model is blocker():
            self._entered.set()
            assert self._go.wait(60)
        else:
            self.batches.append(pixels)
            self.before(pixels)

    @property
    def sizes(self) -> list[int]:
        return [len(batch) for batch in self.batches]


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    one = Watch()
    normalise = Model.normalise

    def watched(model: Model, pixels: Pixels) -> Tensor:
        one.see(model, pixels)
        return normalise(model, pixels)

    monkeypatch.setattr(Model, "normalise", watched)
    return one


def order(
    model: Model | None = None, *methods: str, gone: Callable[[], bool] = lambda: False, **params: object
) -> Order:
    model = model or net()
    return Order(model, make_plan(request(methods=methods, gen_params=params), model).tasks, gone)


def cam(gone: Callable[[], bool] = lambda: False) -> Order:
    return order(None, "grad_cam", gone=gone)


def item(of: Order, seed: int = 0, *classes: int) -> Item:
    return Item(of, pictures(1, 12, seed)[0], classes)


def answer(of: Item) -> Explained:
    computed: Computed = of.result.result(60)
    assert computed.ended > computed.started > 0
    return computed.explained


def alone(of: Item) -> Explained:
    """What the picture gives on a device of its own."""
    with closing(Device("cpu", 1, 1)) as device:
        twin = Item(Order(of.order.model, of.order.tasks, lambda: False), of.pixels, of.classes)
        device.put([twin])
        return answer(twin)


def assert_same(one: Explained, other: Explained, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(one.confidences, other.confidences, atol=1e-5)
    assert [raw.class_id for raw in one.maps] == [raw.class_id for raw in other.maps]
    for raw, same in zip(one.maps, other.maps, strict=True):
        assert close_to(raw.values, same.values) <= tolerance


@pytest.fixture
def device() -> Iterator[Device]:
    with closing(Device("cpu", 1, 4)) as one:
        yield one


# Who shares a batch


def test_pictures_of_several_requests_with_different_targets_share_a_batch(device: Device, watch: Watch) -> None:
    items = [item(cam(), 0, 3), item(cam(), 1, 5), item(cam(), 2), item(cam(), 3, 0)]
    with watch.held(device):
        for one in items:
            device.put([one])
    answers = [answer(one) for one in items]
    assert watch.sizes == [4]
    assert [one.maps[0].class_id for one in answers] == [3, 5, int(answers[2].confidences.argmax()), 0]
    for one, together in zip(items, answers, strict=True):
        assert_same(together, alone(one))


def test_a_free_slot_takes_one_picture_at_once(device: Device, watch: Watch) -> None:
    answer_to = item(cam())
    device.put([answer_to])
    answer(answer_to)
    assert watch.sizes == [1]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda: item(cam()), lambda: item(order(net("residual"), "grad_cam"))),
        (lambda: item(cam()), lambda: item(order(None, "guided_grad_cam"))),
        (lambda: item(cam()), lambda: item(order(None, *BOTH))),
        (lambda: item(cam()), lambda: item(order(None, "grad_cam", target_conv_layer="first"))),
        (lambda: item(cam()), lambda: item(order(None, "grad_cam", scaling="none"))),
        (lambda: item(cam(), 0, 1), lambda: item(cam(), 0, 1, 2)),
        (lambda: item(cam()), lambda: item(order())),
    ],
    ids=["model", "method", "methods", "layer", "parameters", "number of classes", "no method"],
)
def test_what_cannot_be_computed_together_is_computed_one_after_the_other(
    device: Device, watch: Watch, one: Callable[[], Item], other: Callable[[], Item]
) -> None:
    both = [one(), other()]
    with watch.held(device):
        for each in both:
            device.put([each])
    answers = [answer(each) for each in both]
    assert watch.sizes == [1, 1]
    for each, beside in zip(both, answers, strict=True):
        assert_same(beside, alone(each))


def test_requests_for_predictions_share_a_batch(device: Device, watch: Watch) -> None:
    items = [item(order(), seed) for seed in range(3)]
    with watch.held(device):
        for one in items:
            device.put([one])
    for one in items:
        assert answer(one).maps == ()
    assert watch.sizes == [3]


def test_a_large_request_is_cut_and_the_others_have_their_turns_in_between(device: Device, watch: Watch) -> None:
    large = cam()
    many = [item(large, seed) for seed in range(10)]
    unlike, alike = item(order(None, "guided_grad_cam"), 20), item(cam(), 21)
    with watch.held(device):
        device.put(many)
        device.put([unlike])
        device.put([alike])
    answers = [(one, answer(one)) for one in (*many, unlike, alike)]
    seen = [[number_of(pixels) for pixels in batch] for batch in watch.batches]
    assert seen == [[0, 1, 2, 3], [20], [21, 4, 5, 6], [7, 8, 9]]
    for one, together in answers:
        assert_same(together, alone(one))


def number_of(pixels: Pixels) -> int:
    """The seed of a picture."""
    return next(seed for seed in range(30) if np.array_equal(pictures(1, 12, seed)[0], pixels))


def test_every_slot_works(watch: Watch) -> None:
    both = threading.Barrier(2)
    watch.before = lambda pixels: void(both.wait(60))
    with closing(Device("cpu", 2, 4)) as device:
        items = [item(cam()), item(order(None, "guided_grad_cam"))]
        for one in items:
            device.put([one])
        for one in items:
            answer(one)


def void(_: object) -> None: ...


# Who is dropped


def test_who_is_gone_at_the_turn_is_not_computed_and_holds_no_place(device: Device, watch: Watch) -> None:
    left: set[str] = set()
    gone = order(None, "grad_cam", gone=lambda: "gone" in left)
    dropped = [item(gone, seed) for seed in range(6)]
    mates = [item(cam(), 10 + seed) for seed in range(4)]
    with watch.held(device):
        device.put(dropped)
        device.put(mates)
        left.add("gone")
    for one in dropped:
        with pytest.raises(DeadlineExceeded):
            one.result.result(60)
    for one in mates:
        answer(one)
    assert watch.sizes == [4]


def test_a_batch_goes_on_while_anybody_waits_for_it(device: Device, watch: Watch) -> None:
    left: set[str] = set()
    watch.before = lambda pixels: left.add("first")
    first, second = (order(None, "grad_cam", gone=partial(left.__contains__, name)) for name in ("first", "second"))
    items = [item(first, 0, 1), item(second, 1, 1)]
    with watch.held(device):
        for one in items:
            device.put([one])
    for one in items:  # whoever is gone does not fetch it
        answer(one)
    assert watch.sizes == [2]


def test_a_batch_that_nobody_waits_for_stops(device: Device, watch: Watch) -> None:
    left: set[str] = set()
    watch.before = lambda pixels: left.update(("first", "second"))
    first, second = (order(None, "grad_cam", gone=partial(left.__contains__, name)) for name in ("first", "second"))
    items = [item(first, 0, 1, 2), item(second, 1, 1, 2)]
    with watch.held(device):
        for one in items:
            device.put([one])
    for one in items:
        with pytest.raises(DeadlineExceeded):
            one.result.result(60)
    assert watch.sizes == [2], "nobody computes it again"


# Whose fault it is


def fails_for(seed: int, error: Exception) -> Callable[[Pixels], None]:
    guilty = pictures(1, 12, seed)[0]

    def fail(batch: Pixels) -> None:
        if any(np.array_equal(guilty, pixels) for pixels in batch):
            raise error

    return fail


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError("an index is out of range"), RuntimeError),
        (torch.OutOfMemoryError("none left"), OutOfDeviceMemory),
    ],
    ids=["defect", "memory"],
)
def test_a_failure_is_that_of_the_guilty_request_alone(
    device: Device, watch: Watch, error: Exception, kind: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    watch.before = fails_for(1, error)
    guilty = cam()
    items = [item(cam(), 0), item(guilty, 1), item(guilty, 2), item(cam(), 3)]
    with watch.held(device):
        for one in items:
            device.put([one])
    for index in (1, 2):
        with pytest.raises(kind):
            items[index].result.result(60)
    watch.before = lambda pixels: None
    for index in (0, 3):
        assert_same(answer(items[index]), alone(items[index]))
    assert ("an index is out of range" in caplog.text) == (kind is RuntimeError)


def test_too_little_memory_for_a_batch_of_several_requests_costs_none_of_them(device: Device, watch: Watch) -> None:
    def fail(batch: Pixels) -> None:
        if len(batch) > 1:
            raise torch.OutOfMemoryError("none left")

    watch.before = fail
    items = [item(cam(), seed) for seed in range(3)]
    with watch.held(device):
        for one in items:
            device.put([one])
    for one in items:
        assert_same(answer(one), alone(one))
    assert watch.sizes[0] == 3


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_a_batch_is_kept(
    device: Device, watch: Watch, fails: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "service.workers.device")  # pytest would keep the traceback
    kept: list[weakref.ref[Pixels]] = []

    def note(pixels: Pixels) -> None:
        watch.batches.clear()
        kept.append(weakref.ref(pixels))
        if fails:
            raise RuntimeError("a traceback that leads to the pixels")

    watch.before = note
    items = [item(cam(), seed) for seed in range(2)]
    gc.disable()
    try:
        for one in items:
            device.put([one])
        assert [isinstance(one.result.exception(60), RuntimeError) for one in items] == [fails, fails]
        with watch.held(device):  # the slot has done with the batch
            assert kept
            assert not any(pixels() is not None for pixels in kept)
    finally:
        gc.enable()


# Threads


def test_threads_at_once_get_bitwise_what_they_get_one_after_the_other_in_batches_of_one(watch: Watch) -> None:
    model = net("residual")
    shown = [pictures(3, 12, seed=number) for number in range(8)]
    plans = [make_plan(request(3, (number % 5,), (), (0, 3), methods=BOTH), model) for number in range(8)]
    with closing(Device("cpu", 2, 1)) as device, ThreadPoolExecutor(8) as clients:
        serial = [device.run(model, plan, one) for plan, one in zip(plans, shown, strict=True)]
        together: list[Future[list[Explained]]] = [
            clients.submit(device.run, model, plan, one) for plan, one in zip(plans, shown, strict=True)
        ]
        for future, expected in zip(together, serial, strict=True):
            for one, other in zip(future.result(), expected, strict=True):
                np.testing.assert_array_equal(one.confidences, other.confidences)
                for raw, same in zip(one.maps, other.maps, strict=True):
                    np.testing.assert_array_equal(raw.values, same.values)
    assert set(watch.sizes) == {1}


def test_closing_computes_what_waits_and_leaves_no_thread() -> None:
    before = set(threading.enumerate())
    device = Device("cpu", 2, 2)
    items = [item(cam(), seed) for seed in range(9)]
    device.put(items)
    device.close()
    assert all(one.result.done() for one in items)
    for one in items:
        answer(one)
    assert set(threading.enumerate()) <= before


def test_run_raises_what_went_wrong(device: Device, watch: Watch) -> None:
    def fail(pixels: Pixels) -> None:
        raise ServiceError("wrong")

    watch.before = fail
    with pytest.raises(ServiceError, match="wrong"):
        device.run(net(), make_plan(request(2, methods=("grad_cam",)), net()), pictures(2, 12))


class Steps:
    """Stands between the steps of a long request and does there what a test wants."""

    def __init__(self, then: Callable[[int], None]) -> None:
        self.count = -1  # the first look is that of the slot which takes the request
        self._then = then

    def __call__(self) -> bool:
        self.count += 1
        if self.count:
            self._then(self.count)
        return False


@pytest.mark.parametrize("batch", [False, True], ids=["a slow method", "the class batch"])
def test_quick_requests_pass_a_long_one_between_its_steps_and_neither_changes(batch: bool, watch: Watch) -> None:
    with closing(Device("cpu", 1, 2)) as device:
        quick = [item(cam(), seed) for seed in range(4)]
        done_at: list[list[int]] = []

        def between(step: int) -> None:
            assert not slow.result.done()
            done_at.append([place for place, one in enumerate(quick) if one.result.done()])
            if step == 3:
                device.put(quick)

        steps = Steps(between)
        slow = item(order(None, *(("grad_cam", "random_cam") if batch else ("score_cam",)), gone=steps), 9, 1, 2, 3)
        slow.order.batch = batch
        device.put([slow])
        found = answer(slow)
        assert [len(done) for done in done_at[3:6]] == [2, 4, 4], "one batch at each step, so that the long one goes on"
        assert len(done_at) > 5
        for one in quick:
            assert_same(answer(one), alone(one))
        assert_same(found, alone(slow))
        assert slow.order.spent < answer_time(slow)


def answer_time(of: Item) -> float:
    computed: Computed = of.result.result(0)
    return computed.ended - computed.started


def test_long_requests_pass_nobody(watch: Watch) -> None:
    with closing(Device("cpu", 1, 2)) as device:
        others = [item(order(None, "score_cam"), 1), item(cam(), 2)]
        others[1].order.batch = True

        def between(step: int) -> None:
            if step == 1:
                device.put(others)
            assert not any(other.result.done() for other in others)

        slow = item(order(None, "score_cam", gone=Steps(between)), 9)
        device.put([slow])
        answer(slow)
        for other in others:
            answer(other)


def test_the_class_batch_has_its_turn_after_the_others_unless_it_has_waited_long(device: Device, watch: Watch) -> None:
    items = [item(cam(), seed) for seed in range(3)]
    items[0].order.batch = items[1].order.batch = True
    items[0].order.since -= 2 * BATCH_DELAY_S
    with closing(Device("cpu", 1, 1)) as single:
        with watch.held(single):
            single.put([items[2], items[1], items[0]])
        for one in items:
            answer(one)
    turns = [[np.array_equal(one.pixels, batch[0]) for one in items].index(True) for batch in watch.batches]
    assert turns == [0, 2, 1]


def test_what_a_request_costs_is_its_share_of_its_batches(device: Device, watch: Watch) -> None:
    many, one = cam(), cam()
    items = [*(item(many, seed) for seed in range(3)), item(one, 7)]
    with watch.held(device):
        device.put(items)
    for each in items:
        answer(each)
    assert watch.sizes == [4]
    assert many.spent == pytest.approx(3 * one.spent)
    assert many.spent + one.spent == pytest.approx(answer_time(items[0]))


def test_a_lost_device_is_told_and_an_ordinary_error_is_not(device: Device, watch: Watch) -> None:
    told: list[str] = []

    def fail(message: str, _pixels: Pixels) -> None:
        raise RuntimeError(message)

    for message in ("CUDA error: device-side assert triggered", "CUDA error: invalid argument", "no assert triggered"):
        device.on_poisoned = partial(told.append, message)
        watch.before = partial(fail, message)
        with pytest.raises(RuntimeError):
            device.run(net(), make_plan(request(methods=("grad_cam",)), net()), pictures(1, 12))
    assert told == ["CUDA error: device-side assert triggered"]


def test_a_step_without_an_end_shows(device: Device, watch: Watch) -> None:
    assert device.progress.stalled_s() == 0
    with watch.held(device):
        time.sleep(0.3)
        assert device.progress.stalled_s() >= 0.3
        time.sleep(0.1)
        assert device.progress.stalled_s() >= 0.4
    wait_until(lambda: device.progress.stalled_s() == 0, 60)
