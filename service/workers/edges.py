"""What is done to one picture before and after the device: decoding and rendering."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pybase64 import b64encode

from service.errors import FieldError, PictureTooSlow, ServiceError
from service.imaging.decode import Opened, decode_base64, open_picture
from service.imaging.geometry import Geometry, fit_picture, place
from service.imaging.maps import degeneracy
from service.imaging.render import Style, render
from service.models.resident import Model
from service.settings import Settings
from service.workers.compute import Explained, RawMap
from service.workers.messages import ClassScore, ExplainRequest, Heatmap, PictureResult

RENDER_NS = 45.0
"""Nanoseconds per pixel of an overlay as PNG, which takes longest."""


@dataclass(frozen=True)
class Picture:
    """A decoded picture: `fitted`, uint8 (H,W,3), is what the network sees, `under` what the heatmaps lie over."""

    width: int
    height: int
    geometry: Geometry
    fitted: NDArray[np.uint8]
    under: Image.Image | NDArray[np.uint8]


def look_at(index: int, request: ExplainRequest, settings: Settings) -> Opened:
    """Read the headers of a request's picture. Raises the ServiceError that names the picture."""
    data = request.pictures[index]
    with _naming(index):
        opened = open_picture(decode_base64(data) if isinstance(data, str) else data, settings.max_pixels)
        if opened.seconds > settings.max_decode_s:
            raise PictureTooSlow(
                f"By its header it takes about {opened.seconds:.1f} seconds to decode; "
                f"the limit is {settings.max_decode_s:g}. Send it in fewer pixels or scans."
            )
    return opened


def decode_picture(index: int, opened: Opened, model: Model, request: ExplainRequest) -> Picture:
    """Decode a request's picture and fit it to the network. Raises the ServiceError that names the picture."""
    with _naming(index):
        upright = opened.decode()
    fitted = fit_picture(upright, model.fit)
    under = upright if request.methods and request.size == "original" else fitted
    return Picture(upright.width, upright.height, place(upright.width, upright.height, model.fit), fitted, under)


@contextmanager
def _naming(index: int) -> Iterator[None]:
    try:
        yield
    except ServiceError as error:
        detail = f"Picture {index}: {error.detail}"
        raise type(error)(detail, errors=(FieldError(f"/images/{index}", detail),)) from None


def render_seconds(picture: Picture, heatmaps: int, request: ExplainRequest) -> float:
    """The seconds of one core that rendering takes at most. Measured on an AMD EPYC of family 26."""
    pixels = picture.width * picture.height if request.size == "original" else picture.fitted.size // 3
    return heatmaps * pixels * RENDER_NS / 1e9


def render_picture(
    index: int,
    picture: Picture,
    model: Model,
    explained: Explained,
    request: ExplainRequest,
    check: Callable[[], None],
) -> PictureResult:
    """What the answer says of a picture. `check` is called before each heatmap and may raise."""
    confidences = explained.confidences
    order = np.argsort(-confidences, kind="stable")[: request.top_k or None].tolist()
    classes = tuple(ClassScore(best, model.labels[best], float(confidences[best])) for best in order)
    heatmaps = []
    for raw in explained.maps:
        check()
        heatmaps.append(_heatmap(raw, picture, model, explained, request))
    return PictureResult(index, picture.width, picture.height, classes, tuple(heatmaps))


def _heatmap(raw: RawMap, picture: Picture, model: Model, explained: Explained, request: ExplainRequest) -> Heatmap:
    scaling = getattr(raw.task.params, "scaling", None)
    style = Style(request.format, request.encoding, request.size, request.colormap, request.alpha)
    rendered = render(raw.values, picture.geometry, picture.under, scaling, style, raw.rounding_error)
    return Heatmap(
        method=raw.task.method.name,
        channels=raw.task.method.channels,
        class_id=raw.class_id,
        class_name=model.labels[raw.class_id],
        confidence=float(explained.confidences[raw.class_id]),
        gen_params=raw.task.effective,
        precision=explained.precision,
        value_range=(float(raw.values.min()), float(raw.values.max())),
        rounding_error=raw.rounding_error,
        completeness_error=raw.completeness_error,
        degenerate=degeneracy(raw.values, raw.rounding_error),
        format=request.format,
        media_type=rendered.media_type,
        width=rendered.width,
        height=rendered.height,
        data=b64encode(rendered.data) if request.as_base64 else rendered.data,
    )
