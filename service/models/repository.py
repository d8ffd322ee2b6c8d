"""Which models there are: one folder each. What is in a folder is for the spec and the loading to say."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from service.models.spec import FILE_NAME
from service.settings import SettingsError

EMBEDDED = Path(__file__).with_name("embedded")

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Entry:
    """A model that is offered; its folder may still turn out not to be loadable."""

    id: str
    folder: Path


def scan(models: Path | None) -> tuple[Entry, ...]:
    """The models of a repository by id, or the embedded default where no repository is given.

    A folder whose name is no model id (a hidden one, say) is none; neither is a file. Raises SettingsError where
    `models` is no folder that can be listed, or has no model's folder in it.
    """
    root = EMBEDDED if models is None else models
    try:
        folders = [path for path in root.iterdir() if _ID.fullmatch(path.name) and path.is_dir()]
    except OSError as error:
        raise SettingsError(f"--models: {root} cannot be listed: {error.strerror}") from None
    if not folders:
        hint = "; it is a model's folder itself: give the one above it" if (root / FILE_NAME).is_file() else ""
        raise SettingsError(f"--models: {root} has no folder that could be a model{hint}")
    return tuple(Entry(path.name, path) for path in sorted(folders))
