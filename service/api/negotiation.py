"""Which media type answers a request, decided from Accept and the fields before any work is done."""

from __future__ import annotations

from dataclasses import dataclass

from service.api.schemas import HeatmapFields, InferFields
from service.errors import MAX_ECHO, NotAcceptable
from service.imaging.render import Encoding, Format

JSON = "application/json"
NPY = "application/x-npy"
ENCODINGS: dict[str, Encoding] = {"image/png": "png", "image/webp": "webp", "image/jpeg": "jpeg"}
SINGLE = (*ENCODINGS, NPY)
MAX_RANGES = 100  # a header of 64 KB may have thousands, each compared with each offer
GREY: tuple[Format, ...] = ("gray", "gray16")


@dataclass(frozen=True)
class Choice:
    """The media type of the answer and the heatmaps' format that it implies."""

    media_type: str
    format: Format
    encoding: Encoding


def acceptable(accept: str | None, offers: tuple[str, ...]) -> list[str]:
    """The offers that an Accept header takes, the most wanted first, equals in the order of `offers`.

    The most specific range that matches an offer decides its quality (RFC 9110, 12.5.1); no header takes all.
    """
    ranges = [_range(part) for part in (accept or "").split(",", MAX_RANGES)[:MAX_RANGES] if part.strip()] or [
        ("*/*", 1.0)
    ]
    quality = {offer: _quality(offer, ranges) for offer in offers}
    return sorted((offer for offer in offers if quality[offer] > 0), key=lambda offer: -quality[offer])


def choose_json(accept: str | None) -> None:
    """For answers that are JSON alone. Raises NotAcceptable where Accept excludes it."""
    if not acceptable(accept, (JSON,)):
        raise NotAcceptable(f"The answer is {JSON}, which Accept: {(accept or '')[:MAX_ECHO]} excludes.")


def choose(accept: str | None, fields: HeatmapFields, heatmaps: int) -> Choice:
    """How to answer a request for so many heatmaps. Raises NotAcceptable, which says what stands against it."""
    wanted = acceptable(accept, (JSON, *SINGLE))
    if not wanted:
        raise NotAcceptable(f"Accept: {(accept or '')[:MAX_ECHO]} takes none of {JSON}, {', '.join(SINGLE)}.")
    conflicts = [_conflict(media_type, fields, heatmaps) for media_type in wanted]
    for media_type, conflict in zip(wanted, conflicts, strict=True):
        if conflict is None:
            return _choice(media_type, fields)
    raise NotAcceptable(str(conflicts[0]))


def _conflict(media_type: str, fields: HeatmapFields, heatmaps: int) -> str | None:
    if media_type == JSON:
        return None
    if heatmaps > 1:
        return f"{media_type} holds one heatmap and the request asks for {heatmaps}; accept {JSON}."
    if fields.result_format == "dl_result":
        return f"dl_result is answered as {JSON} alone, not as {media_type}."
    fitting = _media_type(fields, media_type)
    if fitting != media_type:
        return f"Accept asks for {media_type}, but the given format and encoding make {fitting}."
    return None


def _media_type(fields: HeatmapFields, wanted: str) -> str:
    """The media type that the given fields lead to; what isn't given follows `wanted`."""
    given = fields.model_fields_set
    image = wanted in ENCODINGS
    if fields.format == "npy" or ("format" not in given and not image):
        return NPY
    if fields.format in GREY:
        return "image/png"
    return f"image/{fields.encoding}" if "encoding" in given or not image else wanted


def _choice(media_type: str, fields: HeatmapFields) -> Choice:
    if media_type == NPY or (fields.result_format == "dl_result" and "format" not in fields.model_fields_set):
        return Choice(media_type, "npy", fields.encoding)
    return Choice(media_type, fields.format, ENCODINGS.get(media_type, fields.encoding))


def top_k(fields: InferFields) -> int:
    """HALCON's result lists all classes unless the client says otherwise."""
    return 0 if fields.result_format == "dl_result" and "top_k" not in fields.model_fields_set else fields.top_k


def _range(text: str) -> tuple[str, float]:
    media_range, *parameters = (part.strip().lower() for part in text.split(";"))
    return media_range, next((_weight(p[2:]) for p in parameters if p.startswith("q=")), 1.0)


def _weight(text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        return 1.0
    return weight if 0 <= weight <= 1 else 1.0


def _quality(offer: str, ranges: list[tuple[str, float]]) -> float:
    for pattern in (offer, offer.partition("/")[0] + "/*", "*/*"):
        matching = [quality for media_range, quality in ranges if media_range == pattern]
        if matching:
            return max(matching)
    return 0.0
