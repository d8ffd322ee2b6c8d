"""Which layers are pictures, shown by an experiment: what changes at a place of the picture must show at that place.

Shapes do not tell: 196 x 196 may be attention, 14 x 14 tokens may stand in another order than the picture's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from service.models.grids import Grid
from service.models.placewise import spread
from service.models.program import Program

PATCHES = 8
COLUMNS = (2, 4, 5, 3, 7, 1, 0, 6)
"""The patch of each row. No binary digit of a row goes with one of its column, so regrouped rows do not look right."""
CONTRAST = 2.0
CORRELATION, PEAKS = 0.8, 0.75
"""What shows that a layer is a picture: correlation of places on both axes, or the share of peaks at their place."""
CLEAR = 2.5
"""A response whose peak is so many times what the patches cause there on average tells clearly where it lies."""
SHARP, DISTANCE = 4.0, 0.16
"""A response with such a peak must also lie so near its patches on average, of the picture's side: order alone would
let rows pass that are folded two by two."""
CHUNK_PIXELS = 8 * 512 * 512
"""Pictures that run together have at most so many pixels."""

UNSHOWN = "it cannot be shown that its places are the rows and columns of the picture"


@dataclass(frozen=True)
class Patches:
    """Noise (1,3,H,W), and copies of it (PATCHES,3,H,W) with one patch changed in each, at `rows` and `columns`.

    Rows and columns (PATCHES,) are the patches' centres, from 0 to 1.
    """

    base: Tensor
    copies: Tensor
    rows: Tensor
    columns: Tensor


def find_places(program: Program, proposals: Mapping[fx.Node, Sequence[Grid]]) -> dict[str, Grid | str]:
    """For each node, by name: the proposed grid that is shown to be the picture's rows and columns, or why none is.

    A node without a clear response inherits from one that is shown, through operations that keep each place.
    """
    patches = make_patches(program)
    responses = _observe(program, patches, proposals)
    shown: dict[fx.Node, Grid] = {}
    wrong: set[fx.Node] = set()
    for node, of_grids in responses.items():
        strengths = {grid: _strength(response, patches) for grid, response in of_grids.items()}
        best = max(strengths, key=strengths.__getitem__)
        if strengths[best] >= 1:
            shown[node] = best
        elif all(_is_clear(response) for response in of_grids.values()):
            wrong.add(node)
    shown |= spread(shown, wrong, proposals)
    return {node.name: shown.get(node, UNSHOWN) for node in proposals}


def make_patches(program: Program) -> Patches:
    """The experiment's pictures, the same each time."""
    example = program.images.meta["val"]
    _, channels, height, width = example.shape
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(channels, height, width, generator=generator)
    copies, rows, columns = base.repeat(PATCHES, 1, 1, 1), [], []
    for row, column in enumerate(COLUMNS):
        top, bottom = _side(row, height)
        left, right = _side(column, width)
        change = torch.randn(channels, bottom - top, right - left, generator=generator)
        copies[row, :, top:bottom, left:right] = CONTRAST * change
        rows.append((top + bottom) / 2 / height)
        columns.append((left + right) / 2 / width)
    base, copies = (images.to(example.device, example.dtype) for images in (base[None], copies))
    return Patches(base, copies, torch.tensor(rows), torch.tensor(columns))


def _side(place: int, size: int) -> tuple[int, int]:
    start = place * size // PATCHES
    return start, max(start + 1, (place + 1) * size // PATCHES)


class _Observer(fx.Interpreter):
    """Runs the captured network and keeps only the responses of the nodes that have proposals."""

    def __init__(self, program: Program, proposals: Mapping[fx.Node, Sequence[Grid]]) -> None:
        super().__init__(program.source)
        self.responses: dict[fx.Node, dict[Grid, Tensor]] = {}
        self._proposals = proposals

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self._proposals:
            self.responses[n] = {grid: _response(grid.fold(value)) for grid in self._proposals[n]}
        return value


def _observe(
    program: Program, patches: Patches, proposals: Mapping[fx.Node, Sequence[Grid]]
) -> dict[fx.Node, dict[Grid, Tensor]]:
    """The responses (PATCHES,h,w) of each node under each of its proposed grids."""
    parts: list[dict[fx.Node, dict[Grid, Tensor]]] = []
    for copies in torch.split(patches.copies, max(1, CHUNK_PIXELS // patches.base[0, 0].numel())):
        observer = _Observer(program, proposals)
        with torch.no_grad():
            observer.run(torch.cat([patches.base, copies]))
        parts.append(observer.responses)
    return {
        node: {grid: torch.cat([part[node][grid] for part in parts]) for grid in grids}
        for node, grids in proposals.items()
    }


def _response(values: Tensor) -> Tensor:
    """How far each copy differs from the first picture at each place, (N-1,h,w), from folded values (N,C,h,w).

    What changes everywhere alike tells nothing: each channel's spatial mean is taken off.
    """
    change = values[1:].float() - values[:1].float()
    centred = change - change.mean(dim=(2, 3), keepdim=True)
    response: Tensor = torch.linalg.vector_norm(centred, dim=1).cpu()
    return response


def _relative(response: Tensor) -> Tensor:
    """The response (K,h,w) over what all patches cause at that place on average: from 0 to K, 0 where none does."""
    mean = response.mean(dim=0)
    return torch.where(mean > 0, response / mean, 0).nan_to_num()


def _is_clear(response: Tensor) -> bool:
    return bool(_peak(_relative(response)) >= CLEAR)


def _peak(relative: Tensor) -> Tensor:
    return relative.flatten(1).amax(dim=1).median()


def _strength(response: Tensor, patches: Patches) -> float:
    """How well the response (K,h,w) lies at the patches; 1 and more shows it."""
    relative = _relative(response)
    expected = {1: patches.rows, 2: patches.columns}
    axes = [axis for axis in expected if relative.shape[axis] > 1]
    centres = {axis: _centres(relative, axis) for axis in axes}
    correlation = min(_correlation(centres[axis], expected[axis]) for axis in axes)
    if _peak(relative) >= SHARP and any((centres[axis] - expected[axis]).abs().mean() > DISTANCE for axis in axes):
        correlation = 0.0
    peaks = torch.stack(torch.unravel_index(relative.flatten(1).argmax(dim=1), relative.shape[1:]))
    hit = torch.ones(len(relative), dtype=torch.bool)
    for axis in axes:
        distance = (peaks[axis - 1] + 0.5) / relative.shape[axis] - expected[axis]
        hit &= distance.abs() < 0.5 / relative.shape[axis] + 0.5 / PATCHES  # the peak's cell and the patch overlap
    return max(correlation / CORRELATION, float(hit.float().mean()) / PEAKS)


def _centres(relative: Tensor, axis: int) -> Tensor:
    """The centre of mass along one axis, 0 to 1, of what is above the average, (K,)."""
    mass = (relative - 1).clamp(min=0).sum(dim=3 - axis)
    places = (torch.arange(mass.shape[1]) + 0.5) / mass.shape[1]
    return torch.where(mass.sum(dim=1) > 0, mass @ places / mass.sum(dim=1), 0.5)


def _correlation(found: Tensor, expected: Tensor) -> float:
    if bool((found == found[0]).all()):
        return 0.0
    return float(torch.corrcoef(torch.stack([found, expected]))[0, 1])
