"""What happens to the server during a soak: its busiest worker is killed again and again, and models are reloaded."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress

import httpx
import psutil

from tests.server import Server
from tests.soak.cases import Case
from tests.soak.traffic import Clients, connected

CANARY_S = 0.05
RELOAD_EVERY_S = 20.0


async def kill_workers(server: Server, every_s: float, until: float, kills: list[float]) -> None:
    """SIGKILL the worker that has worked most; `kills` gets the moments. None comes so late that nothing follows it."""
    while time.monotonic() + 2 * every_s <= until:
        await asyncio.sleep(every_s)
        kills.append(await asyncio.to_thread(_kill_busiest, server))


def _kill_busiest(server: Server) -> float:
    workers = server.workers()
    if workers:
        with suppress(psutil.Error):
            max(workers, key=_worked).kill()
    return time.monotonic()


def _worked(process: psutil.Process) -> float:
    with suppress(psutil.Error):
        times = process.cpu_times()
        return float(times.user + times.system)
    return 0.0


async def ask_after_kills(url: str, clients: Clients, case: Case, kills: Sequence[float]) -> None:
    """After each kill send `case` until it is answered with 200: who obeys Retry-After learns of it late."""
    answered = 0
    async with connected(url) as http:
        while True:
            if (latest := len(kills)) > answered and (await clients.ask(http, case, "canary"))[0] == 200:
                answered = latest
            await asyncio.sleep(CANARY_S)


async def reload_models(url: str, key: str, models: Sequence[str], answers: Counter[int]) -> None:
    """Load each model anew, in turn, until cancelled; `answers` counts the statuses."""
    headers = {"Authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(base_url=url, timeout=60, headers=headers) as http:
        for turn in range(2**31):
            await asyncio.sleep(RELOAD_EVERY_S)
            response = await http.post(f"/models/{models[turn % len(models)]}/load")
            answers[response.status_code] += 1
