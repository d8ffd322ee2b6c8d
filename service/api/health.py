"""What an orchestrator asks: does the process live, and can it take work. Neither waits on a device."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from service.api import openapi
from service.api.responses import Alive, NotReady, Ready
from service.dispatch.dispatcher import Dispatcher

READY_RETRY_S = 5
PROBLEMS = openapi.problems()
OPEN: dict[str, Any] = {"security": []}


def create_router(dispatcher: Dispatcher) -> APIRouter:
    """`GET /livez` and `GET /readyz`."""
    router = APIRouter(tags=["health"])

    @router.get(
        "/livez", summary="Does the process live?", operation_id="getLiveness", responses=PROBLEMS, openapi_extra=OPEN
    )
    async def get_liveness() -> Alive:
        """Answers as long as the event loop turns."""
        return Alive(status="alive")

    @router.get(
        "/readyz",
        summary="Can requests be served?",
        operation_id="getReadiness",
        response_model=Ready,
        responses={**PROBLEMS, 503: {"model": NotReady, "description": "Not now; the reasons are named."}},
        openapi_extra=OPEN,
    )
    async def get_readiness() -> Response:
        """Ready: a worker serves and no model is in its first load. Failed models don't count, but are listed."""
        failed = {info.id: info.reason for info in dispatcher.models().values() if info.state == "failed"}
        if reasons := dispatcher.not_ready():
            answer = NotReady(status="not_ready", reasons=list(reasons), failed_models=failed)
            return JSONResponse(answer.model_dump(), 503, {"Retry-After": str(READY_RETRY_S)})
        return JSONResponse(Ready(status="ready", failed_models=failed).model_dump())

    return router
