"""What a worker's process goes on without."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from service.settings import Settings
from service.workers import child


@pytest.mark.parametrize(
    ("cache", "folder", "reason"),
    [
        ("cache", None, "there is no temporary folder"),
        ("file/cache", "temporary", "Not a directory"),
        ("~nobody-of-this-name/cache", "temporary", "home directory"),
    ],
)
def test_without_a_place_for_heads_models_are_served_eagerly_and_that_is_said_once(
    cache: str, folder: str | None, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    place = Path(cache) if cache.startswith("~") else tmp_path / cache
    made = child._compiler(
        cast(Any, None), Settings(cache=place), tmp_path / folder if folder else None, cast(Any, None)
    )
    assert made is None
    (record,) = caplog.records
    assert record.getMessage().startswith("no head is compiled, models are served eagerly: ")
    assert reason in record.getMessage()
