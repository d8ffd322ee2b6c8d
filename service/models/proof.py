"""What must be true of a captured network before it serves; shown once, and kept beside the captured program."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import astuple
from pathlib import Path

from service.models import kept
from service.models.grids import Grid
from service.models.isolation import check_isolation
from service.models.layers import LayerTable
from service.models.program import Program


def proven_layers(program: Program, file: Path | None = None) -> LayerTable:
    """The layers of a network whose pictures do not change one another's scores, each shown to be a picture or not.

    The proof is kept in `file`, or taken from it if it is there. Raises ModelLoadError where pictures mix.
    """
    if file is not None and (known := kept.read(file)) is not None:
        return LayerTable(program, _from_json(known))
    check_isolation(program)
    layers = LayerTable(program)
    if file is not None:
        try:
            kept.write(file, _as_json(layers.places))
        except OSError as error:
            kept.say_not_kept(f"{file.parent}: {error.strerror or error}")
    return layers


def _as_json(places: Mapping[str, Grid | str]) -> bytes:
    return json.dumps(
        {name: grid if isinstance(grid, str) else astuple(grid) for name, grid in places.items()}
    ).encode()


def _from_json(data: bytes) -> dict[str, Grid | str]:
    return {name: grid if isinstance(grid, str) else Grid(*grid) for name, grid in json.loads(data).items()}
