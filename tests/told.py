"""Whether the OpenAPI document tells of an answer: of its status and, where it is a problem, of its code."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx

OPENAPI = Path(__file__).parents[1] / "openapi"
DOCUMENT: Any = json.loads((OPENAPI / "openapi.json").read_text())


def check_told(response: httpx.Response) -> None:
    """Fail where the answer is not one of those that the document tells of its operation. Reads problems."""
    operation = operation_of(response.request)
    if operation is None:  # an unknown path, a wrong verb, or a page
        return
    told = operation["responses"].get(str(response.status_code))
    assert told, f"{operation['operationId']} answers {response.status_code}, of which the document does not tell"
    if response.headers.get("content-type") == "application/problem+json" and response.request.method != "HEAD":
        response.read()
        code = response.json()["code"]
        assert f"(`{code}`)" in told["description"], f"{operation['operationId']}: the document does not tell of {code}"


def operation_of(request: httpx.Request) -> Any:
    """The operation that a request asks for, or None."""
    verb = {"HEAD": "get"}.get(request.method, request.method.lower())
    for template, operations in DOCUMENT["paths"].items():
        if re.fullmatch(re.sub(r"\\\{.*?\\\}", "[^/]+", re.escape(template)), request.url.path):
            return operations.get(verb)
    return None
