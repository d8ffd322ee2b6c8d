"""What an operator does to models while the service runs."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path

from service.api import openapi, raised
from service.api.responses import Model
from service.dispatch.dispatcher import Dispatcher
from service.errors import ModelFailed, ModelNotFound

ModelId = Annotated[str, Path(alias="id", description="A model's id: the name of its folder in the repository.")]


def create_router(dispatcher: Dispatcher) -> APIRouter:
    """`POST /models/{id}/load` and `/unload`."""
    router = APIRouter(tags=["administration"])

    @router.post(
        "/models/{id}/load",
        summary="Load a model",
        operation_id="loadModel",
        responses=openapi.problems(ModelNotFound, ModelFailed, *raised.DOOR),
    )
    async def load_model(model_id: ModelId) -> Model:
        """Read the model's folder again, or a new one. What serves it goes on until every worker has the new one."""
        return Model.model_validate(await dispatcher.load(model_id))

    @router.post(
        "/models/{id}/unload",
        summary="Unload a model",
        operation_id="unloadModel",
        responses=openapi.problems(ModelNotFound, *raised.DOOR),
    )
    async def unload_model(model_id: ModelId) -> Model:
        """Refuse new requests for the model, answer the accepted ones, and free its memory."""
        return Model.model_validate(await dispatcher.unload(model_id))

    return router
