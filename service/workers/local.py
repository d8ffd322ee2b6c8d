"""Heatmaps of files without a server: one engine in this process, for the command line's `explain`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from service.errors import ModelFailed, ModelNotFound, nearest
from service.imaging.render import Encoding, Format
from service.models.repository import Entry, scan
from service.settings import Settings
from service.workers.compute import Device
from service.workers.devices import resolve
from service.workers.engine import Engine
from service.workers.loading import load_into
from service.workers.messages import ExplainRequest

ENCODINGS: dict[str, Encoding] = {".png": "png", ".webp": "webp", ".jpg": "jpeg", ".jpeg": "jpeg"}


def explain(pictures: list[Path], method: str, out: Path, models: Path | None, model_id: str | None) -> Iterator[str]:
    """Write one heatmap of each picture's top class, and yield a line on each.

    One picture goes to the file `out`, whose ending says the format (.npy: the floats); several, or any if `out` is
    a folder, go there as <name>.png. Raises ServiceError, or OSError where a file cannot be read or written.
    """
    settings = Settings(models=models)
    entry = _choose(scan(models), model_id)
    engine = Engine(Device(resolve(settings.device)[0], settings.streams), settings)
    try:
        info = load_into(engine, entry)
        if info.state != "ready":
            raise ModelFailed(f"Model {entry.id!r} could not be loaded: {info.reason}")
        for picture in pictures:
            file = out / f"{picture.stem}.png" if out.is_dir() or len(pictures) > 1 else out
            file.parent.mkdir(parents=True, exist_ok=True)
            yield _explain_file(engine, entry.id, method, picture, file)
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


def _explain_file(engine: Engine, model_id: str, method: str, picture: Path, file: Path) -> str:
    form: Format = "npy" if file.suffix == ".npy" else "overlay"
    request = ExplainRequest(
        model_id,
        pictures=(picture.read_bytes(),),
        target_classes=((),),
        methods=(method,),
        format=form,
        encoding=ENCODINGS.get(file.suffix.lower(), "png"),
        as_base64=False,
    )
    (heatmap,) = engine.explain(request).results[0].heatmaps
    file.write_bytes(heatmap.data)
    return f"{picture}: {heatmap.class_name} ({heatmap.confidence:.2f}) -> {file}"
