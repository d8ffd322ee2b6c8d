"""The endpoints that tell what there is: models, their layers and classes, methods."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query, Request

from service.api import openapi, raised
from service.api.fields import check_names
from service.api.responses import ClassLabel, ClassList, Layer, LayerList, Method, MethodList, Model, ModelList
from service.dispatch.dispatcher import Dispatcher
from service.errors import ModelNotFound, NoWorker

ModelId = Annotated[str, Path(alias="id", description="A model's id, from `GET /models`.")]
NamePart = Annotated[
    str, Query(default_factory=str, description="A part of the name, whatever its case; or the digits of an id.")
]


def create_router(dispatcher: Dispatcher) -> APIRouter:
    """The GET endpoints under `/models` and `/methods`."""
    router = APIRouter(tags=["catalogue"], dependencies=[Depends(_check_query)])
    model_problems = openapi.problems(ModelNotFound, *raised.DOOR)
    detail_problems = openapi.problems(*raised.LOADED, *raised.DOOR)
    method_problems = openapi.problems(NoWorker, *raised.DOOR)

    @router.get("/models", summary="List the models", operation_id="listModels")
    async def list_models() -> ModelList:
        """Every model of the repository, also those that load or failed."""
        return ModelList(models=[Model.model_validate(info) for info in dispatcher.models().values()])

    @router.get("/models/{id}", summary="Describe a model", operation_id="getModel", responses=model_problems)
    async def get_model(model_id: ModelId) -> Model:
        """One model: its state, its input, its layers of note."""
        return Model.model_validate(dispatcher.model(model_id))

    @router.get(
        "/models/{id}/layers", summary="List a model's layers", operation_id="listLayers", responses=detail_problems
    )
    async def list_layers(model_id: ModelId) -> LayerList:
        """The summary of the network: which layers can be `target_conv_layer`, and why others can't."""
        info = dispatcher.loaded(model_id)
        return LayerList(layers=[Layer.model_validate(layer) for layer in info.layers])

    @router.get(
        "/models/{id}/classes", summary="List a model's classes", operation_id="listClasses", responses=detail_problems
    )
    async def list_classes(model_id: ModelId, query: NamePart) -> ClassList:
        """The classes that the model knows, or those that match the query."""
        info = dispatcher.loaded(model_id)
        part = query.casefold()
        return ClassList(
            classes=[
                ClassLabel(class_id=class_id, class_name=name)
                for class_id, name in enumerate(info.classes)
                if part in name.casefold() or query == str(class_id)
            ]
        )

    @router.get("/methods", summary="List the heatmap methods", operation_id="listMethods", responses=method_problems)
    async def list_methods() -> MethodList:
        """The methods and, as JSON Schema, their `gen_params`."""
        return MethodList(methods=[Method.model_validate(info) for info in dispatcher.methods()])

    return router


async def _check_query(request: Request) -> None:
    """Refuse names in the query that the route does not take, which FastAPI would not look at."""
    takes = request.scope["route"].dependant.query_params
    check_names(request.query_params.multi_items(), [field.alias for field in takes])
