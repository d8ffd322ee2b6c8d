"""Pictures of noise on which a network is tried when it is loaded: real pixels, as the network sees them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Noise:
    """What black and white become on their way to the network, per channel."""

    black: Triple = (-2.0, -2.0, -2.0)
    white: Triple = (2.0, 2.0, 2.0)

    @classmethod
    def of(cls, mean: Triple, std: Triple) -> Noise:
        """Of a network whose input is normalised by `mean` and `std` (`[input]` of model.toml)."""
        black, white = ([(level - m) / s for m, s in zip(mean, std, strict=True)] for level in (0, 1))
        return cls((black[0], black[1], black[2]), (white[0], white[1], white[2]))

    def pictures(self, count: int, example: Tensor, seed: int, contrast: float = 1.0) -> Tensor:
        """Uniform noise (count,3,H,W) in the size and on the device of `example`, (N,3,H,W).

        It is the same each time for a seed. `contrast` 1 reaches from black to white, less stays around their middle.
        """
        levels = torch.rand(count, *example.shape[1:], generator=torch.Generator().manual_seed(seed))
        black, white = (torch.tensor(each)[:, None, None] for each in (self.black, self.white))
        noise = black + (white - black) * (0.5 + contrast * (levels - 0.5))
        return noise.to(example.device, example.dtype)
