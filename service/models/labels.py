"""The names of a model's classes, in the order of its scores. Names are not made unique or safe for headers here."""

from __future__ import annotations

from pathlib import Path

from service.errors import ModelLoadError, nearest
from service.models.spec import ID_PLACE, IMAGENET_LABELS, ModelSpec, file_in


def read_labels(spec: ModelSpec, folder: Path, num_classes: int) -> tuple[str, ...]:
    """One name per class: from the template, torchvision's ImageNet-1k, or a UTF-8 file with a name per line.

    Raises ModelLoadError where the file is missing or unreadable, or where the count is not `num_classes`.
    """
    if ID_PLACE in spec.labels:
        return tuple(spec.labels.replace(ID_PLACE, str(number)) for number in range(num_classes))
    names = _imagenet() if spec.labels == IMAGENET_LABELS else _lines(folder, spec.labels)
    if len(names) != num_classes:
        raise ModelLoadError(f"labels: {spec.labels!r} has {len(names)} names, the network {num_classes} classes")
    return names


def _imagenet() -> tuple[str, ...]:
    # Imported here, since torchvision brings torch and most label sets need neither.
    from torchvision.models import ResNet50_Weights

    return tuple(ResNet50_Weights.DEFAULT.meta["categories"])


def _lines(folder: Path, name: str) -> tuple[str, ...]:
    try:
        path = file_in(folder, name, "labels")
    except ModelLoadError as error:
        raise ModelLoadError(f"{error}.{nearest(name, [IMAGENET_LABELS])}") from None
    try:
        # utf-8-sig drops the mark that some editors put first; not str.splitlines, which also ends lines inside names.
        with path.open(encoding="utf-8-sig") as lines:
            return tuple(line.removesuffix("\n") for line in lines)
    except (OSError, UnicodeDecodeError) as error:
        raise ModelLoadError(f"labels: {name!r} cannot be read: {error}") from None
