"""Random CAM: the control that every evaluation of heatmaps needs."""

from __future__ import annotations

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from service.explain.mathematics import channels_weighted
from service.explain.method import Seed, WeightedCam, WeightedCamParams, register
from service.explain.trace import Trace


class RandomCamParams(WeightedCamParams):
    seed: Seed = Field(0, description="of the weights, which are the same for each picture and class")


@register
class RandomCam(WeightedCam):
    name = "random_cam"
    paper = "https://arxiv.org/abs/1810.03292"
    description = "Feature maps of the target layer with random weights: what a method must be better than."
    cost = "one forward pass"
    Params = RandomCamParams

    def weighted(self, trace: Trace, params: WeightedCamParams) -> Tensor:
        """A weight for each channel, uniform in [-1, 1]."""
        assert isinstance(params, RandomCamParams)
        activation = trace.activation
        drawn = np.random.default_rng(params.seed).uniform(-1, 1, activation.shape[1]).astype(np.float32)
        return channels_weighted(activation, torch.from_numpy(drawn).to(activation.device)[None])
