"""From checked fields and pictures to the message that the dispatcher takes."""

from __future__ import annotations

from service.api.encodings import Payload
from service.api.fields import wrong
from service.api.negotiation import JSON, Choice, top_k
from service.api.schemas import HeatmapFields, InferFields
from service.workers.messages import ClassRef, ExplainRequest

Targets = tuple[tuple[ClassRef, ...], ...]


def targets_of(payload: Payload[HeatmapFields]) -> Targets:
    """The target classes of each picture. Raises InvalidRequest where lists and pictures differ in number."""
    pictures, targets = len(payload.pictures), payload.fields.target_classes
    per_picture: list[tuple[ClassRef, ...]] = [tuple(entry) for entry in targets if isinstance(entry, list)]
    if not per_picture:
        return (tuple(entry for entry in targets if not isinstance(entry, list)),) * pictures
    if len(per_picture) != pictures:
        raise wrong(
            "/target_classes", f"There are {len(per_picture)} lists for {pictures} pictures; give one for each."
        )
    return tuple(per_picture)


def count_heatmaps(fields: HeatmapFields, targets: Targets) -> int:
    """How many heatmaps are asked for; a picture without targets has its most confident class."""
    return len(fields.method) * sum(max(1, len(entry)) for entry in targets)


def heatmap_request(model_id: str, payload: Payload[HeatmapFields], targets: Targets, choice: Choice) -> ExplainRequest:
    """The work that `POST /models/{id}/heatmap` asks for."""
    fields = payload.fields
    return ExplainRequest(
        model_id=model_id,
        pictures=payload.pictures,
        target_classes=targets,
        methods=tuple(fields.method),
        gen_params=fields.gen_params,
        top_k=top_k(fields),
        format=choice.format,
        encoding=choice.encoding,
        size=fields.size,
        colormap=fields.colormap,
        alpha=fields.alpha,
        as_base64=choice.media_type == JSON,
        priority=fields.priority,
    )


def infer_request(model_id: str, payload: Payload[InferFields]) -> ExplainRequest:
    """The work that `POST /models/{id}/infer` asks for."""
    return ExplainRequest(
        model_id=model_id,
        pictures=payload.pictures,
        target_classes=((),) * len(payload.pictures),
        top_k=top_k(payload.fields),
        priority=payload.fields.priority,
    )
