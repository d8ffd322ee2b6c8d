"""Pictures of a batch must not change one another's scores: strangers share it."""

from __future__ import annotations

import torch
from torch import Tensor

from service.errors import ModelLoadError
from service.models.program import Program

COUNT = 4
TOLERANCE = 1e-6
"""Of the largest absolute score. Honest networks were equal bit for bit, those that mix differed by 1e-3 and more."""


def check_isolation(program: Program) -> None:
    """Raise ModelLoadError where a picture's scores change with the others of its batch, or are not numbers.

    The batches have the same size, for kernels round differently at different sizes.
    """
    example = program.images.meta["val"]
    first, second = program.noise.pictures(2 * COUNT, example, seed=1).split(COUNT)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        scores = program.network()(first)
        if not scores.isfinite().any():
            raise ModelLoadError("no score of a picture of noise is finite")
        for kept in (0, COUNT - 1):
            others = second.clone()
            others[kept] = first[kept]
            if not _equal(program.network()(others)[kept], scores[kept]):
                raise ModelLoadError(
                    "the scores of a picture change with the other pictures of its batch, or from run to run: "
                    "batch statistics, a mean over the batch and active dropout must be replaced by fixed values"
                )


def _equal(ours: Tensor, expected: Tensor) -> bool:
    finite = expected.isfinite()
    if not torch.equal(finite, ours.isfinite()):
        return False
    difference = (ours[finite] - expected[finite]).abs()
    return bool((difference <= TOLERANCE * expected[finite].abs().amax()).all()) if finite.any() else True
