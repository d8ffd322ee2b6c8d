"""What the command line's `explain` asks of files, read and checked as the fields of a form are."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from service.api.encodings import Payload
from service.api.fields import from_text, validate
from service.api.negotiation import NPY, SINGLE, Choice, choose
from service.api.requests import Targets, count_heatmaps, heatmap_request, targets_of
from service.api.schemas import HeatmapFields
from service.errors import NotAcceptable
from service.settings import SettingsError
from service.workers.messages import ExplainRequest

PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
MEDIA_TYPES = {
    ".png": "image/png",
    ".webp": "image/webp",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".npy": NPY,
}
ENDINGS = {media_type: ending for ending, media_type in reversed(MEDIA_TYPES.items())}


def find_pictures(paths: Iterable[Path]) -> list[Path]:
    """The files among the paths, and the pictures in the folders among them.

    Raises SettingsError for a folder without any, and for pictures whose heatmaps would have the same names.
    """
    found: dict[str, Path] = {}
    for path in paths:
        pictures = _in_folder(path) if path.is_dir() else [path]
        for picture in pictures:
            other = found.setdefault(picture.stem.casefold(), picture)
            if other is not picture:
                raise SettingsError(
                    f"{other} and {picture}: their heatmaps would have the same names; run one after the other, "
                    f"with another folder for --out"
                )
    return list(found.values())


def read_request(texts: Iterable[tuple[str, str]], out: Path, pictures: int) -> tuple[ExplainRequest, str]:
    """The request for so many pictures, without them and the model's id; and the ending of the files in the folder
    `out`, empty where `out` is the only file.

    Raises InvalidRequest as the API does, and SettingsError where `out` does not suit the request.
    """
    fields = validate(HeatmapFields, from_text(texts))
    payload = Payload(fields, pictures=("",) * pictures, size_bytes=0)
    targets = targets_of(payload)
    if out.is_dir() or not out.suffix:
        choice = choose(", ".join(SINGLE), fields, 1)
        return heatmap_request("", payload, targets, choice), ENDINGS[choice.media_type]
    return heatmap_request("", payload, targets, _choice_of_file(out, fields, targets)), ""


def _in_folder(folder: Path) -> list[Path]:
    pictures = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES)
    if not pictures:
        raise SettingsError(f"{folder} has no picture in it, a file that ends in {', '.join(PICTURES)}")
    return pictures


def _choice_of_file(out: Path, fields: HeatmapFields, targets: Targets) -> Choice:
    """The format that the ending says."""
    media_type = MEDIA_TYPES.get(out.suffix.lower())
    if media_type is None:
        raise SettingsError(
            f"--out: {out} ends in none of {', '.join(MEDIA_TYPES)}; a folder has no ending, or is there already"
        )
    heatmaps = count_heatmaps(fields, targets)
    if heatmaps > 1:
        raise SettingsError(f"--out: {out} holds one heatmap, and {heatmaps} are asked for; name a folder")
    try:
        return choose(media_type, fields, heatmaps)
    except NotAcceptable:
        raise SettingsError(f"--out: {out} would be {media_type}, and --format or --encoding say otherwise") from None
