"""The clients of a soak: they ask, leave at the worst moment and send nonsense, and note what came of it."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

import httpx

from tests.soak.answers import Difference, Reply, check_same
from tests.soak.cases import Case, problem_code

CANCELLED, BAD = 0.10, 0.05
REFUSALS = frozenset({429, 503, 504})
"""What a service in trouble may answer to any request."""
PATIENCE_S = 90.0
"""Longer than any deadline: a client that has waited so long has lost its answer."""
IDLE_S = 2.0
"""A connection that was idle for longer is not used again: the server closes it after five seconds."""
Kind = Literal["valid", "bad", "canary"]
MOMENTS = ("while sending", "in the queue", "in compute", "while reading")


@dataclass(frozen=True)
class Outcome:
    """An answered request. `sent` and `received` are on `time.monotonic`'s clock; a 200 has no `code`.

    `canary`: a valid request that asks again and again whether the service is back, and counts for nothing else.
    """

    kind: Kind
    sent: float
    received: float
    status: int
    code: str


@dataclass
class Ledger:
    """What became of every request. `wrong` are answers with a status or code that the request must not get."""

    outcomes: list[Outcome] = field(default_factory=list)
    cancelled: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def sent(self) -> int:
        return len(self.outcomes) + self.cancelled.total() + len(self.lost)

    def refused(self) -> Counter[tuple[int, str]]:
        """How often each problem was the answer to a valid request."""
        return Counter((one.status, one.code) for one in self.of("valid") if one.status != 200)

    def of(self, kind: Kind) -> list[Outcome]:
        return [one for one in self.outcomes if one.kind == kind]


class Clients:
    """Sends cases to one server, keeps the ledger and compares every 200 with the oracle's answer."""

    def __init__(self, url: str, valid: Sequence[Case], bad: Sequence[Case], oracle: Mapping[str, Reply]) -> None:
        self.ledger = Ledger()
        self._url = url
        self._valid = valid
        self._bad = bad
        self._oracle = oracle

    async def run(self, count: int, seed: int, until: float) -> None:
        """`count` clients, each with one request after the other until a moment of `time.monotonic`."""
        await asyncio.gather(*(self._client(random.Random(f"{seed}/{number}"), until) for number in range(count)))

    async def _client(self, rng: random.Random, until: float) -> None:
        weights = [case.weight for case in self._valid]
        async with connected(self._url) as http:
            while time.monotonic() < until:
                (case,) = rng.choices(self._valid, weights)
                chance = rng.random()
                if chance < CANCELLED:
                    await self._leave(case, rng)
                elif chance < CANCELLED + BAD:
                    await self._ask_and_wait(http, rng.choice(self._bad), "bad", until)
                else:
                    await self._ask_and_wait(http, case, "valid", until)

    async def _ask_and_wait(self, http: httpx.AsyncClient, case: Case, kind: Kind, until: float) -> None:
        """Ask, and do as one is told: who is refused waits for as long as Retry-After says."""
        status, retry_after_s = await self.ask(http, case, kind)
        if status in REFUSALS:
            await asyncio.sleep(min(retry_after_s, max(0.0, until - time.monotonic())))

    async def ask(self, http: httpx.AsyncClient, case: Case, kind: Kind) -> tuple[int, float]:
        """Send a case and judge its answer. Returns the status, 0 where none came, and Retry-After's seconds."""
        sent = time.monotonic()
        try:
            reply = await send(http, case)
        except httpx.HTTPError as error:
            self.ledger.lost.append(f"{case.name}: {type(error).__name__} {error}")
            return 0, 0.0
        code = "" if reply.status == 200 else problem_code(reply.body)
        self.ledger.outcomes.append(Outcome(kind, sent, time.monotonic(), reply.status, code))
        if reply.status == 200 and not case.code:
            await asyncio.to_thread(self._compare, case, reply)
        elif code != case.code and (reply.status not in REFUSALS or not code):
            self.ledger.wrong.append(f"{case.name}: {reply.status} {reply.body[:300]!r}")
        return reply.status, float(reply.headers.get("retry-after", 0))

    def _compare(self, case: Case, reply: Reply) -> None:
        try:
            check_same(reply, self._oracle[case.name], case.chaotic)
        except Difference as difference:
            self.ledger.differing.append(f"{case.name}: {difference}")

    async def _leave(self, case: Case, rng: random.Random) -> None:
        """Send a case and close the socket before its answer is there, or is read: by a RST, or by a FIN."""
        moment = rng.choice(MOMENTS)
        whole = case.wire()
        address = urlsplit(self._url)
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        with suppress(ConnectionError):
            writer.write(whole[: len(whole) // 2] if moment == "while sending" else whole)
            await writer.drain()
            if moment == "in compute":
                with suppress(TimeoutError):
                    await asyncio.wait_for(reader.read(1), rng.uniform(0.02, 1.0))
            elif moment == "while reading":
                with suppress(TimeoutError):
                    await asyncio.wait_for(reader.read(256), PATIENCE_S)
        if rng.random() < 0.5:
            reset_on_close(writer.get_extra_info("socket"))
        writer.transport.abort()
        self.ledger.cancelled[moment] += 1


def reset_on_close(connection: socket.socket) -> None:
    """Let the socket close by a RST, as that of a client whose process or network died."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def connected(url: str) -> httpx.AsyncClient:
    """A client with one connection, as a browser's tab has it."""
    limits = httpx.Limits(max_connections=1, keepalive_expiry=IDLE_S)
    return httpx.AsyncClient(base_url=url, timeout=PATIENCE_S, limits=limits)


async def send(http: httpx.AsyncClient, case: Case) -> Reply:
    response = await http.request(case.verb, case.path, content=case.body, headers=dict(case.headers))
    return Reply(response.status_code, dict(response.headers), response.content)


async def ask_alone(url: str, cases: Sequence[Case], say: Callable[[str], None]) -> dict[str, Reply]:
    """The oracle: every case's answer, one request at a time. Raises RuntimeError where one is not answered with 200,
    or has a map that shows nothing, which would prove nothing."""
    found: dict[str, Reply] = {}
    async with connected(url) as http:
        for case in cases:
            started = time.monotonic()
            reply = found[case.name] = await send(http, case)
            if reply.status != 200:
                raise RuntimeError(f"{case.name}: {reply.status} {reply.body[:500].decode(errors='replace')}")
            if reply.headers["content-type"] == "application/json" and _shows_nothing(json.loads(reply.body)):
                raise RuntimeError(f"{case.name}: a map is degenerate")
            say(f"  {case.name}: {time.monotonic() - started:.2f} s")
    return found


def _shows_nothing(answer: object) -> bool:
    """Whether a heatmap anywhere in an answer is degenerate."""
    if isinstance(answer, dict):
        return bool(answer.get("degenerate")) or any(map(_shows_nothing, answer.values()))
    return isinstance(answer, list) and any(map(_shows_nothing, answer))
