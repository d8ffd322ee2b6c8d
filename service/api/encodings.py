"""The three request encodings: multipart form, JSON, and the picture itself as the body with fields in the query."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Generic

from starlette.requests import Request

from service.api.body import Arrivals, Body, arriving_within
from service.api.fields import Fields, Shape, from_text, merge, read_json, validate, wrong
from service.api.multipart import read_form, too_many_pictures
from service.errors import FieldError, InvalidRequest, MalformedBody, UndecodablePicture, UnsupportedMediaType, echo
from service.settings import Settings

ACCEPTED = "multipart/form-data, application/json, image/* and application/octet-stream"

Picture = bytes | str
Content = tuple[dict[str, object], list[Picture]]
Reader = Callable[[Request, Body, Settings], Awaitable[Content]]


@dataclass(frozen=True)
class Payload(Generic[Fields]):
    """What a request brought. A `str` picture is base64 or a data URI; `size_bytes` is the size of the body."""

    fields: Fields
    pictures: tuple[Picture, ...]
    size_bytes: int


async def read_payload(request: Request, kind: type[Fields], settings: Settings, arrivals: Arrivals) -> Payload[Fields]:
    """Read and check a request's fields and pictures in whichever encoding they come.

    Raises the ServiceErrors of 400, 408, 413, 415, 422 and 429, and ClientDisconnect when the client leaves.
    """
    reader, beside = _reader(request)
    query = from_text(request.query_params.multi_items())
    body = Body(request, settings.max_body_bytes, arrivals)
    try:
        async with arriving_within(settings.body_timeout_s):
            values, pictures = await reader(request, body, settings)
    finally:
        body.forget()
    fields = validate(kind, merge(query, values), beside)
    _check_pictures(pictures, settings.max_pictures)
    return Payload(fields, tuple(pictures), body.size)


def _reader(request: Request) -> tuple[Reader, tuple[str, ...]]:
    """The reader for a request's media type, and the names it takes besides the fields."""
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("identity", ""):
        raise UnsupportedMediaType(f"Content-Encoding {echo(coding)} is not supported; send the body as it is.")
    declared = request.headers.get("content-type", "")
    media_type = declared.partition(";")[0].strip().lower()
    if media_type == "multipart/form-data":
        return _multipart, ("images",)
    if media_type == "application/json":
        return _json, ("images",)
    if media_type == "application/octet-stream" or media_type.startswith("image/") or not _has_body(request):
        return _raw, ()
    said = f"Content-Type {echo(media_type)} is not supported" if media_type else "The body has no Content-Type"
    raise UnsupportedMediaType(f"{said}; accepted are {ACCEPTED}.")


def _has_body(request: Request) -> bool:
    return request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers


async def _multipart(request: Request, body: Body, settings: Settings) -> Content:
    async with aclosing(body.chunks()) as chunks:
        texts, files = await read_form(
            request.headers["content-type"], chunks, settings.max_pictures, settings.max_parts
        )
    return from_text(texts), [*files]


async def _json(_request: Request, body: Body, settings: Settings) -> Content:
    shape, parts = Shape(), []
    async with aclosing(body.chunks()) as chunks:
        async for chunk in chunks:
            shape.add(chunk)
            parts.append(chunk)
    text = b"".join(parts)
    await asyncio.sleep(0)  # joining and parsing 32 MiB take tens of milliseconds each
    try:
        values = read_json(text)
    except ValueError as error:
        raise MalformedBody(f"The body is no JSON: {error}.") from None
    if not isinstance(values, dict):
        raise InvalidRequest("The body is JSON but no object; the fields are its members.")
    images = values.pop("images", [])
    if not isinstance(images, list):
        raise wrong("/images", "The field is a list of strings, each a picture in base64 or as a data URI.")
    for index, image in enumerate(images[: settings.max_pictures]):
        if not isinstance(image, str):
            raise wrong(f"/images/{index}", "A picture is a string: base64 or a data URI.")
    return values, images


async def _raw(_request: Request, body: Body, _settings: Settings) -> Content:
    picture = await body.read()
    return {}, [picture] if picture else []


def _check_pictures(pictures: list[Picture], limit: int) -> None:
    if not pictures:
        raise InvalidRequest("The request brought no picture.", errors=(FieldError("/images", "No picture came."),))
    if len(pictures) > limit:
        raise too_many_pictures(limit)
    for index, picture in enumerate(pictures):
        if not picture:
            detail = f"Picture {index} is empty."
            raise UndecodablePicture(detail, errors=(FieldError(f"/images/{index}", detail),))
