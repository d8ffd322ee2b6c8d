"""A client that leaves cancels its work."""

from __future__ import annotations

import asyncio

import pytest
from starlette.requests import ClientDisconnect
from starlette.types import Message

from service.api.disconnect import unless_gone
from service.workers.messages import Answer, ExplainRequest
from tests.api.support import StandIn, make_app
from tests.api.test_body import scope_of


class Endless(StandIn):
    """Explains for ever; tells when it began and that it was cancelled."""

    def __init__(self) -> None:
        super().__init__()
        self.began = asyncio.Event()
        self.cancelled = False

    async def explain(self, request: ExplainRequest, size_bytes: int, timeout_s: float) -> Answer:
        self.began.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        raise AssertionError


def test_work_is_cancelled_when_its_client_leaves() -> None:
    dispatcher = Endless()
    sent: list[Message] = []
    body = iter([{"type": "http.request", "body": b"abc", "more_body": False}])

    async def receive() -> Message:
        for message in body:
            return message
        await dispatcher.began.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    async def exchange() -> None:
        async with asyncio.timeout(60):
            await make_app(dispatcher)(scope_of("image/png"), receive, send)

    asyncio.run(exchange())
    assert (dispatcher.cancelled, sent) == (True, [])


async def _never() -> Message:
    await asyncio.Event().wait()
    raise AssertionError


async def _gone() -> Message:
    return {"type": "http.disconnect"}


def test_work_that_ends_first_is_answered() -> None:
    async def work() -> int:
        await asyncio.sleep(0)
        return 7

    assert asyncio.run(unless_gone(_never, work())) == 7


def test_the_works_error_is_raised() -> None:
    async def work() -> int:
        raise KeyError("x")

    with pytest.raises(KeyError):
        asyncio.run(unless_gone(_never, work()))


def test_cancelling_the_waiter_cancels_the_work() -> None:
    async def exchange() -> bool:
        dispatcher = Endless()
        request = ExplainRequest("m", (b"",), ((),))
        waiter = asyncio.ensure_future(unless_gone(_never, dispatcher.explain(request, 0, 1)))
        await dispatcher.began.wait()
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter
        return dispatcher.cancelled

    assert asyncio.run(exchange())


def test_a_client_already_gone() -> None:
    async def exchange() -> None:
        with pytest.raises(ClientDisconnect):
            await unless_gone(_gone, _never())

    asyncio.run(exchange())
