"""The one line that is logged of each request: what was asked, how it ended, how long it took. No picture, no key."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from starlette.types import Scope

from service.api.problems import shown_path
from service.errors import MAX_ECHO, DeadlineExceeded, OutOfDeviceMemory, ServiceError, WorkerLost
from service.workers.messages import Timings

QUIET = ("/livez", "/readyz", "/metrics")
"""What is asked every few seconds, and logged at debug."""
FAILURES = {kind.code for kind in (ServiceError, WorkerLost, OutOfDeviceMemory)}

logger = logging.getLogger(__name__)


def log_request(scope: Scope) -> None:
    """Log a request that is over. The scope's state has what the room learned of it."""
    level = logging.DEBUG if scope["path"] in QUIET else logging.INFO
    if scope["state"].get("incomplete"):  # whoever asked should ask for more steps
        level = logging.WARNING
    if logger.isEnabledFor(level):
        logger.log(level, "request", extra={"fields": _fields(scope)})


def outcome(state: Mapping[str, Any]) -> str:
    """How a request ended, by the scope's state. `failed` is what the service is to blame for."""
    status, code = state.get("status"), state.get("code")
    if state.get("broken"):
        return "failed"
    if status is None:
        return "cancelled"  # nobody was there to be answered
    if status < 400:
        return "answered"
    if code == DeadlineExceeded.code:
        return "timed_out"
    return "failed" if code in FAILURES else "refused"


def _ascii(text: str) -> str:
    """What a client wrote, cut to MAX_ECHO characters after the escapes."""
    return text.encode("ascii", "backslashreplace").decode()[:MAX_ECHO]


def _fields(scope: Scope) -> dict[str, object]:
    state = scope["state"]
    status, code = state.get("status"), state.get("code")
    timings: Timings | None = state.get("timings")
    seconds = {**(vars(timings) if timings else {}), "total": time.perf_counter() - state["started"]}
    model = scope.get("path_params", {}).get("id")
    return {
        "request_id": state["request_id"],
        "method": _ascii(scope["method"]),
        "path": shown_path(scope),
        "model": model and _ascii(model),
        "methods": [_ascii(name) for name in state.get("methods", ())] or None,
        "pictures": state.get("pictures"),
        "status": status,
        "code": code,
        "key": state.get("key_name"),
        "completeness_error": state.get("incomplete"),
        **{f"{stage}_ms": round(value * 1000, 3) for stage, value in seconds.items()},
        "outcome": outcome(state),
    }
