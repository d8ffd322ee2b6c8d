"""Ablation-CAM (Desai and Ramaswamy 2020)."""

from __future__ import annotations

import torch
from torch import Tensor

from service.explain.mathematics import channels_weighted, quotient
from service.explain.method import CamParams, GenParams, Method, register
from service.explain.trace import Trace


@register
class AblationCam(Method):
    name = "ablation_cam"
    family = "cam"
    paper = "https://doi.org/10.1109/WACV45572.2020.9093360"
    description = "Feature maps of the target layer, each weighted by the part of the class score that goes with it."
    cost = "one pass through what follows the target layer for each of its channels"
    Params = CamParams
    alone = True

    def heatmap(self, trace: Trace, params: GenParams) -> Tensor:
        weights = [self._weights(trace, picture) for picture in range(len(trace.images))]
        return channels_weighted(trace.activation, torch.stack(weights)).sum(dim=1)

    def _weights(self, trace: Trace, picture: int) -> Tensor:
        """The paper's simplified form of one picture, (C,): (y - y_k) / y, where y_k is its score without channel k."""
        maps = trace.activation[picture]
        channels = torch.arange(len(maps), device=maps.device)

        def ablated(rows: slice) -> Tensor:
            numbers = channels[rows]
            made = maps.expand(rows.stop - rows.start, -1, -1, -1).clone()
            made[channels[: len(numbers)], numbers] = 0
            return made

        # One row more, in which nothing is ablated: y comes by the same means as y_k, from which it differs little.
        scores = trace.scores_with(picture, len(maps) + 1, ablated)
        return quotient(scores[-1] - scores[:-1], scores[-1])
