"""A light client, since it shares the servers' cores: HTTP/1.1 on connections that are kept, a form per picture."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass

BOUNDARY = "heatmap-benchmarks"
PART = (
    f"--{BOUNDARY}\r\n"
    'Content-Disposition: form-data; name="image"; filename="picture.jpg"\r\n'
    "Content-Type: image/jpeg\r\n\r\n"
).encode()
END = f"\r\n--{BOUNDARY}--\r\n".encode()


@dataclass(frozen=True)
class Round:
    """What a round saw: answers per second from the first question to the last answer, and each one's seconds."""

    rate: float
    latencies: list[float]


class Connection:
    """One connection to a server on this machine."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def __aenter__(self) -> Connection:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()
        await self._writer.wait_closed()

    async def get(self, path: str) -> bytes:
        return await self._ask(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())

    async def post(self, path: str, picture: bytes) -> bytes:
        """The answer's body. Raises RuntimeError for any status but 200."""
        body = PART + picture + END
        head = (
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
            f"Content-Type: multipart/form-data; boundary={BOUNDARY}\r\n\r\n"
        )
        return await self._ask(head.encode() + body)

    async def _ask(self, request: bytes) -> bytes:
        self._writer.write(request)
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.strip().splitlines()
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        body = await self._reader.readexactly(int(headers["content-length"]))
        if first.split()[1] != "200":
            raise RuntimeError(f"{first}: {body[:500].decode(errors='replace')}")
        return body


async def load(port: int, path: str, pictures: list[bytes], clients: int, seconds: float) -> Round:
    """Clients that ask one picture after the other until the time or the pictures are used up."""
    left = iter(pictures)
    latencies: list[float] = []
    started = time.perf_counter()
    until = started + seconds
    await asyncio.gather(*(_client(port, path, left, until, latencies) for _ in range(clients)))
    return Round(len(latencies) / (time.perf_counter() - started), latencies)


async def _client(port: int, path: str, pictures: Iterator[bytes], until: float, latencies: list[float]) -> None:
    async with Connection(port) as connection:
        while (asked := time.perf_counter()) < until and (picture := next(pictures, None)):
            await connection.post(path, picture)
            latencies.append(time.perf_counter() - asked)
