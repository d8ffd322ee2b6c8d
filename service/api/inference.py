"""The endpoints that run a network: heatmaps, and class confidences alone."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated

from fastapi import APIRouter, Path, Request, Response

from service.api import openapi, raised
from service.api.answers import json_answer, single_answer
from service.api.body import Arrivals
from service.api.disconnect import unless_gone
from service.api.encodings import read_payload
from service.api.metrics import Metrics
from service.api.negotiation import JSON, choose, choose_json
from service.api.requests import count_heatmaps, heatmap_request, infer_request, targets_of
from service.api.responses import HeatmapAnswer, InferAnswer
from service.api.schemas import HeatmapFields, InferFields
from service.api.unread import Unread
from service.dispatch.dispatcher import Dispatcher, deadline_exceeded
from service.errors import DeadlineExceeded, DeadlineTooShort
from service.settings import Settings
from service.workers.messages import Answer, ExplainRequest

ModelId = Annotated[str, Path(alias="id", description="A model's id, from `GET /models`.")]


def create_router(dispatcher: Dispatcher, settings: Settings, metrics: Metrics, unread: Unread) -> APIRouter:
    """`POST /models/{id}/heatmap` and `POST /models/{id}/infer`."""
    router = APIRouter(tags=["inference"])
    arrivals = Arrivals(settings.max_queue_bytes)

    async def explain(request: Request, work: ExplainRequest, size_bytes: int, timeout_s: float | None) -> Answer:
        request.state.methods, request.state.pictures = work.methods, len(work.pictures)
        deadline = timeout_s or settings.timeout_s
        left = deadline - (time.perf_counter() - request.state.started)
        if left <= 0:
            raise deadline_exceeded(deadline)
        unread.check()
        try:
            answer = await unless_gone(request.receive, dispatcher.explain(work, size_bytes, left))
        except DeadlineTooShort:
            raise
        except DeadlineExceeded:
            raise deadline_exceeded(deadline) from None  # in the client's number, not in what was left of it
        request.state.timings, request.state.incomplete = answer.timings, answer.incomplete
        metrics.answered(answer.model_id, answer.timings)
        unread.check()  # others may have been computed meanwhile
        return answer

    @router.post(
        "/models/{id}/heatmap",
        summary="Explain pictures by heatmaps",
        operation_id="createHeatmaps",
        response_model=HeatmapAnswer,
        responses={200: openapi.single_heatmap(), **openapi.problems(*raised.HEATMAP, *raised.DOOR)},
        openapi_extra=openapi.request_body(HeatmapFields),
    )
    async def create_heatmaps(model_id: ModelId, request: Request) -> Response:
        """Class confidences and, per picture, method and target class, one heatmap of what the class was seen in."""
        dispatcher.check_open(model_id)
        payload = await read_payload(request, HeatmapFields, settings, arrivals)
        targets = targets_of(payload)
        choice = choose(_accept(request), payload.fields, count_heatmaps(payload.fields, targets))
        work = heatmap_request(model_id, payload, targets, choice)
        answer = await explain(request, work, payload.size_bytes, payload.fields.timeout_s)
        if choice.media_type != JSON:
            return single_answer(answer)
        return await _json(answer, payload.fields, request)

    @router.post(
        "/models/{id}/infer",
        summary="Classify pictures",
        operation_id="inferClasses",
        response_model=InferAnswer,
        responses=openapi.problems(*raised.INFER, *raised.DOOR),
        openapi_extra=openapi.request_body(InferFields),
    )
    async def infer_classes(model_id: ModelId, request: Request) -> Response:
        """Class confidences of each picture, without heatmaps."""
        dispatcher.check_open(model_id)
        choose_json(_accept(request))
        payload = await read_payload(request, InferFields, settings, arrivals)
        work = infer_request(model_id, payload)
        answer = await explain(request, work, payload.size_bytes, payload.fields.timeout_s)
        return await _json(answer, payload.fields, request)

    return router


async def _json(answer: Answer, fields: InferFields, request: Request) -> Response:
    """The answer as JSON, written in a thread: all classes of many pictures take longer than the event loop may."""
    return await asyncio.to_thread(json_answer, answer, fields.result_format, request.state.request_id)


def _accept(request: Request) -> str:
    return ", ".join(request.headers.getlist("accept"))
