"""The colour maps that an answer may be painted in, as tables; painting is render's work."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from service.errors import InvalidRequest, echo, nearest

# Full names in the library cmap, which logs a warning for a short name that several collections bear.
_SOURCES = {
    "jet": "matlab:jet",
    "turbo": "google:turbo",
    "viridis": "bids:viridis",
    "plasma": "bids:plasma",
    "inferno": "bids:inferno",
    "magma": "bids:magma",
    "cividis": "cividis:cividis",
    "hot": "matlab:hot",
    "bone": "matlab:bone",
    "gray": "matlab:gray",
    "hsv": "matlab:hsv",
    "rainbow": "gnuplot:rainbow",
    "coolwarm": "matplotlib:coolwarm",
    "seismic": "matplotlib:seismic",
}
COLORMAPS: tuple[str, ...] = tuple(_SOURCES)


@functools.cache
def colour_table(name: str) -> NDArray[np.uint8]:
    """The colours of 0, 1/255, ... 1: read-only uint8 (256, 3). Raises InvalidRequest for a name not in COLORMAPS."""
    if name not in _SOURCES:
        raise InvalidRequest(
            f"There is no colormap {echo(name)}; there are {', '.join(COLORMAPS)}.{nearest(name, COLORMAPS)}"
        )
    import cmap  # here, because the server needs the names alone

    table: NDArray[np.uint8] = np.rint(cmap.Colormap(_SOURCES[name]).lut(256)[:, :3] * 255).astype(np.uint8)
    table.flags.writeable = False
    return table
