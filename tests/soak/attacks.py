"""Attacks on a server: each is bounded, and survived where every answer is a problem, what was asked, or none.

An attack is one burst. `attacking` repeats bursts in a process of its own, so that they delay nobody but the server.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import re
import resource
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any
from urllib.parse import urlsplit

from tests.soak.cases import TINY, asked, heatmap, photograph
from tests.soak.hostile import jpeg_of_scans, webp_of_one_colour

PATIENCE_S = 60.0
"""An attacker gives up an unfinished connection after this time. Not the attack's fault: it is no answer at all."""
MIB = 2**20
TRAILERS = 46 * MIB
PIPELINES, PIPELINE_BYTES = 10, 246 * 1024
PICTURES = 8
READERS, READ_BYTES, READ_EVERY_S, READ_S = 8, 4096, 0.2, 10.0
VALUES = 100_000
IDLERS, IDLE_S = 3000, 8.0
REFUSED = frozenset(range(400, 600)) - {500}


@dataclass(frozen=True)
class Target:
    """The server that is attacked; `key` may be empty."""

    url: str
    key: str = ""

    @asynccontextmanager
    async def connected(self) -> Any:
        """A connection as (reader, writer) that is closed at the end."""
        address = urlsplit(self.url)
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        try:
            yield reader, writer
        finally:
            writer.transport.abort()

    def request(self, body: bytes, media_type: str, *lines: str, path: str = heatmap(TINY), last: bool = True) -> bytes:
        """A POST with the key; `last` asks the server to close behind it."""
        head = [
            f"POST {path} HTTP/1.1",
            "Host: localhost",
            f"Content-Type: {media_type}",
            f"Content-Length: {len(body)}",
            *([f"X-API-Key: {self.key}"] if self.key else []),
            *(["Connection: close"] if last else []),
            *lines,
        ]
        return "\r\n".join([*head, "", ""]).encode() + body


@dataclass
class Report:
    """How often each attack was made, and what was answered that must not be."""

    bursts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


class NotSurvived(Exception):
    """The server answered what it must not answer."""


Attack = Callable[[Target], Awaitable[None]]


def statuses(received: bytes) -> list[int]:
    """The statuses of the answers on a connection, in order."""
    return [int(number) for number in re.findall(rb"HTTP/1\.1 (\d{3}) ", received)]


def check(received: bytes, allowed: frozenset[int], at_most: int = 1) -> None:
    """Raise NotSurvived unless there are at most so many answers, all with an allowed status."""
    found = statuses(received)
    if len(found) > at_most:
        raise NotSurvived(f"{len(found)} answers to {at_most} requests: {found[:5]}")
    if wrong := set(found) - allowed:
        raise NotSurvived(f"status {sorted(wrong)}: {received[-300:]!r}")


async def exchange(target: Target, parts: Iterable[bytes], apart_s: float = 0.0) -> bytes:
    """Send the parts as fast as they are taken, or `apart_s` apart, and return all answers until the server closes.

    What the server refuses to read, by closing or by reading no more, is left.
    """
    received = b""
    async with target.connected() as (reader, writer):

        async def send() -> None:
            with suppress(ConnectionError):
                for part in parts:
                    writer.write(part)
                    await writer.drain()
                    await asyncio.sleep(apart_s)

        sending = asyncio.create_task(send())
        try:
            async with asyncio.timeout(PATIENCE_S):
                while data := await reader.read(65536):
                    received += data
        except (ConnectionError, TimeoutError):
            pass
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
    return received


async def trailers(target: Target) -> None:
    """46 MB of trailers behind a chunked body, without a key."""
    head = f"POST {heatmap(TINY)} HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nConnection: close\r\n"
    line = b"X-Trailer: " + b"a" * 1000 + b"\r\n"
    block = line * 64

    def parts() -> Iterator[bytes]:
        yield head.encode() + b"Transfer-Encoding: chunked\r\n\r\n1\r\nA\r\n0\r\n"
        yield from (block for _ in range(TRAILERS // len(block)))
        yield b"\r\n"

    check(await exchange(target, parts()), REFUSED)


LIVE = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
LAST = LIVE[:-2] + b"Connection: close\r\n\r\n"
READ_AHEAD = PIPELINE_BYTES // len(LIVE)


async def pipelines(target: Target) -> None:
    """Ten connections, each with thousands of requests that are sent at once."""
    sent = [LIVE * READ_AHEAD + LAST]
    for received in await asyncio.gather(*(exchange(target, sent) for _ in range(PIPELINES))):
        check(received, REFUSED | {200}, READ_AHEAD + 1)


async def pipelines_behind_a_slow_post(target: Target) -> None:
    """The same, each behind a request that is computed for seconds."""
    slow = json.dumps(asked([photograph("camera.png", 64)], method="rise", gen_params={"n": 20_000}, timeout_s=3))
    first = target.request(slow.encode(), "application/json", last=False)
    sent = [first + LIVE * READ_AHEAD + LAST]
    for received in await asyncio.gather(*(exchange(target, sent) for _ in range(PIPELINES))):
        check(received, REFUSED | {200}, READ_AHEAD + 2)


async def upgrade(target: Target) -> None:
    """A body that looks like a request, behind a head that asks for another protocol."""
    inner = b"GET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n"
    lines = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABk")
    whole = target.request(inner, "image/png", *lines, last=False)
    received = await exchange(target, [whole.removesuffix(inner), inner, LAST], apart_s=0.1)
    check(received, REFUSED | {200}, 2)
    found = statuses(received)
    if found[:1] == [200] or found[1:] not in ([], [200]):
        raise NotSurvived(f"the body was taken for a request: {found}")


async def pictures_at_once(target: Target, picture: bytes, media_type: str) -> None:
    sent = [target.request(picture, media_type)]
    for received in await asyncio.gather(*(exchange(target, sent) for _ in range(PICTURES))):
        check(received, REFUSED | {200})


async def webp(target: Target) -> None:
    """Eight tiny lossless WebPs of 8000 x 6000 pixels at a time."""
    await pictures_at_once(target, webp_of_one_colour(8000, 6000), "image/webp")


async def jpeg_scans(target: Target) -> None:
    """Eight JPEGs of 100 scans at a time."""
    await pictures_at_once(target, jpeg_of_scans(4000, 3000, 100), "image/jpeg")


async def slow_readers(target: Target) -> None:
    """Answers of tens of megabytes, of which a few KB are read now and then."""
    fields = asked([photograph("rocket.jpg")] * 12, target_classes=[0, 1, 2], format="npy")
    request = target.request(json.dumps(fields).encode(), "application/json")

    async def read_slowly() -> bytes:
        async with target.connected() as (reader, writer):
            received = b""
            with suppress(ConnectionError, TimeoutError):
                writer.write(request)
                await writer.drain()
                async with asyncio.timeout(READ_S):
                    while data := await reader.read(READ_BYTES):
                        received = received or data
                        await asyncio.sleep(READ_EVERY_S)
            return received

    for received in await asyncio.gather(*(read_slowly() for _ in range(READERS))):
        check(received[:16], REFUSED | {200})


async def small_values(target: Target) -> None:
    """JSON of a hundred thousand small values."""
    body = b'{"images": ["AAAA"], "gen_params": {"a": [' + b"0," * VALUES + b"0]}}"
    for _ in range(4):
        check(await exchange(target, [target.request(body, "application/json")]), REFUSED)


async def idle_connections(target: Target) -> None:
    """Thousands of connections that send nothing for seconds."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    count = min(IDLERS, hard - 200)

    async def idle() -> None:
        with suppress(ConnectionError):  # refused at the door
            async with target.connected() as (reader, _writer):
                with suppress(TimeoutError):
                    async with asyncio.timeout(IDLE_S):
                        check(await reader.read(1000), REFUSED)

    try:
        await asyncio.gather(*(idle() for _ in range(count)))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# The quick ones first: a short soak comes to no others.
ATTACKS: dict[str, Attack] = {
    attack.__name__: attack
    for attack in (
        trailers,
        upgrade,
        small_values,
        pipelines,
        pipelines_behind_a_slow_post,
        webp,
        jpeg_scans,
        slow_readers,
        idle_connections,
    )
}
MIXED = tuple(name for name in ATTACKS if name != "idle_connections")
"""The attacks of a soak: those that leave its clients a connection."""


@contextmanager
def attacking(target: Target, names: Sequence[str], pause_s: float) -> Iterator[Report]:
    """Make the attacks in turn, one burst at a time, with pauses; the report is filled at the end."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_attack, args=(target, names, pause_s, there), daemon=True)
    process.start()
    there.close()
    here.recv()  # it attacks from now on
    report = Report()
    try:
        yield report
    finally:
        here.send(None)
        vars(report).update(vars(here.recv()))
        process.join()
        here.close()


def _attack(target: Target, names: Sequence[str], pause_s: float, parent: Connection) -> None:
    parent.send(None)
    parent.send(asyncio.run(_until_told(target, names, pause_s, parent)))


async def _until_told(target: Target, names: Sequence[str], pause_s: float, parent: Connection) -> Report:
    report = Report()
    attacks = asyncio.create_task(_in_turn(target, names, pause_s, report))
    told = asyncio.create_task(asyncio.to_thread(parent.recv))
    await asyncio.wait([attacks, told], return_when=asyncio.FIRST_COMPLETED)
    attacks.cancel()
    (ended,) = await asyncio.gather(attacks, return_exceptions=True)
    if isinstance(ended, Exception):
        report.failures.append(f"{type(ended).__name__} {ended}")
    with suppress(EOFError):  # the parent has died
        await told
    return report


async def _in_turn(target: Target, names: Sequence[str], pause_s: float, report: Report) -> None:
    for turn in range(2**31):
        name = names[turn % len(names)]
        try:
            await ATTACKS[name](target)
        except (NotSurvived, OSError) as failure:
            report.failures.append(f"{name}: {type(failure).__name__} {failure}")
        report.bursts[name] += 1
        await asyncio.sleep(pause_s)
