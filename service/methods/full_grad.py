"""FullGrad (Srinivas and Fleuret 2019)."""

from __future__ import annotations

import operator
from collections.abc import Mapping

import torch
from torch import Tensor, fx

from service.explain.mathematics import minmax, upsample
from service.explain.method import GenParams, Method, ScaledParams, register
from service.explain.trace import Trace
from service.models.grids import BATCH_NORMS, CONVOLUTIONS
from service.models.operations import argument_of
from service.models.program import Program, as_tuple, gradients_of

aten = torch.ops.aten

LINEAR = aten.linear.default
PARAMETERS: dict[object, tuple[str, ...]] = {
    **dict.fromkeys((*CONVOLUTIONS, aten.conv_transpose2d.input, LINEAR), ("bias",)),
    **dict.fromkeys(BATCH_NORMS, ("running_mean", "running_var", "weight", "bias")),
}
"""What the bias of each operation is made of; without the first of these there is none."""


@register
class FullGrad(Method):
    name = "full_grad"
    family = "pixel"
    paper = "https://arxiv.org/abs/1905.00780"
    description = (
        "The picture and the biases of convolutions and batch norms, each times its gradient, scaled by channel and "
        "added up; exact for networks of ReLUs, while shifts of layer norms and attention are not covered."
    )
    cost = "one forward pass, one backward pass"
    Params = ScaledParams

    def heatmap(self, trace: Trace, params: GenParams) -> Tensor:
        """The paper's equation 8: psi(x dy/dx) + the sum over layers and channels of psi(bias gradient), (N,H,W)."""
        placed, _ = parts(trace)
        return torch.stack([_psi(part, trace.images) for part in placed]).sum(dim=0)


def _psi(part: Tensor, images: Tensor) -> Tensor:
    """The sum over channels of upsample(minmax(abs)) of (N,C,h,w); upsampling is linear, so the sum comes first."""
    scaled = minmax(part.abs().flatten(0, 1)).reshape(part.shape)
    return upsample(scaled.sum(dim=1), like=images)


def parts(trace: Trace) -> tuple[list[Tensor], list[Tensor]]:
    """What the score is made of (the paper's equation 4): x dy/dx first, then b dy/db at every place of every bias.

    First the parts that have a place in the picture, (N,C,h,w), then those of linear layers, which have none.
    """
    program = trace.program
    layers = [(node, value) for node in program.nodes if (value := _biased_value(program, node))]
    nodes = tuple(dict.fromkeys(each for layer, value in layers for each in (value, *_parameters(layer).values())))
    inputs = trace.images.detach().requires_grad_()
    with torch.enable_grad():
        logits, *values = as_tuple(program.observed(*nodes)(inputs))
    known = dict(zip(nodes, values, strict=True))
    total = logits.gather(1, trace.classes[:, None]).sum()
    at_image, *gradients = gradients_of(total, [inputs, *(known[value] for _, value in layers)])
    placed, placeless = [trace.images * at_image], list[Tensor]()
    for (layer, value), gradient in zip(layers, gradients, strict=True):
        has_place = layer.target is not LINEAR and gradient.ndim == 4 and program.is_batched(value)
        (placed if has_place else placeless).append(_bias(layer, known, gradient.ndim) * gradient)
    return placed, placeless


def _biased_value(program: Program, node: fx.Node) -> fx.Node | None:
    """The value that a layer's bias is added to; None if the node is no layer, or one without a bias of its own."""
    if node.target not in PARAMETERS or node not in program.tainted:
        return None
    found = _parameters(node)
    if PARAMETERS[node.target][0] not in found or not program.tainted.isdisjoint(found.values()):
        return None
    if isinstance(node.meta["val"], Tensor):
        return node
    return next((user for user in node.users if user.target is operator.getitem and user.args[1] == 0), None)


def _parameters(layer: fx.Node) -> dict[str, fx.Node]:
    """The tensors that the layer's bias is made of, by name, as far as it has them."""
    found = {name: argument_of(layer, name) for name in PARAMETERS[layer.target]}
    return {name: node for name, node in found.items() if node is not None}


def _bias(layer: fx.Node, known: Mapping[fx.Node, Tensor], dimensions: int) -> Tensor:
    """What the layer adds to its value; of a batch norm shift - gain * mean / sqrt(variance + eps)."""
    found = {name: known[node].detach() for name, node in _parameters(layer).items()}
    if layer.target in BATCH_NORMS:
        mean = found["running_mean"] * (found["running_var"] + argument_of(layer, "eps")).rsqrt()
        bias = found.get("bias", torch.zeros_like(mean)) - found.get("weight", torch.ones_like(mean)) * mean
    else:
        bias = found["bias"]
    behind = 0 if layer.target is LINEAR else dimensions - 2
    result: Tensor = bias.reshape(-1, *[1] * behind)
    return result
