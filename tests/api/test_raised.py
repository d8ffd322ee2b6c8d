"""The errors that each step of a request announces are those that its code raises."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from service import errors
from service.api import raised
from service.errors import HeadersTimeout, MalformedRequest, MethodNotAllowed, PathNotFound, ServiceError

SERVICE = Path(errors.__file__).parent
STEPS: dict[tuple[str, ...], tuple[type[ServiceError], ...]] = {
    ("api/connection", "api/problems"): (HeadersTimeout, PathNotFound, MethodNotAllowed),  # no route is asked
    ("api/middleware", "api/hosts", "api/parser", "api/keys"): (MalformedRequest, *raised.FRAME, *raised.DOOR),
    ("api/body", "api/encodings", "api/fields", "api/multipart"): raised.READ,
    ("api/negotiation", "api/unread"): raised.ANSWER,
    ("api/rate", "dispatch", "workers", "methods", "explain", "models", "imaging"): (
        *raised.QUEUE,
        *raised.WORK,
        *raised.EXPLAIN,
    ),
}


def made_by(step: tuple[str, ...]) -> set[type[ServiceError]]:
    """The errors that the step's modules and packages make."""
    files = [file for file in SERVICE.rglob("*.py") if str(file.relative_to(SERVICE)).startswith(step)]
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
    named = {getattr(errors, node.func.id, None) for node in nodes if isinstance(node.func, ast.Name)}
    return {kind for kind in named if isinstance(kind, type) and issubclass(kind, ServiceError)}


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step[0])
def test_a_step_announces_what_its_code_raises(step: tuple[str, ...]) -> None:
    announced = set(STEPS[step])
    assert made_by(step) | set(raised.FRAME) == announced | set(raised.FRAME)


def test_no_module_is_forgotten() -> None:
    named = tuple(one for step in STEPS for one in step)
    modules = [str(file.relative_to(SERVICE)) for file in SERVICE.rglob("*.py")]
    assert made_by(tuple(module for module in modules if not module.startswith(named))) == set()
