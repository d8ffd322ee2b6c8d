"""The dispatcher over the real pool over workers without processes: who is admitted, handed over, lost, answered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import (
    BodyTooLarge,
    DeadlineExceeded,
    Draining,
    InvalidRequest,
    ModelFailed,
    ModelLoading,
    ModelNotFound,
    ModelTypeNotSupported,
    NoWorker,
    QueueFull,
    ServiceError,
    TooManyPictures,
    WorkerLost,
)
from service.workers.messages import Answer, ModelInfo
from tests.dispatch.support import METHOD, SLOW, Bench, FakeWorker, answer, on_loop, request, settle


async def results(tasks: Iterable[asyncio.Task[Answer]]) -> list[Answer | BaseException]:
    return await asyncio.gather(*tasks, return_exceptions=True)


async def nothing_left(bench: Bench) -> None:
    """No accepted request is there any more: a drain has nothing to wait for and nothing to refuse."""
    async with asyncio.timeout(30):
        await bench.dispatcher.drain(60)


# Admission


@pytest.mark.parametrize(
    ("limits", "pictures", "size_bytes", "message"),
    [
        ({"max_queue": 1}, 1, 1, "The queue holds 1 requests of at most 1, and this request brings 1 more."),
        ({"max_queue_pictures": 4}, 3, 1, "The queue holds 2 pictures of at most 4, and this request brings 3 more."),
        ({"max_queue_bytes": 100}, 1, 91, "The queue holds 10 bytes of at most 100, and this request brings 91 more."),
    ],
    ids=["requests", "pictures", "bytes"],
)
@on_loop
async def test_a_full_queue_says_so_in_numbers(
    limits: dict[str, int], pictures: int, size_bytes: int, message: str
) -> None:
    async with Bench(**limits) as bench:
        bench.worker.serve("tiny")
        first = await bench.ask(pictures=2, size_bytes=10)
        second = await bench.ask(pictures=pictures, size_bytes=size_bytes)
        with pytest.raises(QueueFull) as refused:
            await second
        assert refused.value.detail == message
        assert refused.value.retry_after is not None
        assert refused.value.retry_after > 0
        bench.worker.finish(1)
        assert (await first).results == ()
        again = await bench.ask(pictures=pictures, size_bytes=size_bytes)
        bench.worker.finish(bench.worker.ids[-1])
        await again


@pytest.mark.parametrize(
    ("limits", "pictures", "size_bytes"),
    [({"max_queue": 2}, 1, 1), ({"max_queue_pictures": 4}, 2, 1), ({"max_queue_bytes": 100}, 1, 50)],
)
@on_loop
async def test_the_bounds_themselves_are_allowed(limits: dict[str, int], pictures: int, size_bytes: int) -> None:
    async with Bench(**limits) as bench:
        bench.worker.serve("tiny", capacity=2)
        tasks = [await bench.ask(pictures=pictures, size_bytes=size_bytes) for _ in range(2)]
        for job_id in (1, 2):
            bench.worker.finish(job_id)
        assert all(isinstance(one, Answer) for one in await results(tasks))


@on_loop
async def test_a_refused_request_costs_nothing_that_is_queued() -> None:
    async with Bench(max_queue=1) as bench:
        bench.worker.serve("tiny")
        first = await bench.ask()
        refused = await results([await bench.ask() for _ in range(10)])
        assert all(isinstance(one, QueueFull) for one in refused)
        assert not first.done()
        bench.worker.finish(1)
        await first
        await nothing_left(bench)


@pytest.mark.parametrize(
    ("limits", "pictures", "size_bytes", "kind"),
    [({"max_queue_pictures": 4}, 5, 1, TooManyPictures), ({"max_queue_bytes": 100}, 1, 101, BodyTooLarge)],
)
@on_loop
async def test_what_an_empty_queue_cannot_hold_is_too_large(
    limits: dict[str, int], pictures: int, size_bytes: int, kind: type[ServiceError]
) -> None:
    async with Bench(**limits) as bench:
        bench.worker.serve("tiny")
        with pytest.raises(kind) as refused:
            await (await bench.ask(pictures=pictures, size_bytes=size_bytes))
        assert refused.value.retry_after is None


def latest(worker: FakeWorker) -> int:
    """The pictures of the last job that it has."""
    return len(worker.jobs[max(worker.jobs)].request.pictures) if worker.jobs else 0


Step = tuple[str, int, int]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["ask", "ask", "ask", "finish", "fail", "cancel", "die"]), st.integers(1, 4), st.integers(0, 9)
    ),
    max_size=40,
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(STEPS)
def test_whatever_happens_the_depth_keeps_its_bounds_and_every_request_ends(steps: list[Step]) -> None:
    @on_loop
    async def scenario() -> None:
        async with Bench(devices=2, max_queue=5, max_queue_pictures=9, max_queue_bytes=20) as bench:
            workers = list(bench.workers)
            for worker in workers:
                worker.serve("tiny", capacity=2)
            tasks: list[tuple[asyncio.Task[Answer], int, int]] = []
            for action, number, choice in steps:
                if action == "ask":
                    tasks.append((await bench.ask(pictures=number, size_bytes=choice), number, choice))
                elif action == "cancel" and tasks:
                    tasks[choice % len(tasks)][0].cancel()
                elif action == "die":
                    workers.pop(choice % 2).die()
                    workers.append(await bench.started())
                    workers[-1].serve("tiny", capacity=2)
                else:
                    worker = workers[choice % 2]
                    for job_id in sorted(worker.jobs)[:1]:
                        worker.finish(job_id, InvalidRequest("wrong") if action == "fail" else None)
                await settle()
                held = [(pictures, size) for task, pictures, size in tasks if not task.done()]
                assert len(held) <= 5
                assert sum(pictures for pictures, _ in held) <= 9
                assert sum(size for _, size in held) <= 20
                # there was room before the last of its requests
                assert all(worker.pictures - latest(worker) < 2 for worker in workers)
                if "die" not in [action for action, _, _ in steps]:  # what lost its worker may wait for an empty one
                    waiting = len(held) - sum(len(worker.jobs) for worker in workers)
                    assert waiting <= 0 or all(worker.pictures >= 2 for worker in workers)
            await bench.dispatcher.drain(0)
            assert all(task.done() for task, _, _ in tasks)
            for task, _, _ in tasks:
                assert task.cancelled() or task.exception() is None or isinstance(task.exception(), ServiceError)

    scenario()


# Hand-over


@on_loop
async def test_requests_are_handed_over_in_the_order_of_their_arrival() -> None:
    async with Bench() as bench:
        bench.worker.serve("tiny")
        tasks = [await bench.ask() for _ in range(4)]
        assert bench.worker.ids == [1]
        for job_id in (1, 2, 3, 4):
            bench.worker.finish(job_id)
            await settle()
            assert bench.worker.ids == list(range(1, min(job_id + 1, 4) + 1))
        assert len(await results(tasks)) == 4


@on_loop
async def test_the_worker_is_told_the_deadline_and_the_request() -> None:
    async with Bench() as bench:
        bench.worker.serve("tiny")
        before = time.monotonic()
        task = await bench.ask(pictures=3, timeout_s=60)
        (job,) = bench.worker.given
        assert before + 60 <= job.deadline <= time.monotonic() + 60
        assert job.request == request(pictures=3)
        bench.worker.finish(job.id)
        await task


@on_loop
async def test_the_least_busy_worker_takes_the_next_request() -> None:
    async with Bench(devices=2) as bench:
        for worker in bench.workers:
            worker.serve("tiny", capacity=3)
        tasks = [await bench.ask() for _ in range(6)]
        assert [len(worker.jobs) for worker in bench.workers] == [3, 3]
        for worker in bench.workers:
            for job_id in worker.ids:
                worker.finish(job_id)
        await results(tasks)


@on_loop
async def test_a_worker_has_room_for_pictures_and_for_one_request_however_large() -> None:
    async with Bench() as bench:
        bench.worker.serve("tiny", capacity=4)
        tasks = [await bench.ask(pictures=pictures) for pictures in (64, 1, 2, 3, 1)]
        assert bench.worker.ids == [1]
        bench.worker.finish(1)
        await settle()
        assert bench.worker.ids == [1, 2, 3, 4], "1 + 2 pictures left room for one, and the oldest request has three"
        bench.worker.finish(2)
        await settle()
        assert bench.worker.ids == [1, 2, 3, 4], "five of four"
        bench.worker.finish(3)
        await settle()
        assert bench.worker.ids == [1, 2, 3, 4, 5]
        for job_id in (4, 5):
            bench.worker.finish(job_id)
        assert all(isinstance(one, Answer) for one in await results(tasks))


@on_loop
async def test_a_model_that_no_free_worker_has_blocks_no_other_model() -> None:
    async with Bench("tiny", "other", devices=2) as bench:
        one, two = bench.workers
        one.serve("tiny")
        two.serve("other")
        tiny = [await bench.ask("tiny") for _ in range(3)]
        other = await bench.ask("other")
        assert (one.ids, two.ids) == ([1], [4])
        two.finish(4)
        await other
        assert not any(task.done() for task in tiny)
        two.tell(ModelInfo("tiny", "ready"))  # a model more is room as well
        await settle()
        assert two.ids == [4, 2]
        one.finish(1)
        two.finish(2)
        await settle()
        one.finish(3)
        await results(tiny)


@on_loop
async def test_waiting_requests_go_to_a_worker_as_soon_as_one_says_it_has_room() -> None:
    async with Bench(devices=2) as bench:
        one, two = bench.workers
        one.serve("tiny")
        tasks = [await bench.ask() for _ in range(3)]
        two.serve("tiny", capacity=2)
        await settle()
        assert two.ids == [2, 3]
        one.finish(1)
        two.finish(2)
        two.finish(3)
        await results(tasks)


# The deadline


@on_loop
async def test_a_deadline_that_passes_in_the_queue_takes_the_request_out_of_it() -> None:
    async with Bench(max_queue=2) as bench:
        bench.worker.serve("tiny")
        first = await bench.ask()
        late = await bench.ask(timeout_s=0)
        with pytest.raises(DeadlineExceeded, match=r"its 0 seconds; its work was dropped\. Give it a longer"):
            await late
        third = await bench.ask()  # its place is free again
        bench.worker.finish(1)
        await settle()
        assert bench.worker.ids == [1, 3]
        assert bench.worker.cancelled == []
        bench.worker.finish(3)
        await results([first, third])
        await nothing_left(bench)


@on_loop
async def test_a_deadline_that_passes_at_the_worker_cancels_the_work() -> None:
    async with Bench() as bench:
        bench.worker.serve("tiny")
        with pytest.raises(DeadlineExceeded):
            await (await bench.ask(timeout_s=0))
        assert bench.worker.cancelled == [1]
        waiting = await bench.ask()
        assert bench.worker.ids == [1], "the cancelled job holds its place until the worker lets go of it"
        bench.worker.finish(1, DeadlineExceeded("Nobody waits for this request any more."))
        await settle()
        assert bench.worker.ids == [1, 2]
        bench.worker.finish(2)
        await waiting
        await nothing_left(bench)


@on_loop
async def test_an_answer_that_comes_too_late_is_ignored() -> None:
    async with Bench() as bench:
        bench.worker.serve("tiny")
        with pytest.raises(DeadlineExceeded):
            await (await bench.ask(timeout_s=0))
        bench.worker.finish(1)
        bench.worker.finish(1)
        bench.worker.finish(99)
        await nothing_left(bench)


@on_loop
async def test_an_answer_and_the_loss_of_its_worker_in_one_turn_of_the_loop_keep_the_answer() -> None:
    async with Bench() as bench:
        bench.worker.serve("tiny")
        task = await bench.ask()
        bench.worker.finish(1)
        bench.worker.die()
        assert await task == answer(queue=(await task).timings.queue)
        await nothing_left(bench)


# The caller leaves


@on_loop
async def test_a_caller_who_leaves_the_queue_leaves_nothing_there() -> None:
    async with Bench() as bench:
        bench.worker.serve("tiny")
        first, gone, third = [await bench.ask() for _ in range(3)]
        gone.cancel()
        await settle()
        assert gone.cancelled()
        bench.worker.finish(1)
        await settle()
        assert bench.worker.ids == [1, 3]
        assert bench.worker.cancelled == []
        bench.worker.finish(3)
        await results([first, third])
        await nothing_left(bench)


@on_loop
async def test_a_caller_who_leaves_the_worker_cancels_the_work_there_and_nothing_else() -> None:
    async with Bench() as bench:
        bench.worker.serve("tiny", capacity=2)
        gone, mate = [await bench.ask() for _ in range(2)]
        gone.cancel()
        await settle()
        assert bench.worker.cancelled == [1]
        bench.worker.finish(1, DeadlineExceeded("Nobody waits for this request any more."))
        bench.worker.finish(2)
        assert isinstance(await mate, Answer)
        await nothing_left(bench)


# Lost workers


@on_loop
async def test_the_requests_of_a_lost_worker_come_first_again_in_their_order() -> None:
    async with Bench() as bench:
        bench.worker.serve("tiny", capacity=3)
        tasks = [await bench.ask() for _ in range(5)]
        bench.worker.die()
        fresh = await bench.started()
        fresh.serve("tiny", capacity=1)
        order = []
        for _ in tasks:
            (job_id,) = fresh.jobs
            order.append(job_id)
            fresh.finish(job_id)
            await settle()
        assert order == [1, 2, 3, 4, 5]
        assert all(isinstance(one, Answer) for one in await results(tasks))


@on_loop
async def test_another_worker_with_room_takes_a_lost_request_at_once() -> None:
    async with Bench(devices=2) as bench:
        for worker in bench.workers:
            worker.serve("tiny")
        first = await bench.ask()
        (busy,) = [worker for worker in bench.workers if worker.jobs]
        (idle,) = [worker for worker in bench.workers if not worker.jobs]
        busy.die()
        assert idle.ids == [1]
        idle.finish(1)
        await first


@on_loop
async def test_a_lost_request_waits_until_a_busy_worker_is_empty_and_then_has_it_alone() -> None:
    async with Bench(devices=2) as bench:
        dying, busy = bench.workers
        dying.serve("tiny")
        first = await bench.ask()
        busy.serve("tiny", capacity=3)
        second = await bench.ask()
        dying.die()
        await settle()
        third = await bench.ask()
        assert busy.ids == [2], "the first must not take the second along"
        busy.finish(2)
        assert busy.ids == [2, 1], "nor the third, which came when it was waiting"
        busy.finish(1)
        assert busy.ids == [2, 1, 3]
        busy.finish(3)
        await asyncio.gather(first, second, third)


@on_loop
async def test_a_request_whose_worker_dies_twice_is_lost() -> None:
    async with Bench() as bench:
        worker = bench.worker
        worker.serve("tiny")
        task = await bench.ask()
        for _ in range(2):
            assert not task.done()
            worker.die()
            await settle()
            worker = await bench.started()
            worker.serve("tiny")
        with pytest.raises(WorkerLost) as lost:
            await task
        assert lost.value.retry_after is not None
        assert worker.ids == []
        await nothing_left(bench)


@on_loop
async def test_a_request_does_not_wait_for_a_model_that_could_not_be_loaded_again() -> None:
    async with Bench() as bench:
        bench.worker.serve("tiny")
        task = await bench.ask()
        bench.worker.die()
        fresh = await bench.started()
        fresh.hello()
        await settle()
        assert not task.done()
        fresh.tell(ModelInfo("tiny", "failed", reason="it is gone"))
        with pytest.raises(ModelFailed, match="it is gone"):
            await task
        await nothing_left(bench)


@on_loop
async def test_a_request_that_kills_its_worker_twice_costs_no_other_request() -> None:
    async with Bench() as bench:
        worker = bench.worker
        worker.serve("tiny", capacity=3)
        poison, *mates = [await bench.ask() for _ in range(3)]
        while not poison.done():
            while 1 not in worker.jobs:  # what is not poisoned is computed
                worker.finish(min(worker.jobs))
                await settle()
            worker.die()
            await settle()
            worker = await bench.started()
            worker.serve("tiny", capacity=3)
            await settle()
        while worker.jobs:
            worker.finish(min(worker.jobs))
            await settle()
        lost, *answers = await results([poison, *mates])
        assert isinstance(lost, WorkerLost)
        assert [type(one) for one in answers] == [Answer, Answer]


@on_loop
async def test_the_cancelled_jobs_of_a_lost_worker_are_dropped() -> None:
    async with Bench() as bench:
        bench.worker.serve("tiny", capacity=2)
        gone, stays = [await bench.ask() for _ in range(2)]
        gone.cancel()
        await settle()
        bench.worker.die()
        fresh = await bench.started()
        fresh.serve("tiny", capacity=2)
        assert fresh.ids == [2]
        fresh.finish(2)
        await stays


@on_loop
async def test_a_lost_request_whose_deadline_passes_before_a_new_worker_is_there() -> None:
    async with Bench() as bench:
        bench.worker.serve("tiny")
        task = await bench.ask(timeout_s=0.05)
        bench.worker.die()
        with pytest.raises(DeadlineExceeded):
            await task
        fresh = await bench.started()
        fresh.serve("tiny")
        assert fresh.ids == []
        await nothing_left(bench)


# Draining


@on_loop
async def test_draining_refuses_new_requests_and_waits_for_the_accepted_ones() -> None:
    async with Bench() as bench:
        bench.worker.serve("tiny")
        tasks = [await bench.ask() for _ in range(2)]
        drained = asyncio.create_task(bench.dispatcher.drain(60))
        await settle()
        with pytest.raises(Draining) as refused:
            await (await bench.ask())
        assert refused.value.retry_after is not None
        assert bench.dispatcher.not_ready() == ("the service is shutting down",)
        bench.worker.finish(1)
        await settle()
        assert not drained.done()
        bench.worker.finish(2)
        assert all(isinstance(one, Answer) for one in await results(tasks))
        await drained


@on_loop
async def test_a_worker_lost_while_draining_is_replaced_and_its_request_answered() -> None:
    async with Bench() as bench:
        bench.worker.serve("tiny")
        task = await bench.ask()
        drained = asyncio.create_task(bench.dispatcher.drain(60))
        await settle()
        bench.worker.die()
        fresh = await bench.started()
        fresh.serve("tiny")
        fresh.finish(1)
        assert isinstance(await task, Answer)
        await drained


@on_loop
async def test_what_is_not_answered_within_the_grace_is_refused_and_nothing_is_left() -> None:
    async with Bench() as bench:
        bench.worker.serve("tiny")
        running, waiting = [await bench.ask() for _ in range(2)]
        await bench.dispatcher.drain(0)
        for task in (running, waiting):
            with pytest.raises(Draining):
                await task
        assert bench.worker.cancelled == [1]
        bench.worker.finish(1)
        assert bench.worker.ids == [1]


@on_loop
async def test_draining_an_idle_service_returns_at_once() -> None:
    async with Bench() as bench:
        bench.worker.serve("tiny")
        await nothing_left(bench)


# Readiness and the states of models


@on_loop
async def test_why_it_is_not_ready() -> None:
    async with Bench("tiny", "other") as bench:
        told = bench.dispatcher
        ready = asyncio.create_task(told.first_ready())
        assert told.not_ready() == ("no worker serves", "model tiny is loading", "model other is loading")
        bench.worker.serve("tiny")
        assert told.not_ready() == ("no worker serves", "model other is loading")
        await settle()
        assert not ready.done()
        bench.worker.tell(ModelInfo("other", "failed", "no weights"))  # a failed model doesn't count
        assert told.not_ready() == ()
        await ready
        bench.worker.die()
        assert told.not_ready() == ("no worker serves",)
        fresh = await bench.started()
        fresh.serve("tiny")
        assert told.not_ready() == ("no worker serves",)
        fresh.tell(ModelInfo("other", "failed", "no weights"))
        assert told.not_ready() == ()


@on_loop
async def test_it_was_ready_once_whatever_requests_came_since() -> None:
    async with Bench("tiny", "other") as bench:
        waits = asyncio.create_task(bench.dispatcher.first_ready())
        bench.worker.serve("tiny")
        task = await bench.ask()  # answered before the service as a whole is ready
        bench.worker.finish(1)
        await task
        bench.worker.tell(ModelInfo("other", "ready"))
        await asyncio.wait_for(waits, 30)
        await asyncio.wait_for(bench.dispatcher.first_ready(), 30)


@on_loop
async def test_methods_come_with_the_first_worker() -> None:
    async with Bench() as bench:
        with pytest.raises(NoWorker) as unknown:
            bench.dispatcher.methods()
        assert unknown.value.retry_after is not None
        bench.worker.hello()
        assert bench.dispatcher.methods() == (METHOD, SLOW)
        bench.worker.die()
        assert bench.dispatcher.methods() == (METHOD, SLOW)


@on_loop
async def test_an_unknown_model_names_the_nearest() -> None:
    async with Bench("efficientnet_lite0", "resnet50") as bench:
        assert list(bench.dispatcher.models()) == ["efficientnet_lite0", "resnet50"]
        assert bench.dispatcher.model("resnet50").state == "loading"
        with pytest.raises(ModelNotFound, match=r"no model 'resnet5'.*Did you mean 'resnet50'"):
            await (await bench.ask("resnet5"))


@pytest.mark.parametrize(
    ("info", "kind", "message", "again"),
    [
        (ModelInfo("tiny", "loading"), ModelLoading, "first load", True),
        (ModelInfo("tiny", "failed", "no weights"), ModelFailed, "no weights", False),
        (
            ModelInfo("tiny", "failed", "not supported", type="detection"),
            ModelTypeNotSupported,
            "'detection'.*'classification'",
            False,
        ),
    ],
    ids=["loading", "failed", "detection"],
)
@on_loop
async def test_a_model_that_is_not_ready_says_why(
    info: ModelInfo, kind: type[ServiceError], message: str, again: bool
) -> None:
    async with Bench() as bench:
        bench.worker.hello()
        bench.worker.tell(info)
        with pytest.raises(kind, match=message) as refused:
            await (await bench.ask())
        assert type(refused.value) is kind
        assert (refused.value.retry_after is not None) == again
        await nothing_left(bench)


@on_loop
async def test_a_ready_model_without_a_worker() -> None:
    async with Bench() as bench:
        bench.worker.serve("tiny")
        bench.worker.die()
        with pytest.raises(NoWorker) as refused:
            await (await bench.ask())
        assert refused.value.retry_after is not None


@on_loop
async def test_a_model_that_fails_in_one_worker_is_served_by_the_other() -> None:
    async with Bench(devices=2) as bench:
        one, two = bench.workers
        one.serve("tiny")
        two.hello()
        two.tell(ModelInfo("tiny", "failed", "no memory"))
        task = await bench.ask()
        assert (one.ids, two.ids) == ([1], [])
        one.finish(1)
        await task


# What the answer says


@on_loop
async def test_the_error_of_the_worker_is_the_error_of_the_request_and_of_no_other() -> None:
    async with Bench() as bench:
        bench.worker.serve("tiny", capacity=2)
        bad, good = [await bench.ask() for _ in range(2)]
        wrong = InvalidRequest("Picture 0 is wrong.")
        bench.worker.finish(1, wrong)
        bench.worker.finish(2)
        with pytest.raises(InvalidRequest) as raised:
            await bad
        assert raised.value is wrong
        assert isinstance(await good, Answer)
        await nothing_left(bench)


@on_loop
async def test_the_time_in_the_queue_is_told_and_the_other_times_are_kept() -> None:
    async with Bench() as bench:
        bench.worker.serve("tiny")
        begun = time.monotonic()
        first, second = [await bench.ask() for _ in range(2)]
        queued = time.monotonic()
        bench.worker.finish(1)
        handed_over = time.monotonic()
        bench.worker.finish(2, answer(queue=2.0))
        timings = (await second).timings
        assert handed_over - queued <= timings.queue - 2.0 <= time.monotonic() - begun
        assert (timings.decode, timings.compute, timings.render) == (0.5, 0.25, 0.125)
        assert 0 <= (await first).timings.queue < handed_over - begun


@on_loop
async def test_a_retried_request_stays_alone_after_its_client_left() -> None:
    async with Bench() as bench:
        bench.worker.serve("tiny", capacity=2)
        first = await bench.ask()
        bench.worker.die()
        fresh = await bench.started()
        fresh.serve("tiny", capacity=2)
        await settle()
        first.cancel()
        await settle()
        second = await bench.ask()
        assert len(fresh.given) == 1
        fresh.finish(fresh.ids[0])
        await settle()
        assert len(fresh.given) == 2
        fresh.finish(fresh.ids[1])
        await second


@on_loop
async def test_the_door_is_closed_before_a_body_is_read() -> None:
    async with Bench(max_queue=1) as bench:
        bench.worker.serve("tiny")
        bench.dispatcher.check_open("tiny")
        waiting = await bench.ask()
        with pytest.raises(QueueFull, match="holds 1 requests of at most 1"):
            bench.dispatcher.check_open("tiny")
        bench.worker.finish(1)
        await waiting


@on_loop
async def test_a_job_that_waits_for_its_turn_to_decode_takes_no_room() -> None:
    async with Bench() as bench:
        bench.worker.serve("tiny", capacity=1)
        slow = await bench.ask()
        quick = await bench.ask()
        assert bench.worker.ids == [1]
        bench.worker.park(1, True)
        assert bench.worker.ids == [1, 2]
        bench.worker.park(1, False)
        later = await bench.ask()
        bench.worker.finish(2)
        assert bench.worker.ids == [1, 2], "the slow one decodes, and takes the room"
        bench.worker.finish(1)
        assert bench.worker.ids == [1, 2, 3]
        bench.worker.finish(3)
        await asyncio.gather(slow, quick, later)
