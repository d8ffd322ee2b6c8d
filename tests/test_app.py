"""The composition root: what it does once, when the server starts."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path

from service.app import create_app
from service.settings import Settings


def test_the_garbage_collector_passes_over_what_was_imported(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()

    async def frozen() -> int:
        app = create_app(Settings(models=tmp_path, device="cpu"))
        async with app.router.lifespan_context(app):
            return gc.get_freeze_count()

    before = gc.get_freeze_count()
    try:
        assert asyncio.run(frozen()) > before + 10_000
    finally:
        gc.unfreeze()
