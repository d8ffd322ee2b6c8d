"""Heatmaps of files without a server: one engine in this process, for the command line's `explain`."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from service.errors import ModelFailed, ModelNotFound, ServiceError, nearest
from service.models.repository import Entry, scan
from service.settings import Settings
from service.workers.device import Device
from service.workers.devices import resolve
from service.workers.engine import Engine
from service.workers.loading import load_into
from service.workers.messages import ExplainRequest, Heatmap
from service.workers.plan import make_plan

logger = logging.getLogger(__name__)

MAX_NAME = 40

Outcome = list[str] | ServiceError | OSError


@dataclass(frozen=True)
class _Place:
    """Where heatmaps go, but never over one of the pictures."""

    out: Path
    ending: str
    pictures: frozenset[Path]

    def file(self, picture: Path, heatmap: Heatmap) -> Path:
        """The file of one heatmap. Raises FileExistsError."""
        name = re.sub(r"[^\w.-]+", "_", heatmap.class_name)[:MAX_NAME]
        clear = f"{picture.stem}-{heatmap.method}-{heatmap.class_id}-{name}{self.ending}"
        file = self.out / clear if self.ending else self.out
        if file.resolve() in self.pictures:
            raise FileExistsError(f"{file} is a picture, and a heatmap would be written over it; give another --out")
        return file


def explain(
    request: ExplainRequest, pictures: list[Path], out: Path, ending: str, models: Path | None, model_id: str | None
) -> Iterator[tuple[Path, Outcome]]:
    """Write the heatmaps of each picture, and yield it with a line on each heatmap, or with its error.

    `request` has the target classes of each picture, but neither pictures nor model. Heatmaps go to the folder `out`
    with this ending; where that is empty, `out` is the file. Raises ServiceError for what is wrong with all pictures.
    """
    settings = Settings(models=models)
    entry = _choose(scan(models), model_id)
    engine = Engine(Device(resolve(settings.device)[0], settings.streams, settings.max_batch), settings)
    try:
        info = load_into(engine, entry)
        if info.state != "ready":
            raise ModelFailed(f"Model {entry.id!r} could not be loaded: {info.reason}")
        make_plan(request, engine.models[entry.id])
        place = _Place(out, ending, frozenset(picture.resolve() for picture in pictures))
        for picture, targets in zip(pictures, request.target_classes, strict=True):
            own = replace(request, model_id=entry.id, target_classes=(targets,))
            yield picture, _outcome(engine, own, picture, place)
    finally:
        engine.close()


def _choose(entries: tuple[Entry, ...], model_id: str | None) -> Entry:
    ids = [entry.id for entry in entries]
    if model_id is None and len(entries) == 1:
        return entries[0]
    if model_id is None:
        raise ModelNotFound(f"There are several models; name one with --model: {', '.join(ids)}.")
    if model_id not in ids:
        raise ModelNotFound(f"There is no model {model_id!r}.{nearest(model_id, ids)}")
    return entries[ids.index(model_id)]


def _outcome(engine: Engine, request: ExplainRequest, picture: Path, place: _Place) -> Outcome:
    try:
        answer = engine.explain(replace(request, pictures=(picture.read_bytes(),)))
        heatmaps = answer.results[0].heatmaps
        lines = [_write(heatmap, picture, place.file(picture, heatmap)) for heatmap in heatmaps]
    except (ServiceError, OSError) as error:
        return error
    if answer.incomplete:
        logger.warning("%s: the map misses %.1f %% of the difference of the scores", picture, 100 * answer.incomplete)
    return lines


def _write(heatmap: Heatmap, picture: Path, file: Path) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(heatmap.data)
    return f"{picture}: {heatmap.method} of {heatmap.class_name} ({heatmap.confidence:.2f}) -> {file}"
