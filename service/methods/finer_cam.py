"""Finer-CAM (Zhang et al. 2025)."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from service.explain.mathematics import channels_weighted
from service.explain.method import COSTLESS, WeightedCam, WeightedCamParams, register
from service.explain.trace import Trace
from service.models.layers import Target
from service.models.program import Program


class FinerCamParams(WeightedCamParams):
    alpha: float = Field(
        1.0,
        ge=0,
        le=10,
        description="how much of the similar classes' logits is taken away, as a factor; 0: Grad-CAM",
        json_schema_extra=COSTLESS,
    )
    references: int = Field(
        3,
        ge=1,
        le=100,
        description="how many similar classes are compared with, those whose logits are nearest to the explained "
        "class's; at most all others",
    )


@register
class FinerCam(WeightedCam):
    name = "finer_cam"
    paper = "https://arxiv.org/abs/2501.11309"
    description = "Grad-CAM of what tells the class from those it is most easily confused with."
    cost = "one forward pass, one backward pass through what follows the target layer"
    Params = FinerCamParams

    def refusal(self, program: Program, target: Target | None) -> str | None:
        return "it has but one class, and there is no other to compare with" if program.num_classes == 1 else None

    def weighted(self, trace: Trace, params: WeightedCamParams) -> Tensor:
        assert isinstance(params, FinerCamParams)
        activation = trace.activation  # first: the pass that it takes knows the logits too
        gradient = trace.gradient_of(_contrast(trace, params))
        return channels_weighted(activation, gradient.mean(dim=(2, 3)))


def _contrast(trace: Trace, params: FinerCamParams) -> Tensor:
    """What each logit counts, (N,classes): 1 the class's own, -alpha times their probability those of the references.

    The probabilities are normalised to sum 1, which is a softmax over the references alone.
    """
    target = F.one_hot(trace.classes, trace.program.num_classes).to(trace.logits.dtype)
    distance = (trace.logits - trace.score[:, None]).abs().masked_fill(target.bool(), float("inf"))
    count = min(params.references, trace.program.num_classes - 1)
    nearest = distance.topk(count, dim=1, largest=False).indices
    weights = trace.logits.gather(1, nearest).softmax(dim=1)
    return target.scatter(1, nearest, -params.alpha * weights)
