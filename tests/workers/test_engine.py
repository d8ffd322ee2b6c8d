"""The worker's pipeline in this process over a tiny network: what ends early, what fails, and what comes after it."""

from __future__ import annotations

import dataclasses
import functools
import gc
import io
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any, ParamSpec, TypeVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from service.errors import (
    DeadlineExceeded,
    InvalidRequest,
    ModelUnloaded,
    OutOfDeviceMemory,
    ServiceError,
    TooManyPixels,
    UndecodablePicture,
    UnknownClass,
    UnknownMethod,
)
from service.explain.mathematics import grad_cam
from service.explain.method import REGISTRY, CamParams, GenParams, Method, register
from service.explain.trace import Trace
from service.models.repository import Entry
from service.settings import Settings
from service.workers import edges
from service.workers.device import Device
from service.workers.edges import Picture
from service.workers.engine import Engine
from service.workers.loading import load_into
from service.workers.messages import Answer, Done, ExplainRequest, Job
from service.workers.run import Run
from tests.conftest import write_tiny
from tests.server import OPTIONS_OFF

FAR = float("inf")

P = ParamSpec("P")
T = TypeVar("T")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_tiny(folder)
    one = Engine(Device("cpu", None, 4), Settings())
    info = load_into(one, Entry("tiny", folder))
    assert info.state == "ready", info.reason
    yield one
    one.close()


class Outcomes:
    """Jobs of an engine, and what came of them."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._queue: SimpleQueue[Done] = SimpleQueue()

    def submit(self, request: ExplainRequest, job_id: int = 1, deadline: float = FAR) -> None:
        self._engine.submit(Job(job_id, request, deadline), self._queue.put)

    def next(self) -> Done:
        return self._queue.get(timeout=60)

    def of(self, request: ExplainRequest, deadline: float = FAR) -> Answer | ServiceError:
        self.submit(request, deadline=deadline)
        return self.next().outcome


@pytest.fixture
def outcomes(engine: Engine) -> Outcomes:
    return Outcomes(engine)


class Probe(Method):
    """Grad-CAM that first does what a test wants. Registered only while one asks for it."""

    name = "probe"
    family = "cam"
    channels = 1
    paper = "none"
    description = "none"
    cost = "none"
    Params = CamParams

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.before: Callable[[int], None] = lambda pictures: None

    def heatmap(self, trace: Trace, params: GenParams) -> Tensor:
        self.batches.append(len(trace.images))
        self.before(len(trace.images))
        return grad_cam(trace)


@pytest.fixture
def probe() -> Iterator[Probe]:
    register(Probe)
    method = REGISTRY["probe"]
    assert isinstance(method, Probe)
    yield method
    del REGISTRY["probe"]


def pictures(count: int, corrupt: int | None = None) -> tuple[bytes, ...]:
    """Different pictures; one of them cut short."""
    from PIL import Image

    files = []
    for index in range(count):
        pixels = np.random.default_rng(index).integers(0, 256, (40, 48, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        files.append(file.getvalue()[: 400 if index == corrupt else None])
    return tuple(files)


def asked(count: int = 1, *class_ids: int, method: str = "probe", corrupt: int | None = None) -> ExplainRequest:
    return ExplainRequest(
        "tiny",
        pictures(count, corrupt),
        (class_ids,) * count,
        (method,),
        gen_params={"scaling": "none"},
        format="npy",
        size="model",
        as_base64=False,
    )


def maps(outcome: Answer | ServiceError) -> NDArray[np.float32]:
    """The floats of every heatmap of an answer, in its order."""
    assert isinstance(outcome, Answer), outcome
    data = [heatmap.data for result in outcome.results for heatmap in result.heatmaps]
    return np.stack([np.load(io.BytesIO(one)) for one in data])


def error(outcome: Answer | ServiceError, kind: type[ServiceError]) -> ServiceError:
    assert type(outcome) is kind, outcome
    return outcome


# What ends early


def test_a_cancelled_job_stops_at_its_next_step(engine: Engine, outcomes: Outcomes, probe: Probe) -> None:
    entered, go = threading.Event(), threading.Event()

    def wait(pictures: int) -> None:
        entered.set()
        assert go.wait(60)

    probe.before = wait
    outcomes.submit(asked(1, 0, 1, 2, 3), job_id=5)
    assert entered.wait(60)
    engine.cancel(5)
    engine.cancel(99)  # one that it has not
    go.set()
    done = outcomes.next()
    assert done.id == 5
    error(done.outcome, DeadlineExceeded)
    assert probe.batches == [1], "three more classes were asked for"
    engine.cancel(5)  # one that is over
    probe.before = lambda pictures: None
    assert maps(outcomes.of(asked(1, 0))).shape == (1, 32, 32)


@pytest.mark.parametrize("stage", ["decode_picture", "render_picture"])
def test_a_job_that_is_cancelled_at_the_edges_ends_as_well(
    engine: Engine, outcomes: Outcomes, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    real = getattr(edges, stage)

    def leave(*args: Any) -> object:
        engine.cancel(1)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(f"service.workers.run.{stage}", leave)
        error(outcomes.of(asked(6, 0, method="grad_cam")), DeadlineExceeded)
    assert maps(outcomes.of(asked(6, 0, method="grad_cam"))).shape[0] == 6


def test_a_cancelled_job_starts_no_further_batch(engine: Engine, outcomes: Outcomes, probe: Probe) -> None:
    probe.before = lambda pictures: engine.cancel(1)
    error(outcomes.of(asked(12, 0)), DeadlineExceeded)
    assert probe.batches == [4]


def test_a_job_that_is_cancelled_before_it_starts_computes_nothing(
    engine: Engine, outcomes: Outcomes, probe: Probe
) -> None:
    entered, go = threading.Event(), threading.Event()

    def wait(pictures: int) -> None:
        entered.set()
        assert go.wait(60)

    probe.before = wait
    outcomes.submit(asked(1, 0), job_id=76)
    assert entered.wait(60)
    outcomes.submit(asked(6, 1), job_id=77)
    outcomes.submit(asked(2, 2), job_id=78)
    engine.cancel(77)
    go.set()
    done = {done.id: done.outcome for done in (outcomes.next() for _ in range(3))}
    error(done[77], DeadlineExceeded)
    assert maps(done[76]).shape[0] == 1
    assert maps(done[78]).shape[0] == 2
    assert probe.batches == [1, 2]


def test_a_deadline_that_has_passed_costs_no_work(
    outcomes: Outcomes, probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.workers.edges.decode_picture", pytest.fail)
    error(outcomes.of(asked(), deadline=time.monotonic() - 1), DeadlineExceeded)
    assert probe.batches == []


def test_a_deadline_that_passes_between_two_steps_ends_the_job(
    outcomes: Outcomes, probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("service.workers.run.time.monotonic", lambda: now[0])

    def age(pictures: int) -> None:
        now[0] = 200.0

    probe.before = age
    error(outcomes.of(asked(1, 0, 1), deadline=150), DeadlineExceeded)
    assert probe.batches == [1]


# Too little memory


def out_of_memory_over(most: int) -> Callable[[int], None]:
    def check(pictures: int) -> None:
        if pictures > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    return check


@pytest.mark.parametrize("most", [1, 2, 3])
def test_a_batch_too_large_for_the_device_is_split(outcomes: Outcomes, probe: Probe, most: int) -> None:
    expected = maps(outcomes.of(asked(4, 0, 2)))
    assert probe.batches == [4, 4]
    probe.batches.clear()
    probe.before = out_of_memory_over(most)
    split = maps(outcomes.of(asked(4, 0, 2)))
    assert max(batch for batch in probe.batches[1:] if batch <= most) <= most
    assert np.abs(expected).max(axis=(1, 2)).min() > 0
    assert np.abs(split - expected).max() <= 1e-4 * np.abs(expected).max()


def test_too_little_memory_for_one_picture_fails_that_request_alone(outcomes: Outcomes, probe: Probe) -> None:
    probe.before = out_of_memory_over(0)
    failed = error(outcomes.of(asked(4, 0)), OutOfDeviceMemory)
    assert "CUDA" not in failed.detail
    assert probe.batches == [4, 2, 1]
    probe.before = lambda pictures: None
    assert maps(outcomes.of(asked(4, 0))).shape == (4, 32, 32)


def test_tensors_of_the_failed_try_are_gone_when_its_halves_are_tried(
    outcomes: Outcomes, probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A traceback that is still held would pin what filled the memory."""
    held: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def heatmap(trace: Trace, params: GenParams) -> Tensor:
        alive.append(sum(reference() is not None for reference in held))
        local = trace.activation.clone()
        held.append(weakref.ref(local))
        if len(trace.images) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return grad_cam(trace)

    monkeypatch.setattr(probe, "heatmap", heatmap)
    assert maps(outcomes.of(asked(2, 0))).shape == (2, 32, 32)
    assert alive == [0, 0, 0]


# What is wrong with a request, and what with us


def test_a_defect_of_ours_is_a_plain_error_that_leaks_nothing(
    outcomes: Outcomes, probe: Probe, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(pictures: int) -> None:
        raise RuntimeError("/home/secret/weights.pt")

    probe.before = fail
    failed = error(outcomes.of(asked()), ServiceError)
    assert (failed.status, failed.code, failed.retry_after) == (500, "internal_error", None)
    assert not {"secret", "RuntimeError", "Traceback"} & set(failed.detail.replace("/", " ").split())
    assert failed.__cause__ is None
    assert failed.__context__ is None
    assert "/home/secret/weights.pt" in caplog.text
    probe.before = lambda pictures: None
    assert maps(outcomes.of(asked(1, 0))).shape == (1, 32, 32)


@pytest.mark.parametrize("corrupt", [0, 2])
def test_a_bad_picture_is_named_by_its_index_and_costs_no_other_request(outcomes: Outcomes, corrupt: int) -> None:
    outcomes.submit(asked(3, 0, method="grad_cam", corrupt=corrupt), job_id=1)
    outcomes.submit(asked(3, 0, method="grad_cam"), job_id=2)
    done = {done.id: done.outcome for done in (outcomes.next(), outcomes.next())}
    failed = error(done[1], UndecodablePicture)
    assert failed.detail.startswith(f"Picture {corrupt}: ")
    assert [place.pointer for place in failed.errors] == [f"/images/{corrupt}"]
    assert maps(done[2]).shape == (3, 32, 32)


def test_base64_that_is_none_is_named_by_its_index(outcomes: Outcomes) -> None:
    request = dataclasses.replace(asked(2, method="grad_cam"), pictures=(pictures(1)[0], "not base64!"))
    assert error(outcomes.of(request), UndecodablePicture).detail.startswith("Picture 1: ")


@pytest.mark.parametrize(
    ("request_", "kind"),
    [
        (asked(method="grad_cm"), UnknownMethod),
        (asked(1, 5, method="grad_cam"), UnknownClass),
        (dataclasses.replace(asked(method="grad_cam"), colormap="nonsense", format="overlay"), InvalidRequest),
    ],
    ids=["method", "class", "colormap"],
)
def test_a_wrong_value_is_the_request_s_fault(
    outcomes: Outcomes, request_: ExplainRequest, kind: type[ServiceError]
) -> None:
    assert error(outcomes.of(request_), kind).detail


# The answer


def test_an_answer_says_what_was_computed_and_how_long_it_took(outcomes: Outcomes) -> None:
    outcome = outcomes.of(dataclasses.replace(asked(2, 3, method="grad_cam"), top_k=2))
    assert isinstance(outcome, Answer)
    assert outcome.model_id == "tiny"
    assert outcome.revision.startswith("sha256:")
    assert [result.index for result in outcome.results] == [0, 1]
    for result in outcome.results:
        assert (result.width, result.height) == (48, 40)
        first, second = result.classes
        assert 1 >= first.confidence >= second.confidence > 0
        assert first.class_name == ("ant", "bee", "cat", "dog", "cat")[first.class_id]
        (heatmap,) = result.heatmaps
        assert (heatmap.class_id, heatmap.class_name, heatmap.method) == (3, "dog", "grad_cam")
        assert heatmap.gen_params == {
            "target_conv_layer": ["2"],
            "use_conv_only": True,
            "scaling": "none",
            **OPTIONS_OFF,
        }
        values = np.load(io.BytesIO(heatmap.data))
        low, high = heatmap.value_range
        assert values.min() >= low
        assert values.max() <= high
    times = outcome.timings
    assert times.queue >= 0
    assert min(times.decode, times.compute, times.render) > 0


def test_no_target_class_is_the_most_confident_one_and_no_method_is_no_heatmap(outcomes: Outcomes) -> None:
    outcome = outcomes.of(asked(3, method="grad_cam"))
    assert isinstance(outcome, Answer)
    for result in outcome.results:
        assert result.heatmaps[0].class_id == result.classes[0].class_id
        assert result.heatmaps[0].confidence == result.classes[0].confidence
        assert sum(one.confidence for one in result.classes) == pytest.approx(1, abs=1e-5)
    alone = outcomes.of(dataclasses.replace(asked(3), methods=(), gen_params={}))
    assert isinstance(alone, Answer)
    assert [result.heatmaps for result in alone.results] == [()] * 3
    assert [result.classes[0].class_id for result in alone.results] == [
        result.classes[0].class_id for result in outcome.results
    ]


def test_closing_leaves_no_thread_and_finishes_what_runs(engine: Engine) -> None:
    before = set(threading.enumerate())
    closed = Engine(Device("cpu", 2, 4), Settings())
    closed.models = engine.models
    seen: SimpleQueue[Done] = SimpleQueue()
    for job_id in range(4):
        closed.submit(Job(job_id, asked(6, method="grad_cam"), FAR), seen.put)
    closed.submit(Job(4, dataclasses.replace(asked(), model_id="none"), FAR), seen.put)
    closed.close()
    done = {done.id: done.outcome for done in (seen.get_nowait() for _ in range(5))}
    error(done.pop(4), ModelUnloaded)
    assert [maps(outcome).shape[0] for outcome in done.values()] == [6, 6, 6, 6]
    assert set(threading.enumerate()) <= before


def with_settings(engine: Engine, **values: int) -> Engine:
    limited = Engine(engine.device, Settings.model_validate(values))
    limited.models = engine.models
    return limited


def test_the_pictures_of_one_request_are_bounded_together(engine: Engine) -> None:
    limited = with_settings(engine, max_request_pixels=2 * 40 * 48)
    assert len(limited.explain(asked(2, method="grad_cam")).results) == 2
    with pytest.raises(TooManyPixels, match="have at least 5760 pixels; a request may have 3840"):
        limited.explain(asked(3, method="grad_cam"))


def test_the_heatmaps_of_one_request_are_bounded_together(engine: Engine) -> None:
    limited = with_settings(engine, max_heatmap_pixels=2 * 32 * 32)
    assert len(limited.explain(asked(1, 0, 1, method="grad_cam")).results[0].heatmaps) == 2
    with pytest.raises(TooManyPixels, match="have at least 3072 pixels; one request may ask for 2048"):
        limited.explain(asked(1, 0, 1, 2, method="grad_cam"))
    with pytest.raises(TooManyPixels, match="have at least 4096 pixels; one request may ask for 2048"):
        limited.explain(asked(6, 0, 1, method="grad_cam"))


# Stages and threads


def counted(real: Callable[P, T], calls: threading.Semaphore) -> Callable[P, T]:
    """The same, which releases `calls` after each call."""

    @functools.wraps(real)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        result = real(*args, **kwargs)
        calls.release()
        return result

    return call


def test_one_part_of_a_request_is_decoded_while_another_computes_and_the_last_is_rendered(
    outcomes: Outcomes, probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, go = threading.Event(), threading.Event()
    decoded, rendered = threading.Semaphore(0), threading.Semaphore(0)

    def second_waits(pictures: int) -> None:
        if len(probe.batches) == 2:
            entered.set()
            assert go.wait(60)

    monkeypatch.setattr("service.workers.run.decode_picture", counted(edges.decode_picture, decoded))
    monkeypatch.setattr("service.workers.run.render_picture", counted(edges.render_picture, rendered))
    probe.before = second_waits
    outcomes.submit(asked(12, 0))
    assert entered.wait(60)
    assert all(decoded.acquire(timeout=60) for _ in range(12))
    assert all(rendered.acquire(timeout=60) for _ in range(4))
    assert not rendered.acquire(blocking=False)
    go.set()
    assert maps(outcomes.next().outcome).shape[0] == 12
    assert probe.batches == [4, 4, 4]


def test_requests_that_wait_together_share_a_batch_and_get_what_they_get_alone(
    engine: Engine, outcomes: Outcomes, probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = [maps(outcomes.of(asked(1, number))) for number in range(4)]
    entered, go = threading.Event(), threading.Event()

    def wait(pictures: int) -> None:
        entered.set()
        assert go.wait(60)

    probe.before = wait
    outcomes.submit(asked(1, 0), job_id=9)
    assert entered.wait(60)
    waits = threading.Semaphore(0)
    monkeypatch.setattr(Device, "put", counted(Device.put, waits))
    for number in range(4):
        outcomes.submit(asked(1, number), job_id=number)
    assert all(waits.acquire(timeout=60) for _ in range(4))
    go.set()
    done = {done.id: done.outcome for done in (outcomes.next() for _ in range(5))}
    assert probe.batches[4:] == [1, 4]
    for number, expected in enumerate(alone):
        assert np.abs(maps(done[number]) - expected).max() <= 1e-5 * np.abs(expected).max()


def test_threads_at_once_get_bitwise_what_they_get_alone_in_batches_of_one(engine: Engine) -> None:
    single = Engine(Device("cpu", 2, 1), Settings())
    single.models = engine.models
    requests = [asked(3, number % 5, number // 2, method="grad_cam") for number in range(8)]
    try:
        alone = [single.explain(one).results for one in requests]
        with ThreadPoolExecutor(8) as clients:
            together = [answer.results for answer in clients.map(single.explain, requests)]
    finally:
        single.close()
    assert together == alone


@pytest.mark.parametrize("corrupt", [None, 5])
def test_nothing_of_a_finished_job_is_kept(
    outcomes: Outcomes, monkeypatch: pytest.MonkeyPatch, corrupt: int | None
) -> None:
    kept: list[weakref.ref[Run] | weakref.ref[Picture]] = []
    real, start = edges.decode_picture, Run.start

    def decode(*args: Any) -> Picture:
        picture = real(*args)
        kept.append(weakref.ref(picture))
        return picture

    def started(one: Run) -> None:
        kept.append(weakref.ref(one))
        start(one)

    monkeypatch.setattr("service.workers.run.decode_picture", decode)
    monkeypatch.setattr(Run, "start", started)
    gc.disable()
    try:
        outcome = outcomes.of(asked(6, 0, method="grad_cam", corrupt=corrupt))
        assert isinstance(outcome, Answer) == (corrupt is None)
        outcomes.of(asked(1, 0, method="grad_cam"))
        assert len(kept) >= 1 + 4
        deadline = time.monotonic() + 60  # of a thread that has answered the first, and has still to leave its work
        while (left := [one() for one in kept[:-2] if one()]) and time.monotonic() < deadline:
            del left
            time.sleep(0.01)
        assert not left
    finally:
        gc.enable()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_under_eight_threads_gives_what_the_cpu_gives(engine: Engine, tmp_path: Path) -> None:
    write_tiny(tmp_path / "tiny")
    on_gpu = Engine(Device("cuda:0", 2, 4), Settings())
    requests = [asked(6, number % 5, method="grad_cam") for number in range(8)]
    try:
        info = load_into(on_gpu, Entry("tiny", tmp_path / "tiny"))
        assert info.state == "ready", info.reason
        with ThreadPoolExecutor(8) as clients:
            for request, outcome in zip(requests, clients.map(on_gpu.explain, requests), strict=True):
                expected = maps(engine.explain(request))
                assert np.abs(maps(outcome) - expected).max() <= 1e-3 * np.abs(expected).max()
    finally:
        on_gpu.close()
