"""A body within its bounds: bytes counted before and while they come, and in time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

from starlette.types import Message

from service.settings import Settings
from tests.api.support import Api, StandIn, check_problem, make_app


def test_a_declared_size_over_the_limit_is_refused_unread() -> None:
    api = Api(max_body_bytes=10)

    reads: list[bytes] = []

    async def body() -> AsyncIterator[bytes]:
        reads.append(b"a" * 11)
        yield reads[0]

    headers = {"content-type": "image/png", "content-length": "11"}
    problem = check_problem(api.post(content=body(), headers=headers), 413, "body_too_large")
    assert "10 bytes" in problem["detail"]
    assert reads == []


def test_a_body_is_counted_while_it_streams() -> None:
    api = Api(max_body_bytes=10)

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield b"--x\r\nContent-"

    for media_type in ("image/png", "application/json", "multipart/form-data; boundary=x"):
        response = api.post(content=chunks(), headers={"content-type": media_type})
        check_problem(response, 413, "body_too_large")
    assert api.raw(content=b"1234567890").status_code == 200


def test_a_slow_body_is_408() -> None:
    """The second chunk never comes."""
    app = make_app(StandIn(), Settings(body_timeout_s=0.05))
    sent: list[Message] = []
    messages = iter([{"type": "http.request", "body": b"abc", "more_body": True}])

    async def receive() -> Message:
        for message in messages:
            return message
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(app(scope_of("image/png"), receive, send))
    headers = dict(sent[0]["headers"])
    assert sent[0]["status"] == 408
    assert headers[b"connection"] == b"close"
    assert b'"code": "body_timeout"' in sent[1]["body"]


def test_a_client_that_leaves_in_the_body_is_not_answered() -> None:
    dispatcher = StandIn()
    sent: list[Message] = []
    messages: Iterator[Message] = iter(
        [{"type": "http.request", "body": b"abc", "more_body": True}, {"type": "http.disconnect"}]
    )

    async def receive() -> Message:
        return next(messages)

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(make_app(dispatcher)(scope_of("image/png"), receive, send))
    assert (sent, dispatcher.asked) == ([], [])


def scope_of(media_type: str) -> dict[str, Any]:
    path = "/models/resnet/heatmap"
    return {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", media_type.encode()), (b"transfer-encoding", b"chunked")],
        "server": ("test", 80),
        "scheme": "http",
    }
