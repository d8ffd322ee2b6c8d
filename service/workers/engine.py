"""The worker's pipeline: pictures are decoded, explained on the device, and rendered, several requests at a time."""

from __future__ import annotations

import logging
import threading
import time
from base64 import b64encode
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from service.errors import DeadlineExceeded, FieldError, ServiceError, TooManyPixels
from service.imaging.decode import decode, decode_base64
from service.imaging.geometry import Geometry, fit_picture, place
from service.imaging.maps import degeneracy
from service.imaging.render import Style, render
from service.models.resident import Model
from service.settings import Settings
from service.workers.compute import Explained, RawMap
from service.workers.device import Device
from service.workers.messages import (
    Answer,
    ClassScore,
    Done,
    ExplainRequest,
    Heatmap,
    Job,
    PictureResult,
    Timings,
)
from service.workers.plan import Plan, make_plan

logger = logging.getLogger(__name__)

EDGES = 2


@dataclass(frozen=True)
class Picture:
    """A decoded picture: upright, and as the network sees it, uint8 (H,W,3)."""

    upright: Image.Image
    geometry: Geometry
    fitted: NDArray[np.uint8]


class Engine:
    """Takes jobs for the models of one device. More jobs than slots run at a time, so that decoding, computing and
    rendering overlap."""

    def __init__(self, device: Device, settings: Settings) -> None:
        self.device = device
        self.models: dict[str, Model] = {}
        self.capacity = device.slots + EDGES
        self._settings = settings
        self._executor = ThreadPoolExecutor(self.capacity, "job")
        self._waiting: dict[int, threading.Event] = {}

    def submit(self, job: Job, answer: Callable[[Done], None]) -> None:
        """Run a job on a thread of its own; `answer` is called there with the outcome."""
        self._waiting[job.id] = gone = threading.Event()

        def check() -> None:
            if gone.is_set() or time.monotonic() > job.deadline:
                raise DeadlineExceeded("Nobody waits for this request any more.")

        def run() -> None:
            outcome = _outcome(lambda: self.explain(job.request, check))
            del self._waiting[job.id]
            try:
                answer(Done(job.id, outcome))
            except Exception:
                logger.exception("an answer could not be sent")
                answer(Done(job.id, ServiceError("A defect of the service; its log has the traceback.")))

        self._executor.submit(run)

    def cancel(self, job_id: int) -> None:
        """Stop a job at its next step, if it still runs."""
        if gone := self._waiting.get(job_id):
            gone.set()

    def close(self) -> None:
        """Finish the jobs that run, and leave no thread."""
        self._executor.shutdown(cancel_futures=True)
        self.device.close()

    def explain(self, request: ExplainRequest, check: Callable[[], None] = lambda: None) -> Answer:
        """Answer one request. `check` is called between the steps and raises where nobody waits any more.

        Raises the ServiceError that the contract names for what went wrong.
        """
        model = self.models[request.model_id]
        started = time.perf_counter()
        check()
        plan = make_plan(request, model)
        pictures = self._decode_all(model, request, check)
        self._check_heatmaps(model, plan, request, pictures)
        decoded = time.perf_counter()
        fitted = np.stack([picture.fitted for picture in pictures])
        explained, waited = self.device.run(model, plan, fitted, check, self._settings.max_batch)
        computed = time.perf_counter()
        results = tuple(
            _result(index, picture, model, one, request, check)
            for index, (picture, one) in enumerate(zip(pictures, explained, strict=True))
        )
        rendered = time.perf_counter()
        timings = Timings(waited, decoded - started, computed - decoded - waited, rendered - computed)
        return Answer(model.id, model.revision, results, timings)

    def _check_heatmaps(self, model: Model, plan: Plan, request: ExplainRequest, pictures: list[Picture]) -> None:
        least = model.fit.size[0] * model.fit.size[1]
        pixels = 0
        for picture, classes in zip(pictures, plan.classes, strict=True):
            shown = least if request.size == "model" else max(least, picture.upright.width * picture.upright.height)
            pixels += shown * len(plan.tasks) * max(1, len(classes))
        limit = self._settings.max_heatmap_pixels
        if pixels > limit:
            detail = f"The heatmaps asked for have {pixels} pixels; one request may ask for {limit}."
            raise TooManyPixels(f"{detail} Ask for fewer classes, or for the size 'model'.")

    def _decode_all(self, model: Model, request: ExplainRequest, check: Callable[[], None]) -> list[Picture]:
        pictures: list[Picture] = []
        pixels, limit = 0, self._settings.max_request_pixels
        for index, data in enumerate(request.pictures):
            check()
            pictures.append(self._decode(model, index, data))
            pixels += pictures[-1].upright.width * pictures[-1].upright.height
            if pixels > limit:
                raise TooManyPixels(f"The first {index + 1} pictures have {pixels} pixels; a request may have {limit}.")
        return pictures

    def _decode(self, model: Model, index: int, data: bytes | str) -> Picture:
        try:
            upright = decode(decode_base64(data) if isinstance(data, str) else data, self._settings.max_pixels)
        except ServiceError as error:
            detail = f"Picture {index}: {error.detail}"
            raise type(error)(detail, errors=(FieldError(f"/images/{index}", detail),)) from None
        return Picture(upright, place(upright.width, upright.height, model.fit), fit_picture(upright, model.fit))


def _outcome(explain: Callable[[], Answer]) -> Answer | ServiceError:
    try:
        return explain()
    except ServiceError as error:
        return error
    except Exception:
        logger.exception("a request failed for a reason that is ours")
        return ServiceError("A defect of the service; its log has the traceback.")


def _result(
    index: int,
    picture: Picture,
    model: Model,
    explained: Explained,
    request: ExplainRequest,
    check: Callable[[], None],
) -> PictureResult:
    confidences = explained.confidences
    order = np.argsort(-confidences, kind="stable")[: request.top_k or None].tolist()
    classes = tuple(ClassScore(best, model.labels[best], float(confidences[best])) for best in order)
    heatmaps = []
    under = picture.fitted if request.size == "model" or not explained.maps else np.asarray(picture.upright)
    for raw in explained.maps:
        check()
        heatmaps.append(_heatmap(raw, picture.geometry, under, model, float(confidences[raw.class_id]), request))
    return PictureResult(index, picture.upright.width, picture.upright.height, classes, tuple(heatmaps))


def _heatmap(
    raw: RawMap,
    geometry: Geometry,
    under: NDArray[np.uint8],
    model: Model,
    confidence: float,
    request: ExplainRequest,
) -> Heatmap:
    scaling = getattr(raw.task.params, "scaling", None)
    style = Style(request.format, request.encoding, request.size, request.colormap, request.alpha)
    rendered = render(raw.values, geometry, under, scaling, style)
    return Heatmap(
        method=raw.task.method.name,
        channels=raw.task.method.channels,
        class_id=raw.class_id,
        class_name=model.labels[raw.class_id],
        confidence=confidence,
        gen_params=raw.task.effective,
        precision=model.spec.serving.precision,
        value_range=(float(raw.values.min()), float(raw.values.max())),
        degenerate=degeneracy(raw.values),
        format=request.format,
        media_type=rendered.media_type,
        width=rendered.width,
        height=rendered.height,
        data=b64encode(rendered.data) if request.as_base64 else rendered.data,
    )
