"""The composition root: wires settings, workers, queue and HTTP together and runs them; nothing else knows them all."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import logging
import math
import os
import resource
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import FrameType

import uvicorn
from fastapi import FastAPI

from service import __version__
from service.api import MAX_FILES, RESERVE, bounded_connection, mount
from service.dispatch.dispatcher import Dispatcher
from service.keys import KeyFile
from service.models.repository import scan
from service.settings import Settings
from service.workers.devices import resolve
from service.workers.pool import Pool

logger = logging.getLogger(__name__)

CLOSE_S = 5
OWN_FILES = 128 + MAX_FILES
"""Files that the server has open beside connections: answers, pipes to workers, logs, what a library opens for a
moment."""
M_MMAP_THRESHOLD = -3
"""Of glibc's `mallopt`."""
SAME_SIGNAL_S = 1.0
"""A process gets a signal twice that is sent to its group and passed on by its parent, as `make` does."""


def create_app(settings: Settings) -> FastAPI:
    """The application; its workers start and stop with its lifespan.

    Raises SettingsError for a bad repository or file of keys.
    """
    key_file = KeyFile(settings.api_keys_file) if settings.api_keys_file else None
    pool = Pool(settings, scan(settings.models))
    dispatcher = Dispatcher(settings, pool)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        await pool.start(await asyncio.to_thread(resolve, settings.device), dispatcher)
        gc.freeze()  # else a request of many lists has all that was imported looked through: 0.2 s of the event loop
        following = asyncio.create_task(key_file.follow()) if key_file else None
        try:
            yield
        finally:
            if following:
                following.cancel()
            await pool.stop(CLOSE_S)

    app = FastAPI(
        title="Heatmap Service",
        version=__version__,
        summary="Class confidences and heatmaps of image classifiers",
        license_info={"name": "Apache License 2.0", "identifier": "Apache-2.0"},
        servers=[{"url": ".", "description": "The server that this document comes from"}],
        lifespan=lifespan,
        docs_url=None,  # the API has a page of its own
        redoc_url=None,
    )
    app.state.dispatcher = dispatcher
    app.state.pool = pool
    mount(app, dispatcher, settings, key_file)
    return app


def with_room_for_connections(settings: Settings) -> Settings:
    """The settings with as many connections as the process may have files open, after raising that limit if need be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = settings.max_connections + RESERVE + OWN_FILES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return settings
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed == needed:
        return settings
    connections = max(1, allowed - RESERVE - OWN_FILES)
    logger.warning(
        "The process may open %d files: it serves %d connections instead of %d.",
        allowed,
        connections,
        settings.max_connections,
    )
    return settings.model_copy(update={"max_connections": connections})


def return_freed_memory() -> None:
    """Have glibc return blocks of 128 KiB and more when they are freed.

    Else it keeps blocks as large as any that it has freed before, up to 32 MiB, and the process stays as large.
    """
    with contextlib.suppress(AttributeError):  # of another C library
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 128 * 1024)


class Server(uvicorn.Server):
    """Leaves in named steps: the first signal refuses new work and drains, then closes; the second ends all at once."""

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        config = uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            http=bounded_connection(with_room_for_connections(settings)),
            ws="none",
            log_level=settings.log_level,
            log_config=None,
            access_log=False,  # the API logs its requests itself
            timeout_graceful_shutdown=max(CLOSE_S, math.ceil(settings.grace_s)),
        )
        super().__init__(config)
        self._dispatcher: Dispatcher = app.state.dispatcher
        self._grace_s = settings.grace_s
        self._needs_key = settings.api_keys_file is not None
        self._background: list[asyncio.Future[None]] = []
        self._pool: Pool = app.state.pool
        self._leaving_since: float | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def main_loop(self) -> None:
        """Serve until it is time to close."""
        self._loop = asyncio.get_running_loop()
        self._background.append(asyncio.ensure_future(self._announce()))
        await super().main_loop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """SIGTERM and SIGINT. The signal is not raised again after a drain: the server leaves with status 0.

        The second one waits for nothing, whatever step the server is in: start, drain, close or stop of the workers.
        Within SAME_SIGNAL_S it counts as the first one.
        """
        now = time.monotonic()
        if self._leaving_since is not None:
            if now - self._leaving_since < SAME_SIGNAL_S:
                return
            try:
                self._pool.kill()
            finally:
                os._exit(128 + sig)
        self._leaving_since = now
        if self._loop is None:  # it is still starting
            super().handle_exit(sig, frame)
            return
        self._loop.call_soon_threadsafe(lambda: self._background.append(asyncio.ensure_future(self._drain())))

    async def _announce(self) -> None:
        await self._dispatcher.first_ready()
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        host = "127.0.0.1" if host == "0.0.0.0" else f"[{host}]" if ":" in host else host  # noqa: S104
        model = next((info.id for info in self._dispatcher.models().values() if info.state == "ready"), "<id>")
        logger.info(
            "Ready. Try:\n\n  curl%s -H 'Accept: image/png' -F image=@tests/data/chelsea.png "
            "http://%s:%d/models/%s/heatmap -o heatmap.png\n",
            " -H 'X-API-Key: <key>'" if self._needs_key else "",
            host,
            port,
            model,
        )

    async def _drain(self) -> None:
        try:
            await self._dispatcher.drain(self._grace_s)
        finally:
            self.should_exit = True
