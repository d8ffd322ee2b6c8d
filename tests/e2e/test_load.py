"""Sixteen clients at once: each gets what it would get alone, and the event loop never stalls."""

from __future__ import annotations

import asyncio
import io
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from service.app import Server as Service
from service.app import create_app
from service.settings import Settings
from tests.server import Server

pytestmark = pytest.mark.alone

CLIENTS = 16
MAX_STALL_S = 0.5  # ten times the 50 ms that the service is meant to keep

LOAD = """
import sys, httpx
from concurrent.futures import ThreadPoolExecutor
url, picture = sys.argv[1], open(sys.argv[2], "rb").read()
def post(number):
    with httpx.Client(base_url=url, timeout=60) as client:
        for turn in range(4):
            form = {"target_classes": [str(number), str(number + 20)], "format": ["overlay", "npy"][turn % 2]}
            client.post("/models/efficientnet_lite0/heatmap", files={"image": picture}, data=form).raise_for_status()
with ThreadPoolExecutor(16) as pool:
    list(pool.map(post, range(16)))
"""


def variants(picture: bytes) -> list[bytes]:
    """Sixteen different pictures of different sizes."""
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    files = []
    for number in range(CLIENTS):
        file = io.BytesIO()
        image.rotate(7 * number).resize((200 + 16 * number, 300)).save(file, "PNG")
        files.append(file.getvalue())
    return files


def raw_map(client: httpx.Client, picture: bytes, class_id: int) -> NDArray[np.float32]:
    response = client.post(
        "/models/efficientnet_lite0/heatmap",
        files={"image": picture},
        data={"target_classes": str(class_id), "gen_params": '{"scaling": "none"}', "size": "model"},
        headers={"Accept": "application/x-npy"},
    )
    assert response.status_code == 200, response.text
    values: NDArray[np.float32] = np.load(io.BytesIO(response.content))
    return values


def test_sixteen_clients_get_what_they_would_get_alone(server: Server, chelsea: bytes) -> None:
    pictures = variants(chelsea)
    classes = [280 + number for number in range(CLIENTS)]
    with server.client() as client:
        alone = [raw_map(client, *pair) for pair in zip(pictures, classes, strict=True)]
        with ThreadPoolExecutor(CLIENTS) as pool:
            together = list(pool.map(lambda pair: raw_map(client, *pair), zip(pictures, classes, strict=True)))
    for one, other in zip(alone, together, strict=True):
        assert np.abs(one).max() > 0
        assert np.abs(one - other).max() <= 1e-4 * np.abs(one).max()


def test_the_event_loop_does_not_stall_under_sixteen_clients(repository: Path, tmp_path: Path) -> None:
    picture = Path(__file__).parent.parent / "data" / "chelsea.png"

    async def longest_stall() -> float:
        settings = Settings(models=repository, port=0, device="cpu", compiled_heads=0)
        app = create_app(settings)
        service = Service(app, settings)
        serving = asyncio.create_task(service.serve())
        await app.state.dispatcher.first_ready()
        port = service.servers[0].sockets[0].getsockname()[1]
        load = await asyncio.create_subprocess_exec(
            sys.executable, "-c", LOAD, f"http://127.0.0.1:{port}", str(picture), stderr=subprocess.PIPE
        )
        finished = asyncio.create_task(load.communicate())
        stall = await tick_until(finished)
        assert load.returncode == 0, (await finished)[1].decode()
        service.should_exit = True
        await serving
        return stall

    stall = asyncio.run(longest_stall())
    print(f"longest stall of the event loop: {1000 * stall:.1f} ms")
    assert stall < MAX_STALL_S


async def tick_until(finished: asyncio.Task[tuple[bytes, bytes]]) -> float:
    """The longest time by which a tick of 1 ms came too late, in seconds."""
    loop = asyncio.get_running_loop()
    longest = 0.0
    while not finished.done():
        before = loop.time()
        await asyncio.sleep(0.001)
        longest = max(longest, loop.time() - before - 0.001)
    return longest
