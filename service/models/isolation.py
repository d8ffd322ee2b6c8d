"""Pictures of a batch must not change one another's scores: strangers share it."""

from __future__ import annotations

import torch
from torch import Tensor

from service.errors import ModelLoadError
from service.models.program import Program

CONTRAST = 10.0
TOLERANCE = 1e-6
"""Of the largest absolute score. Honest networks were equal bit for bit, those that mix differed by 1e-3 and more."""


def check_isolation(program: Program) -> None:
    """Raise ModelLoadError where a picture's scores change with the other picture of a batch of two.

    The batches have the same size, for kernels round differently at different sizes.
    """
    example = program.images.meta["val"]
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(4, *example.shape[1:], generator=generator).to(example.device)
    first, second = noise[:2], CONTRAST * noise[2:]
    with torch.no_grad():
        scores = program.network()(first)
        for kept in (0, 1):
            others = second.clone()
            others[kept] = first[kept]
            if not _equal(program.network()(others)[kept], scores[kept]):
                raise ModelLoadError(
                    "the scores of a picture change with the other pictures of its batch, or from run to run: "
                    "batch statistics, a mean over the batch and active dropout must be replaced by fixed values"
                )


def _equal(ours: Tensor, expected: Tensor) -> bool:
    tolerance = TOLERANCE * float(expected.abs().max())
    return torch.allclose(ours, expected, rtol=0, atol=tolerance, equal_nan=True)
