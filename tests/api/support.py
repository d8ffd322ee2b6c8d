"""The API over a dispatcher whose pool is a stand-in: it answers at once, or as a test tells it."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, cast

import httpx
from fastapi import FastAPI

from service.api import mount
from service.dispatch.dispatcher import Dispatcher
from service.keys import KeyFile
from service.settings import Settings
from service.workers.messages import (
    Answer,
    ClassScore,
    ExplainRequest,
    Heatmap,
    LayerInfo,
    MethodInfo,
    ModelInfo,
    PictureResult,
    Timings,
)
from service.workers.pool import Pool
from tests.told import check_told

LAYER = LayerInfo("conv", "Conv2d", (8, 7, 7), 224, True, None, True, False, "relu")
READY = ModelInfo(
    "resnet", "ready", None, "sha256:00", "classification", layers=(LAYER,), classes=("ant", "Bee", "cat")
)
LOADING = ModelInfo("slow", "loading")
FAILED = ModelInfo("broken", "failed", "no weights")
METHOD = MethodInfo("grad_cam", "cam", 1, "paper", "description", "1", {"type": "object"})
NAMES = ("ant", 'hostile "name"\r\nX-Evil: 1', "cät")
DATA = b"\x93NUMPY raw bytes"


def heatmap(method: str = "grad_cam", class_id: int = 1, as_base64: bool = True, **changes: Any) -> Heatmap:
    values: dict[str, Any] = {
        "method": method,
        "channels": 3 if method.startswith("guided") else 1,
        "class_id": class_id,
        "class_name": NAMES[class_id % 3],
        "confidence": 0.25,
        "gen_params": {"target_conv_layer": ("conv",), "use_conv_only": True},
        "precision": "fp32",
        "value_range": (-0.5, 3.0),
        "rounding_error": None,
        "completeness_error": None,
        "degenerate": None,
        "format": "overlay",
        "media_type": "image/png",
        "width": 4,
        "height": 3,
        "data": base64.b64encode(DATA) if as_base64 else DATA,
    }
    return Heatmap(**values | changes)


def answer_to(request: ExplainRequest) -> Answer:
    media_type = "application/x-npy" if request.format == "npy" else f"image/{request.encoding}"
    results = []
    for index, targets in enumerate(request.target_classes):
        ids = [target if isinstance(target, int) else 2 for target in targets] or [1]
        maps = tuple(
            heatmap(method, class_id, request.as_base64, format=request.format, media_type=media_type)
            for method in request.methods
            for class_id in ids
        )
        scores = tuple(ClassScore(i, NAMES[i], (0.25, 0.5, 0.125)[i]) for i in range(3))
        results.append(PictureResult(index, 4, 3, scores, maps))
    return Answer(request.model_id, "sha256:00", tuple(results), Timings(0.001, 0.002, 0.003, 0.004))


class StandIn(Dispatcher):
    """The real dispatcher but for its workers: `explain` keeps what it was asked, then answers or raises."""

    def __init__(self, *models: ModelInfo, methods: tuple[MethodInfo, ...] = (METHOD,), serves: bool = True) -> None:
        known = {info.id: info for info in models or (READY,)}
        worker = SimpleNamespace(
            device="cpu", pictures=0, serves=serves, has=lambda model_id: known.get(model_id, LOADING).state == "ready"
        )
        pool = SimpleNamespace(models=known, methods=methods, workers=[worker], replaced=0)
        super().__init__(Settings(), cast(Pool, pool))
        self.asked: list[ExplainRequest] = []
        self.sizes: list[int] = []
        self.timeouts: list[float] = []
        self.failure: Exception | None = None

    async def explain(self, request: ExplainRequest, size_bytes: int, timeout_s: float) -> Answer:
        self.asked.append(request)
        self.sizes.append(size_bytes)
        self.timeouts.append(timeout_s)
        if self.failure:
            raise self.failure
        return answer_to(request)


def make_app(dispatcher: Dispatcher, settings: Settings | None = None) -> FastAPI:
    app = FastAPI(docs_url=None, redoc_url=None)
    settings = settings or Settings()
    mount(app, dispatcher, settings, KeyFile(settings.api_keys_file) if settings.api_keys_file else None)
    return app


def ask(app: FastAPI, method: str, url: str, **options: Any) -> httpx.Response:
    async def exchange() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://localhost") as client:
            return await client.request(method, url, **options)

    response = asyncio.run(exchange())
    check_told(response)
    return response


class Api:
    """One app over one stand-in, asked synchronously."""

    def __init__(self, dispatcher: StandIn | None = None, **settings: Any) -> None:
        self.dispatcher = dispatcher or StandIn()
        self.app = make_app(self.dispatcher, Settings(**settings))

    def get(self, url: str, **options: Any) -> httpx.Response:
        return ask(self.app, "GET", url, **options)

    def post(self, url: str = "/models/resnet/heatmap", **options: Any) -> httpx.Response:
        return ask(self.app, "POST", url, **options)

    def raw(self, query: str = "", content: Any = b"picture", **headers: Any) -> httpx.Response:
        """The picture as the body, fields in the query."""
        return self.post(
            f"/models/resnet/heatmap?{query}", content=content, headers={"content-type": "image/png", **headers}
        )

    def json(self, url: Any = "/models/resnet/heatmap", **fields: Any) -> httpx.Response:
        body = json.dumps({"images": ["cGljdHVyZQ=="], **fields})
        return self.post(url, content=body, headers={"content-type": "application/json"})

    @property
    def work(self) -> ExplainRequest:
        """What the last request asked of the dispatcher."""
        return self.dispatcher.asked[-1]


def check_problem(response: httpx.Response, status: int, code: str) -> Mapping[str, Any]:
    """The problem in a response, checked for what every problem has."""
    assert (response.status_code, response.headers["content-type"]) == (status, "application/problem+json"), (
        response.text
    )
    document: dict[str, Any] = response.json()
    assert document["code"] == code, document
    assert document["type"] == f"urn:heatmap-service:problem:{code}"
    assert document["status"] == status
    assert document["title"]
    assert document["detail"]
    assert document["instance"].startswith("/")
    assert document["request_id"] == response.headers["x-request-id"]
    assert "total;dur=" in response.headers["server-timing"]
    return document


def pointers(problem: Mapping[str, Any]) -> list[str]:
    return [error["pointer"] for error in problem["errors"]]
