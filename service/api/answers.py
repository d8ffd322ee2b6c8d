"""Answers of explained requests: the JSON envelope, HALCON's DLResult, or the single heatmap itself.

Heatmaps come in base64 already and may have tens of megabytes: they are spliced into the document, never re-encoded.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal
from urllib.parse import quote

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.workers.messages import Answer, ClassScore, Heatmap, PictureResult

Document = dict[str, Any]
Embed = Callable[[Heatmap], Document]


class ChunkedResponse(Response):
    """A response of known length whose body is sent as the chunks it is made of; each is let go once it is sent."""

    def __init__(self, chunks: list[bytes], media_type: str) -> None:
        super().__init__(media_type=media_type, headers={"content-length": str(sum(map(len, chunks)))})
        self.chunks = chunks

    async def __call__(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        self.chunks.reverse()
        while self.chunks:
            await send({"type": "http.response.body", "body": self.chunks.pop(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def json_answer(answer: Answer, result_format: Literal["results", "dl_result"], request_id: str) -> Response:
    """The envelope with one entry per picture."""
    token = secrets.token_hex(16)
    data: list[bytes] = []

    def embed(heatmap: Heatmap) -> Document:
        data.append(heatmap.data)
        return {key: value for key, value in vars(heatmap).items() if key != "channels"} | {"data": token}

    entry = _dl_result if result_format == "dl_result" else _result
    document = {
        "model_id": answer.model_id,
        "revision": answer.revision,
        "request_id": request_id,
        "result_format": result_format,
        "results": [entry(result, embed) for result in answer.results],
    }
    return ChunkedResponse(splice(_dumps(document), token, data), "application/json")


def single_answer(answer: Answer) -> Response:
    """The only heatmap of an answer, its class in the headers."""
    (heatmap,) = answer.results[0].heatmaps
    response = ChunkedResponse([heatmap.data], heatmap.media_type)
    response.headers["X-Class-Id"] = str(heatmap.class_id)
    response.headers["X-Class-Name"] = quote(heatmap.class_name, safe="", errors="replace")
    response.headers["X-Confidence"] = json.dumps(_finite(heatmap.confidence))
    return response


def splice(document: bytes, token: str, data: Iterable[bytes]) -> list[bytes]:
    """The document with its tokens, which nobody else knows, replaced in their order by `data`."""
    first, *others = document.split(token.encode())
    chunks = [first]
    for payload, other in zip(data, others, strict=True):
        chunks += payload, other
    return chunks


def _result(result: PictureResult, embed: Embed) -> Document:
    document: Document = {
        "index": result.index,
        "width": result.width,
        "height": result.height,
        "classes": [vars(score) for score in result.classes],
    }
    if result.heatmaps:
        document["heatmaps"] = [embed(heatmap) for heatmap in result.heatmaps]
    return document


def _dl_result(result: PictureResult, embed: Embed) -> Document:
    """HALCON's DLResult dictionary; of heatmaps with the same key the first one stays."""
    classes: list[ClassScore] = sorted(result.classes, key=lambda score: -score.confidence)
    document: Document = {
        "classification_class_ids": [score.class_id for score in classes],
        "classification_class_names": [score.class_name for score in classes],
        "classification_confidences": [score.confidence for score in classes],
    }
    for heatmap in result.heatmaps:
        prefix = "heatmap" if heatmap.channels == 1 else heatmap.method
        maps = document.setdefault(f"heatmap_{heatmap.method}", {})
        key = f"{prefix}_image_class_{heatmap.class_id}"
        if key not in maps:
            maps[key] = embed(heatmap)
    return document


def _dumps(document: Document) -> bytes:
    return json.dumps(_finite(document), allow_nan=False, separators=(",", ":")).encode()


def _finite(value: object) -> object:
    """JSON has no numbers that aren't finite: null stands for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
