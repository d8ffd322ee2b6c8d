"""Every error as `application/problem+json` (RFC 9457), whatever Accept says."""

from __future__ import annotations

import json
import math
import re
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from service.api.fields import invalid
from service.errors import MAX_ECHO, BodyTimeout, MethodNotAllowed, PathNotFound, ServiceError, echo, nearest

MEDIA_TYPE = "application/problem+json"


def install(app: FastAPI) -> None:
    """Answer the app's errors as problems. What no handler knows is the middleware's to answer."""
    app.add_exception_handler(ServiceError, _on_service_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_validation_error)


def problem(scope: Scope, error: ServiceError) -> Response:
    """The problem that tells a client of an error."""
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    if error.status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, BodyTimeout):
        headers["Connection"] = "close"  # the rest of the body may never come
    scope["state"]["code"] = error.code
    document: dict[str, Any] = {
        "type": f"urn:heatmap-service:problem:{error.code}",
        "title": error.title,
        "status": error.status,
        "detail": error.detail,
        "instance": shown_path(scope),
        "code": error.code,
        "request_id": scope["state"]["request_id"],
    }
    if error.errors:
        document["errors"] = [{"pointer": place.pointer, "detail": place.detail} for place in error.errors]
    return Response(json.dumps(document).encode(), error.status, headers, MEDIA_TYPE)


def shown_path(scope: Scope) -> str:
    """The path as a URI reference, cut to MAX_ECHO characters, but not within an escape."""
    return re.sub("%.?$", "", quote(scope["path"][:MAX_ECHO], errors="replace")[:MAX_ECHO])


async def _on_service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    return problem(request.scope, error)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    found = [{**finding, "loc": finding["loc"][1:]} for finding in error.errors()]
    return problem(request.scope, invalid(found, error.body))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """What the router refuses: an unknown path or a wrong verb."""
    assert isinstance(error, HTTPException)
    if error.status_code == PathNotFound.status:
        return problem(request.scope, _path_not_found(request))
    if error.status_code != MethodNotAllowed.status:
        raise error
    allow = _with_head((error.headers or {})["Allow"])
    path = shown_path(request.scope)
    response = problem(
        request.scope, MethodNotAllowed(f"{request.method[:MAX_ECHO]} is not for {path}; it takes {allow}.")
    )
    response.headers["Allow"] = allow
    return response


def _with_head(allow: str) -> str:
    verbs = set(allow.split(", "))
    return ", ".join(sorted(verbs | {"HEAD"} if "GET" in verbs else verbs))


def _path_not_found(request: Request) -> PathNotFound:
    path = request.scope["path"]
    hint = nearest(path, request.app.openapi()["paths"])
    return PathNotFound(f"There is no path {echo(path)}; /openapi.json lists them all.{hint}")
