"""Heatmaps of files without a server: one engine in this process, for the command line's `explain`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from service.errors import ModelFailed, ModelNotFound, nearest
from service.imaging.render import Encoding, Format
from service.models.repository import Entry, scan
from service.settings import Settings
from service.workers.device import Device
from service.workers.devices import resolve
from service.workers.engine import Engine
from service.workers.loading import load_into
from service.workers.messages import ExplainRequest

logger = logging.getLogger(__name__)

ENCODINGS: dict[str, Encoding] = {".png": "png", ".webp": "webp", ".jpg": "jpeg", ".jpeg": "jpeg"}


def explain(pictures: list[Path], method: str, out: Path, models: Path | None, model_id: str | None) -> Iterator[str]:
    """Write one heatmap of each picture's top class, and yield a line on each.

    One picture goes to the file `out`, whose ending says the format (.npy: the floats); several, or any if `out` is
    a folder, go there as <name>.png. Raises ServiceError, or OSError where a file cannot be read or written.
    """
    files = _files(pictures, out)
    settings = Settings(models=models)
    entry = _choose(scan(models), model_id)
    engine = Engine(Device(resolve(settings.device)[0], settings.streams, settings.max_batch), settings)
    try:
        info = load_into(engine, entry)
        if info.state != "ready":
            raise ModelFailed(f"Model {entry.id!r} could not be loaded: {info.reason}")
        for picture, file in zip(pictures, files, strict=True):
            file.parent.mkdir(parents=True, exist_ok=True)
            yield _explain_file(engine, entry.id, method, picture, file)
    finally:
        engine.close()


def _files(pictures: list[Path], out: Path) -> list[Path]:
    """Where each heatmap goes, refused where one would be written over a picture or another heatmap."""
    if len(pictures) == 1 and not out.is_dir():
        if out.suffix.lower() not in {*ENCODINGS, ".npy"}:
            raise OSError(f"{out}: the ending says the format: {', '.join(ENCODINGS)} or .npy")
        files = [out]
    else:
        files = [out / f"{picture.stem}.png" for picture in pictures]
    taken = {picture.resolve() for picture in pictures}
    for file in files:
        if file.resolve() in taken:
            raise FileExistsError(f"{file} would be written over a picture or another heatmap; name another folder")
        taken.add(file.resolve())
    return files


def _choose(entries: tuple[Entry, ...], model_id: str | None) -> Entry:
    ids = [entry.id for entry in entries]
    if model_id is None and len(entries) == 1:
        return entries[0]
    if model_id is None:
        raise ModelNotFound(f"There are several models; name one with --model: {', '.join(ids)}.")
    if model_id not in ids:
        raise ModelNotFound(f"There is no model {model_id!r}.{nearest(model_id, ids)}")
    return entries[ids.index(model_id)]


def _explain_file(engine: Engine, model_id: str, method: str, picture: Path, file: Path) -> str:
    form: Format = "npy" if file.suffix.lower() == ".npy" else "overlay"
    request = ExplainRequest(
        model_id,
        pictures=(picture.read_bytes(),),
        target_classes=((),),
        methods=(method,),
        format=form,
        encoding=ENCODINGS.get(file.suffix.lower(), "png"),
        as_base64=False,
    )
    answer = engine.explain(request)
    if answer.incomplete:
        logger.warning("%s: the map misses %.1f %% of the difference of the scores", picture, 100 * answer.incomplete)
    (heatmap,) = answer.results[0].heatmaps
    file.write_bytes(heatmap.data)
    return f"{picture}: {heatmap.class_name} ({heatmap.confidence:.2f}) -> {file}"
