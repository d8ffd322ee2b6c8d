"""Draws `methods.webp`: one picture, a cat above a cup, and what every method says made the network see the cat.

Run in the repository: `.venv/bin/python docs/pictures/gallery.py`. It takes some minutes: RISE alone runs the network
4000 times.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterable
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from service.errors import MethodNotSupported
from service.explain.method import REGISTRY
from service.models.repository import scan
from service.settings import Settings
from service.workers.device import Device
from service.workers.engine import Engine
from service.workers.loading import load_into
from service.workers.messages import ExplainRequest

HERE = Path(__file__).parent
DATA = HERE.parent.parent / "tests" / "data"
SIDE, COLUMNS, CAPTION = 168, 6, 20
CAT = 285
RELU: dict[str, object] = {"use_conv_only": False}
PARAMS: dict[str, dict[str, object]] = {
    "cam": RELU,  # only pooling may come between its layer and the classifier
    "score_cam": RELU,  # before the ReLU the mean of all channels, which is nearly what it shows, is negative
    # A layer of 1280 channels, and n passes for each: with the defaults these two would take a quarter of an hour.
    "is_cam": {**RELU, "n": 2},
    "ss_cam": {**RELU, "n": 2},
}


def picture() -> Image.Image:
    """The cat above the cup, 448 x 448."""
    both = Image.new("RGB", (448, 448))
    for place, name in enumerate(("chelsea.png", "coffee.png")):
        both.paste(Image.open(DATA / name).convert("RGB").resize((448, 224)), (0, 224 * place))
    return both


def overlays(methods: Iterable[str]) -> dict[str, Image.Image]:
    """The overlay of each of the methods that can explain the embedded network."""
    file = io.BytesIO()
    picture().save(file, "PNG")
    engine = Engine(Device("cpu", None, 8), Settings())
    (entry,) = scan(None)
    load_into(engine, entry)
    found = {}
    for name in methods:
        request = ExplainRequest(
            entry.id, (file.getvalue(),), ((CAT,),), (name,), PARAMS.get(name, {}), as_base64=False
        )
        started = time.perf_counter()
        try:
            (heatmap,) = engine.explain(request).results[0].heatmaps
        except MethodNotSupported as error:
            print(error.detail)
            continue
        print(f"{name}: {time.perf_counter() - started:.1f} s, {heatmap.degenerate or 'fine'}")
        found[name] = Image.open(io.BytesIO(heatmap.data)).convert("RGB")
    engine.close()
    return found


def montage(pictures: dict[str, Image.Image]) -> Image.Image:
    """Pictures in rows, each above its caption."""
    rows = -(-len(pictures) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * SIDE, rows * (SIDE + CAPTION)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for place, (name, one) in enumerate(pictures.items()):
        left, top = place % COLUMNS * SIDE, place // COLUMNS * (SIDE + CAPTION)
        sheet.paste(one.resize((SIDE - 4, SIDE - 4)), (left + 2, top + 2))
        draw.text((left + 4, top + SIDE), name, fill="black", font=font)
    return sheet


if __name__ == "__main__":
    montage({"the picture": picture(), **overlays(sorted(REGISTRY))}).save(HERE / "methods.webp", quality=80)
