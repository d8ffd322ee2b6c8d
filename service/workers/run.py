"""A job on its way through the worker: one part of its pictures is decoded while another computes or is rendered."""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

from service.errors import ServiceError, TooManyPixels
from service.imaging.decode import Opened
from service.models.resident import Model
from service.settings import Settings
from service.workers.compute import Explained
from service.workers.device import Computed, Device, Item, Order, abandoned, bare
from service.workers.edges import Picture, decode_picture, look_at, render_picture, render_seconds
from service.workers.messages import Answer, Job, Parked, PictureResult
from service.workers.plan import Plan, make_plan
from service.workers.priced import DEAR_S, PricedExecutor
from service.workers.stages import Span, Stages

logger = logging.getLogger(__name__)

DEFECT = "A defect of the service; its log has the traceback."


class Life:
    """Whether anybody still waits for a job."""

    def __init__(self, deadline: float) -> None:
        self.over = False
        self._deadline = deadline

    def gone(self) -> bool:
        return self.over or time.monotonic() > self._deadline

    def check(self) -> None:
        """Raise DeadlineExceeded where nobody waits."""
        if self.gone():
            raise abandoned()


class Run:
    """A job that runs. Its pictures go through the stages in parts as large as a batch.

    It ends once, when nothing of it is left in any stage, whether it was answered, failed or cancelled.
    """

    def __init__(
        self,
        job: Job,
        model: Model,
        device: Device,
        edges: PricedExecutor,
        settings: Settings,
        end: Callable[[Answer | ServiceError, float], None],
        park: Callable[[Parked], None],
    ) -> None:
        """`edges` decodes and renders. `end` is called with the outcome and the seconds that the device worked for it,
        on a thread of the edges or the device."""
        self._request = job.request
        self._model = model
        self._order: Order | None = None
        self._device = device
        self._edges = edges
        self._settings = settings
        self._end = end
        self._park = park
        self._id = job.id
        self._parked = False
        self._life = Life(job.deadline)
        self._lock = threading.Lock()
        self._steps = 0  # that wait or run
        self._failure: ServiceError | None = None
        self._pictures: dict[int, Picture] = {}  # decoded, and not yet rendered
        self._undecoded = 0  # pictures of the part that is being decoded
        self._pixels = self._heatmap_pixels = 0
        self._results: dict[int, PictureResult] = {}
        self._stages = Stages()
        self._began = time.perf_counter()

    def start(self) -> None:
        self._later(0, self._stages.decode, self._plan)

    def cancel(self) -> None:
        """Nobody waits any more: every step that has not begun is left out."""
        self._life.over = True

    def _later(self, seconds: float, spans: list[Span], step: Callable[..., None], *args: object) -> None:
        """Have a step, which takes about so many seconds, done by a thread of the edges. It counts for the stage with
        these spans."""
        self._enter(1)
        self._edges.submit(seconds, functools.partial(self._do, spans, step, *args))

    def _do(self, spans: list[Span], step: Callable[..., None], *args: object) -> None:
        started = time.perf_counter()
        try:
            self._life.check()
            with self._device.progress.working():
                step(*args)
        except ServiceError as error:
            self._fail(error)
        except Exception:
            logger.exception("a request failed for a reason that is ours")
            self._fail(ServiceError(DEFECT))
        spans.append((started, time.perf_counter()))
        self._leave()

    def _plan(self) -> None:
        plan = make_plan(self._request, self._model)
        self._order = Order(self._model, plan.tasks, self._life.gone, batch=self._request.priority == "batch")
        self._decode_part(plan, 0)

    def _decode_part(self, plan: Plan, start: int) -> None:
        part = range(len(self._request.pictures))[start : start + self._device.max_batch]
        self._undecoded = len(part)
        opened = {index: look_at(index, self._request, self._settings) for index in part}
        seconds = max((one.seconds for one in opened.values()), default=0.0)
        if seconds > DEAR_S:  # they will wait: some formats reserve memory for their pixels when they are opened
            opened.clear()
        self._set_parked(seconds > DEAR_S and not self._pictures)
        for index in part:  # all in the turn of the slowest, or the others would wait decoded for it
            self._later(seconds, self._stages.decode, self._decode, plan, part, index, opened.get(index))

    def _set_parked(self, parked: bool) -> None:
        with self._lock:
            changed, self._parked = parked != self._parked, parked
        if changed:
            self._park(Parked(self._id, parked))

    def _decode(self, plan: Plan, part: range, index: int, opened: Opened | None) -> None:
        self._set_parked(False)
        opened = opened or look_at(index, self._request, self._settings)
        picture = decode_picture(index, opened, self._model, self._request)
        with self._lock:
            self._count_pixels(picture, len(plan.tasks) * max(1, len(plan.classes[index])))
            self._pictures[index] = picture
            self._undecoded -= 1
            complete = not self._undecoded
        if complete:
            self._compute(plan, part)
            self._decode_part(plan, part.stop)

    def _count_pixels(self, picture: Picture, heatmaps: int) -> None:
        size = picture.width * picture.height
        least = self._model.fit.size[0] * self._model.fit.size[1]
        self._pixels += size
        self._heatmap_pixels += heatmaps * (least if self._request.size == "model" else max(least, size))
        if self._pixels > (limit := self._settings.max_request_pixels):
            raise TooManyPixels(f"The pictures have at least {self._pixels} pixels; a request may have {limit}.")
        if self._heatmap_pixels > (limit := self._settings.max_heatmap_pixels):
            raise TooManyPixels(
                f"The heatmaps asked for have at least {self._heatmap_pixels} pixels; one request may ask for {limit}. "
                "Ask for fewer classes, or for the size 'model'."
            )

    def _compute(self, plan: Plan, part: range) -> None:
        assert self._order is not None
        items = []
        for index in part:
            item = Item(self._order, self._pictures[index].fitted, plan.classes[index])
            item.result.add_done_callback(functools.partial(self._computed, index))
            items.append(item)
        self._enter(len(items))
        self._device.put(items)

    def _computed(self, index: int, result: Future[Computed]) -> None:
        error = result.exception()
        if error is None:
            computed = result.result()
            self._stages.compute.append((computed.started, computed.ended))
            seconds = render_seconds(self._pictures[index], len(computed.explained.maps), self._request)
            self._later(seconds, self._stages.render, self._render, index, computed.explained)
        else:  # what is no ServiceError has been logged
            self._fail(error if isinstance(error, ServiceError) else ServiceError(DEFECT))
        self._leave()

    def _render(self, index: int, explained: Explained) -> None:
        picture = self._pictures.pop(index)

        def check() -> None:
            self._life.check()
            self._device.progress.step()

        self._results[index] = render_picture(index, picture, self._model, explained, self._request, check)

    def _fail(self, error: ServiceError) -> None:
        """The first error is the outcome; the steps that are left are not worth doing."""
        with self._lock:
            self._failure = self._failure or bare(error)
        self._life.over = True

    def _enter(self, steps: int) -> None:
        with self._lock:
            self._steps += steps

    def _leave(self) -> None:
        with self._lock:
            self._steps -= 1
            over = not self._steps
        if over:
            self._end(self._failure or self._answer(), self._order.spent if self._order else 0.0)

    def _answer(self) -> Answer:
        results = tuple(self._results[index] for index in sorted(self._results))
        timings = self._stages.timings(time.perf_counter() - self._began)
        return Answer(self._model.id, self._model.revision, results, timings)
