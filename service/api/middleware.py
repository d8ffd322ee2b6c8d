"""What every answer carries, errors included, and what is logged of it; and the last word on a defect of ours."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.hosts import Hosts
from service.api.parser import headers_too_large
from service.api.problems import problem
from service.api.record import log_request
from service.errors import InvalidRequest, ServiceError, TooManyConnections
from service.workers.messages import Timings

PROBES = ("/livez", "/readyz")
RESERVE_RETRY_S = 1.0
SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")

MAX_QUERY_FIELDS = 4096

logger = logging.getLogger(__name__)


class FrameMiddleware:
    """Pure ASGI, around everything. Leaves `request_id`, `started` (perf_counter) and `status` in the scope's state."""

    def __init__(self, app: ASGIApp, max_header_bytes: int, hosts: Hosts, count: Callable[[Scope], None]) -> None:
        """`count` is told of each request that is over."""
        self.app = app
        self._max_header_bytes = max_header_bytes
        self._hosts = hosts
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        state = scope["state"] = {**scope.get("state", {}), "started": time.perf_counter()}
        state["request_id"] = _request_id(Headers(scope=scope).get("x-request-id", ""))

        async def framed(message: Message) -> None:
            if message["type"] == "http.response.start":
                state["status"] = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Content-Type-Options"] = "nosniff"
                headers["X-Request-ID"] = state["request_id"]
                if state.get("reserve") and not _has_body(scope):
                    headers["Connection"] = "close"
                headers["Server-Timing"] = server_timing(state.get("timings"), time.perf_counter() - state["started"])
            await send(message)

        refusal = self._refusal(scope)
        try:
            await (problem(scope, refusal) if refusal else self.app)(scope, receive, framed)
        finally:
            log_request(scope)
            self._count(scope)

    def _refusal(self, scope: Scope) -> ServiceError | None:
        """Why a request is answered before any more of its head is looked into. Probes come by whatever name."""
        if _head_bytes(scope) > self._max_header_bytes:
            return headers_too_large(self._max_header_bytes)
        is_probe = scope["path"] in PROBES
        if not is_probe and (foreign := self._hosts.refusal(Headers(scope=scope).get("host", ""))):
            return foreign
        if scope["query_string"].count(b"&") >= MAX_QUERY_FIELDS:  # tens of thousands would hold the event loop
            return InvalidRequest(f"The query has more than {MAX_QUERY_FIELDS} fields; write a list as one JSON array.")
        if scope["state"].get("reserve") and not is_probe:
            return TooManyConnections("As many connections are open as may be.", retry_after=RESERVE_RETRY_S)
        return None


class DefectMiddleware:
    """Pure ASGI, around the routes. Needs the frame's state."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.app(scope, receive, send)
        except ClientDisconnect:
            return  # nobody is there to be answered
        except Exception:
            state = scope["state"]
            if "status" in state:  # half an answer cannot be taken back: the server closes the connection
                state["broken"] = True
                raise
            logger.exception("Request %s met a defect.", state["request_id"])
            defect = ServiceError("The service met a defect of its own; its log tells more under the request_id.")
            await problem(scope, defect)(scope, receive, send)


class HeadMiddleware:
    """Pure ASGI, next to the routes, which answer HEAD as GET; uvicorn, whose scope still says HEAD, drops the body."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope.get("method") != "HEAD":
            await self.app(scope, receive, send)
            return
        as_get = {**scope, "method": "GET"}
        try:
            await self.app(as_get, receive, send)
        finally:
            scope["path_params"] = as_get.get("path_params", {})  # for the log


def server_timing(timings: Timings | None, total: float) -> str:
    """The header's value: the stages that did work, then the total, in milliseconds."""
    stages = {**(vars(timings) if timings else {}), "total": total}
    return ", ".join(f"{name};dur={seconds * 1000:.3f}" for name, seconds in stages.items())


def _has_body(scope: Scope) -> bool:
    return any(name in (b"content-length", b"transfer-encoding") for name, _ in scope["headers"])


def _head_bytes(scope: Scope) -> int:
    headers = sum(len(name) + len(value) + len(b": \r\n") for name, value in scope["headers"])
    return headers + len(scope["raw_path"]) + len(scope["query_string"])


def _request_id(given: str) -> str:
    return given if SANE_ID.fullmatch(given) else uuid.uuid4().hex
