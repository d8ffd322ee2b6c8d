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

aten = torch.ops.aten

PATCHES = 8
COLUMNS = (2, 4, 5, 3, 7, 1, 0, 6)
"""The patch of each row. No binary digit of a row goes with one of its column, so regrouped rows do not look right."""
CONTRAST = 0.25
"""Of the noise around the patches, which themselves reach from black to white."""
CORRELATION, PEAKS = 0.8, 0.75
"""What shows that a layer is a picture: correlation of places on both axes, or the share of peaks at their place."""
ALONG, CLEAR, ADDED = 2.5, 3.0, 1.5
"""A response that peaks along an axis at `ALONG` times what the patches cause there on average is clear; so is one that
peaks at a place at `CLEAR` times that and at `ADDED` times what it does along the other axis alone. What a thin picture
cannot tell is not clear."""
DISTANCE, CELL = 0.11, 0.2
"""A clear response must lie so near the patches on average, in shares of the picture's side and of a cell: order alone
would let regrouped or padded rows pass."""
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

    A node without a clear response inherits from one that is shown, through operations that keep each place. What is
    known already of the program's nodes is not measured again.
    """
    unknown = {node: grids for node, grids in proposals.items() if node.name not in program.places}
    if unknown:
        program.places.update(_measured(program, unknown))
    return {node.name: program.places[node.name] for node in proposals}


def _measured(program: Program, proposals: Mapping[fx.Node, Sequence[Grid]]) -> dict[str, Grid | str]:
    patches = make_patches(program)
    responses = _observe(program, patches, proposals)
    shown: dict[fx.Node, Grid] = {}
    wrong: set[fx.Node] = set()
    for node, of_grids in responses.items():
        verdicts = {grid: _judge(response, patches) for grid, response in of_grids.items()}
        best = max(verdicts, key=lambda grid: verdicts[grid].strength)
        if verdicts[best].strength >= 1:
            shown[node] = best
        elif all(verdict.wrong for verdict in verdicts.values()):
            wrong.add(node)
    shown |= spread(shown, wrong, proposals)
    return {node.name: shown.get(node, UNSHOWN) for node in proposals}


def make_patches(program: Program) -> Patches:
    """The experiment's pictures, the same each time."""
    example = program.images.meta["val"]
    height, width = example.shape[2:]
    base = program.noise.pictures(1, example, seed=0, contrast=CONTRAST)
    changes = program.noise.pictures(PATCHES, example, seed=1)
    copies, rows, columns = base.repeat(PATCHES, 1, 1, 1), [], []
    for row, column in enumerate(COLUMNS):
        top, bottom = _side(row, height)
        left, right = _side(column, width)
        copies[row, :, top:bottom, left:right] = changes[row, :, top:bottom, left:right]
        rows.append((top + bottom) / 2 / height)
        columns.append((left + right) / 2 / width)
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

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A view refuses values that lie in memory otherwise than captured."""
        return super().call_function(aten.reshape.default if target is aten.view.default else target, args, kwargs)

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


@dataclass(frozen=True)
class Verdict:
    """What a response says: `strength` 1 and more that its places are right, `wrong` that they clearly are not."""

    strength: float
    wrong: bool


def _judge(response: Tensor, patches: Patches) -> Verdict:
    """How well the response (K,h,w) lies at the patches."""
    relative = _relative(response)
    expected = {1: patches.rows, 2: patches.columns}
    axes = [axis for axis in expected if relative.shape[axis] > 1 and expected[axis].unique().numel() > 1]  # type: ignore[no-untyped-call]
    if not axes:
        return Verdict(0.0, wrong=False)
    centres = {axis: _centres(relative, axis) for axis in axes}
    correlations = {axis: _correlation(centres[axis], expected[axis]) for axis in axes}
    near = {axis: _distance(centres[axis], expected[axis]) <= DISTANCE + CELL / relative.shape[axis] for axis in axes}
    elsewhere = [axis for axis in axes if correlations[axis] < CORRELATION or not near[axis]]
    hits = _share_of_hits(relative, {axis: expected[axis] for axis in axes}) / PEAKS
    wrong = hits < 1 and any(_is_clear(response, axis) for axis in elsewhere)
    return Verdict(max(0.0 if wrong else min(correlations.values()) / CORRELATION, hits), wrong)


def _is_clear(response: Tensor, axis: int) -> bool:
    """Whether the response (K,h,w) speaks clearly of its places along the axis."""
    peak, along, other = (_peak(_relative(part)) for part in (response, response.sum(3 - axis), response.sum(axis)))
    return along >= ALONG or peak >= max(CLEAR, ADDED * other)


def _peak(relative: Tensor) -> float:
    """The largest value of each patch's relative response, the median over the patches."""
    return float(relative.flatten(1).amax(dim=1).median())


def _share_of_hits(relative: Tensor, expected: Mapping[int, Tensor]) -> float:
    """The share of patches whose peak lies in a cell that the patch overlaps."""
    peaks = torch.stack(torch.unravel_index(relative.flatten(1).argmax(dim=1), relative.shape[1:]))
    hit = torch.ones(len(relative), dtype=torch.bool)
    for axis, places in expected.items():
        distance = (peaks[axis - 1] + 0.5) / relative.shape[axis] - places
        hit &= distance.abs() < 0.5 / relative.shape[axis] + 0.5 / PATCHES
    return float(hit.float().mean())


def _centres(relative: Tensor, axis: int) -> Tensor:
    """The centre of mass along one axis, 0 to 1, of what is above the average, (K,)."""
    mass = (relative - 1).clamp(min=0).sum(dim=3 - axis)
    places = (torch.arange(mass.shape[1]) + 0.5) / mass.shape[1]
    return torch.where(mass.sum(dim=1) > 0, mass @ places / mass.sum(dim=1), 0.5)


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().mean())


def _correlation(found: Tensor, expected: Tensor) -> float:
    if bool((found == found[0]).all()):
        return 0.0
    return float(torch.corrcoef(torch.stack([found, expected]))[0, 1])
