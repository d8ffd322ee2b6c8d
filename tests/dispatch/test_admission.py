"""Costs learned from answers, what follows from them at the door, and the two classes of requests."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

import service.methods  # noqa: F401  (registers the methods)
from service.dispatch.costs import FORGET_S, HOLD_S, LONGEST_HOLD_S, MAX_KNOWN, RAISE, RECENT, UNFINISHED, Costs
from service.errors import DeadlineExceeded, DeadlineTooShort, QueueFull
from service.explain.method import REGISTRY
from service.workers.child import describe_method as describe
from service.workers.messages import BATCH_DELAY_S, ExplainRequest
from tests.dispatch.support import Bench, on_loop, settle

SLOW: dict[str, Any] = {"methods": ("score_cam",)}
BATCH: dict[str, Any] = {"priority": "batch"}


METHODS = tuple(describe(method) for method in REGISTRY.values())


def asking(pictures: int = 1, method: str = "grad_cam", classes: int = 0, **params: object) -> ExplainRequest:
    return ExplainRequest("tiny", (b"",) * pictures, (tuple(range(classes)),) * pictures, (method,), gen_params=params)


# Costs


def test_the_cost_is_that_of_the_picture_times_their_number() -> None:
    costs = Costs(lambda: METHODS)
    assert costs.estimate(asking()) is None
    costs.learn(asking(pictures=4), 2.0, finished=True)
    assert costs.estimate(asking()) == 0.5
    assert costs.estimate(asking(pictures=10)) == 5.0
    assert costs.estimate(asking(classes=1)) == 0.5, "the top class is one class"


@pytest.mark.parametrize(
    "other",
    [
        asking(method="saliency"),
        asking(method="rise", classes=2),
        asking(method="rise", n=9),
        asking(method="rise", grid=9),
        ExplainRequest("other", (b"",), ((),), ("rise",)),
        asking(method="smooth_grad"),
        ExplainRequest("tiny", (b"",) * 2, ((0,), (0, 1)), ("rise",)),
    ],
)
def test_what_is_asked_otherwise_has_a_cost_of_its_own(other: ExplainRequest) -> None:
    costs = Costs(lambda: METHODS)
    costs.learn(asking(method="rise"), 1.0, finished=True)
    assert costs.estimate(other) is None


@pytest.mark.parametrize(
    ("method", "one", "other"),
    [
        ("rise", {"n": 9, "seed": 1}, {"seed": 1, "n": 9}),
        ("rise", {"seed": 1}, {"seed": 2}),
        ("rise", {"p": 0.5}, {"p": 0.25, "scaling": "none"}),
        ("rise", {}, {"n": 4000, "seed": 0}),
        ("rise", {"n": 9}, {"rise": {"n": 9}}),
        ("rise", {"n": 9}, {"n": 8, "rise": {"n": 9}}),
        ("smooth_grad", {"seed": 3}, {"sigma": 0.3}),
        ("grad_cam", {}, {"aug_smooth": "false", "use_conv_only": True}),
        ("grad_cam", {"target_conv_layer": "stem"}, {"target_conv_layer": ["stem"]}),
    ],
)
def test_what_changes_no_cost_is_no_part_of_the_key(
    method: str, one: dict[str, object], other: dict[str, object]
) -> None:
    costs = Costs(lambda: METHODS)
    costs.learn(asking(1, method, 0, **one), 1.0, finished=True)
    assert costs.estimate(asking(1, method, 0, **other)) == 1.0


def test_several_methods_have_one_cost_in_any_order_and_several_layers_another_than_the_first() -> None:
    costs = Costs(lambda: METHODS)
    costs.learn(replace(asking(), methods=("saliency", "rise")), 1.0, finished=True)
    assert costs.estimate(replace(asking(), methods=("rise", "saliency"))) == 1.0
    assert costs.estimate(asking(method="saliency")) is None
    costs.learn(asking(target_conv_layer=["stem", "conv"]), 1.0, finished=True)
    assert costs.estimate(asking(target_conv_layer=["stem"])) is None


def test_which_parameters_change_no_cost() -> None:
    """One that decides how often the network runs must not be among them, and a seed must be wherever there is one."""
    schemas = [
        (name, schema.get("x-changes-cost", True))
        for method in METHODS
        for name, schema in method.gen_params["properties"].items()  # type: ignore[attr-defined]
    ]
    costless = {name for name, changes in schemas if not changes}
    assert costless == {"alpha", "blur_sigma", "discard_ratio", "p", "scaling", "seed", "sigma"}
    assert not any(changes for name, changes in schemas if name in costless)


def test_the_latest_costs_weigh_most() -> None:
    costs = Costs(lambda: METHODS)
    for spent in (1.0, 2.0):
        costs.learn(asking(), spent, finished=True)
    assert costs.estimate(asking()) == pytest.approx(RECENT * 2 + (1 - RECENT) * 1)


def test_what_was_given_up_costs_more_than_was_spent() -> None:
    costs = Costs(lambda: METHODS)
    costs.learn(asking(), 8.0, finished=False)
    assert costs.estimate(asking()) == 8.0 * UNFINISHED
    costs.learn(asking(), 1.0, finished=False)
    assert costs.estimate(asking()) == 8.0 * UNFINISHED, "one who left early tells nothing new"


def test_an_estimate_is_forgotten_and_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    costs, now = Costs(lambda: METHODS), time.monotonic()
    costs.learn(asking(), 1.0, finished=True)
    monkeypatch.setattr(time, "monotonic", lambda: now + FORGET_S + 1)
    assert costs.estimate(asking()) is None
    costs.learn(asking(), 5.0, finished=True)
    assert costs.estimate(asking()) == 5.0, "it is no part of a new one"


class Clock:
    """The time as it goes on by request."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.mark.parametrize("usual_s", [0.05, 5.0])
@pytest.mark.parametrize("in_flight", [1, 5])
def test_a_device_that_stalled_once_is_tried_again_soon(clock: Clock, usual_s: float, in_flight: int) -> None:
    costs = Costs(lambda: METHODS)
    costs.learn(asking(), usual_s, finished=True)
    for _ in range(in_flight):
        clock.now += 0.01
        costs.learn(asking(), 30.1, finished=False)
    assert costs.estimate(asking()) == pytest.approx(min(RAISE * usual_s, UNFINISHED * 30.1))
    clock.now += HOLD_S
    assert costs.estimate(asking()) == usual_s
    costs.learn(asking(), usual_s, finished=True)
    assert costs.estimate(asking()) == pytest.approx(usual_s), "nothing of it is left"


@pytest.mark.parametrize("usual_s", [None, 0.05, 29.0])
def test_what_is_hopeless_is_refused_at_once_but_for_a_try_now_and_then(clock: Clock, usual_s: float | None) -> None:
    """Asked for every second for an hour, with a deadline of 30 s."""
    costs, tried, began = Costs(lambda: METHODS), [], clock.now
    if usual_s is not None:
        costs.learn(asking(), usual_s, finished=True)
    while (passed := clock.now - began) < 3600:
        if (costs.estimate(asking()) or 0.0) <= 30:
            tried.append(passed)
            clock.now += 30
            costs.learn(asking(), 30.0, finished=False)
        clock.now += 1
    assert sum(at < 600 for at in tried) <= 8
    assert all(30 + LONGEST_HOLD_S / 2 < late - early < 2 * LONGEST_HOLD_S for early, late in pairwise(tried[8:]))


def test_one_that_was_answered_after_a_stall_refuses_hardly_any(clock: Clock) -> None:
    costs = Costs(lambda: METHODS)
    costs.learn(asking(), 0.05, finished=True)
    costs.learn(asking(), 30.0, finished=True)
    assert costs.estimate(asking()) == pytest.approx((RECENT * RAISE + 1 - RECENT) * 0.05)
    for _ in range(10):  # but what truly takes longer now is known soon
        costs.learn(asking(), 30.0, finished=True)
    assert costs.estimate(asking()) == pytest.approx(30.0, rel=0.1)


def test_where_nothing_was_finished_one_try_refuses_the_next_for_seconds(clock: Clock) -> None:
    costs = Costs(lambda: METHODS)
    costs.learn(asking(), 30.0, finished=False)
    clock.now += HOLD_S - 1
    assert costs.estimate(asking()) == 30.0 * UNFINISHED
    clock.now += 2
    assert costs.estimate(asking()) is None


def test_no_more_than_so_many_are_kept() -> None:
    costs = Costs(lambda: METHODS)
    for number in range(MAX_KNOWN + 1):
        costs.learn(asking(method="rise", n=number), 1.0, finished=True)
    assert costs.estimate(asking(method="rise", n=0)) is None
    assert costs.estimate(asking(method="rise", n=1)) == costs.estimate(asking(method="rise", n=MAX_KNOWN)) == 1.0
    costs.learn(asking(method="rise", n=1), 1.0, finished=True)
    costs.learn(asking(method="rise", n=0), 1.0, finished=True)
    assert costs.estimate(asking(method="rise", n=1)) == 1.0, "it was learned again"
    assert costs.estimate(asking(method="rise", n=2)) is None


# At the door


@on_loop
async def test_what_cannot_be_done_in_its_time_is_refused_at_once() -> None:
    async with Bench() as bench:
        bench.worker.serve("tiny")
        first = await bench.ask(**SLOW)
        bench.worker.finish(1, spent=40.0)
        await first
        for timeout_s, told in ((30, "30 s"), (12.3456, "12 s"), (1.23456, "1.2 s"), (0.000163514, "0.00016 s")):
            with pytest.raises(DeadlineTooShort, match=f"about 40 s of the device's time and has {told};"):
                await (await bench.ask(timeout_s=timeout_s, **SLOW))
        assert bench.worker.ids == [1], "no worker was bothered"
        again = await bench.ask(timeout_s=50, **SLOW)
        bench.worker.finish(2)
        await again


@on_loop
async def test_what_others_leave_no_time_for_is_told_when_to_come_again() -> None:
    async with Bench() as bench:
        bench.worker.serve("tiny")
        first = await bench.ask()
        bench.worker.finish(1, spent=10.0)
        await first
        waiting = [await bench.ask(timeout_s=100) for _ in range(5)]
        with pytest.raises(QueueFull, match="the request itself 10 s; it has 45 s") as refused:
            await (await bench.ask(timeout_s=45))
        assert refused.value.retry_after == pytest.approx(5 * 10 + 10 - 45, abs=1)
        patient = await bench.ask(timeout_s=61)
        for job_id in range(2, 8):
            bench.worker.finish(job_id)
            await settle()
        await asyncio.gather(*waiting, patient)


@on_loop
async def test_two_slots_do_it_in_half_the_time() -> None:
    async with Bench(devices=2) as bench:
        for worker in bench.workers:
            worker.serve("tiny")
        first = await bench.ask()
        bench.worker.finish(1, spent=10.0)
        await first
        waiting = [await bench.ask(timeout_s=100) for _ in range(4)]
        with pytest.raises(QueueFull) as refused:
            await (await bench.ask(timeout_s=15))
        assert refused.value.retry_after == pytest.approx(4 * 10 / 2 + 10 - 15, abs=1)
        for task in waiting:
            task.cancel()


@on_loop
async def test_a_full_queue_says_when_there_is_room() -> None:
    async with Bench(max_queue_pictures=10) as bench:
        bench.worker.serve("tiny")
        first = await bench.ask()
        bench.worker.finish(1, spent=2.0)
        await first
        waiting = [await bench.ask(pictures=pictures, timeout_s=100) for pictures in (3, 3, 4)]
        for pictures, seconds in ((3, 3 * 2), (5, 6 * 2), (10, 10 * 2)):
            with pytest.raises(QueueFull) as refused:
                await (await bench.ask(pictures=pictures, timeout_s=100))
            assert refused.value.retry_after == pytest.approx(seconds, abs=1)
        for task in waiting:
            task.cancel()


@on_loop
async def test_what_a_client_gave_up_is_learned_too() -> None:
    async with Bench() as bench:
        bench.worker.serve("tiny")
        gone = await bench.ask(**SLOW)
        gone.cancel()
        await settle()
        bench.worker.finish(1, DeadlineExceeded("Nobody waits for this request any more."), spent=25.0)
        with pytest.raises(DeadlineTooShort, match="about 31"):
            await (await bench.ask(timeout_s=30, **SLOW))


# Two classes


@pytest.mark.parametrize("long", [SLOW, BATCH], ids=["slow", "batch"])
@on_loop
async def test_a_flood_of_long_requests_refuses_no_quick_one(long: dict[str, Any]) -> None:
    async with Bench(max_queue=8) as bench:
        bench.worker.serve("tiny", capacity=4)
        flood = [await bench.ask(**long) for _ in range(8)]
        refused = [task for task in flood if task.done()]
        assert len(refused) == 4
        for task in refused:
            with pytest.raises(QueueFull, match="holds 4 requests that may wait of at most 4"):
                await task
        assert bench.worker.ids == [1, 2, 3], "a quarter of the worker's room is kept for quick requests"
        quick = await bench.ask()
        assert bench.worker.ids == [1, 2, 3, 5]
        bench.worker.finish(5)
        await quick
        for job_id in (1, 2, 3, 4):
            bench.worker.finish(job_id)
            await settle()
        await asyncio.gather(*flood[:4])


@on_loop
async def test_quick_requests_are_not_kept_out_for_the_time_of_those_that_they_pass() -> None:
    async with Bench() as bench:
        bench.worker.serve("tiny", capacity=4)
        for spent, fields in ((20.0, SLOW), (0.1, {})):
            first = await bench.ask(**fields)
            bench.worker.finish(bench.worker.ids[-1], spent=spent)
            await first
        slow = [await bench.ask(timeout_s=100, **SLOW) for _ in range(4)]
        quick = await bench.ask(timeout_s=5)
        bench.worker.finish(bench.worker.ids[-1])
        await quick
        with pytest.raises(QueueFull):
            await (await bench.ask(timeout_s=90, **SLOW))
        for task in slow:
            task.cancel()


@on_loop
async def test_interactive_requests_pass_those_of_the_batch_class_but_not_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with Bench() as bench:
        bench.worker.serve("tiny")
        first = await bench.ask()
        batch = await bench.ask(**BATCH)
        quick = await bench.ask()
        bench.worker.finish(1)
        await settle()
        assert bench.worker.ids == [1, 3]
        now = time.monotonic()
        with monkeypatch.context() as patch:
            patch.setattr(time, "monotonic", lambda: now + BATCH_DELAY_S + 1)
            late = await bench.ask()
        bench.worker.finish(3)
        await settle()
        assert bench.worker.ids == [1, 3, 2], "it has waited long enough"
        bench.worker.finish(2)
        await settle()
        bench.worker.finish(4)
        await asyncio.gather(first, batch, quick, late)


@on_loop
async def test_a_long_request_that_lost_its_worker_is_tried_again_when_the_quick_ones_are_answered() -> None:
    async with Bench() as bench:
        bench.worker.serve("tiny", capacity=4)
        slow, quick = await bench.ask(**SLOW), await bench.ask()
        bench.worker.die()
        fresh = await bench.started()
        fresh.serve("tiny", capacity=4)
        late = await bench.ask()
        for expected in ([2], [2, 3], [2, 3, 1]):
            await settle()
            assert fresh.ids == expected
            fresh.finish(expected[-1])
        await asyncio.gather(slow, quick, late)


# What became of them


@on_loop
async def test_every_accepted_request_is_counted_once() -> None:
    async with Bench(max_queue=4) as bench:
        bench.worker.serve("tiny", capacity=8)
        counts = bench.dispatcher.counts
        answered, failed, cancelled, late = [
            await bench.ask(), await bench.ask(), await bench.ask(), await bench.ask(timeout_s=0.01)
        ]  # fmt: skip
        refused = await bench.ask()
        bench.worker.finish(1)
        bench.worker.finish(2, QueueFull("some error of the worker"))
        cancelled.cancel()
        await asyncio.gather(answered, failed, cancelled, late, refused, return_exceptions=True)
        assert vars(counts) == {"accepted": 4, "answered": 1, "failed": 1, "cancelled": 1, "timed_out": 1}
