"""Operations of torch by what they do to values: what tells activation functions from everything else."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


def _names(*lines: str) -> frozenset[str]:
    return frozenset(name for line in lines for name in line.split())


NAMED = frozenset(
    {
        aten.relu.default,
        aten.relu6.default,
        aten.hardtanh.default,
        aten.silu.default,
        aten.gelu.default,
        aten.hardswish.default,
        aten.leaky_relu.default,
        aten.prelu.default,
        aten.elu.default,
        aten.selu.default,
        aten.celu.default,
        aten.mish.default,
        aten.rrelu.default,
    }
)
"""Operations that are whole activation functions. Each is one of its own, also right behind another one."""
IDENTITIES = frozenset(
    {
        aten.clone.default,
        aten.alias.default,
        aten.detach.default,
        aten.contiguous.default,
        aten.dropout.default,
        aten.to.dtype,
        aten._to_copy.default,
    }
)
SUMS = frozenset({aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Scalar})
PRODUCTS = frozenset({aten.mul.Tensor, aten.mul.Scalar})
QUOTIENTS = frozenset({aten.div.Tensor, aten.div.Scalar})
CHOICES = frozenset({aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar})
FILLS = frozenset({aten.masked_fill.Scalar, aten.masked_fill.Tensor})
LERPS = frozenset({aten.lerp.Tensor, aten.lerp.Scalar})
COMBINING = SUMS | PRODUCTS | QUOTIENTS | LERPS | {aten.addcmul.default, aten.addcdiv.default}
"""Operations of two values or more that leave each one's own nonlinearity to be gated where it is made."""
UNTAGGED = NAMED | IDENTITIES | CHOICES | {aten.log_sigmoid.default, aten.special_ndtr.default}
"""Element-wise operations, of which torch does not tag all as such."""
ZEROS = frozenset({aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default})
ONES = frozenset({aten.ones.default, aten.ones_like.default, aten.new_ones.default})
FULL = frozenset({aten.full.default, aten.full_like.default, aten.new_full.default})
CONSTANTS = (
    ZEROS
    | ONES
    | FULL
    | {aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default}
    | {aten.rand_like.default, aten.randn_like.default, aten.sym_size.int}
)
"""Operations whose value depends on the shape of their input alone."""
BOUNDED = frozenset({aten.relu6.default, aten.hardtanh.default})
WEIGHING = frozenset(
    {aten.sigmoid.default, aten.hardsigmoid.default, aten.tanh.default, aten.exp.default, aten.rsqrt.default}
    | {aten.sqrt.default, aten.reciprocal.default, aten.pow.Tensor_Scalar}
    | BOUNDED
    | QUOTIENTS
)
"""Operations that make a gate or a norm's factor where their value only multiplies another one."""
REDUCTIONS = _names(
    "sum mean amax amin var std linalg_vector_norm logsumexp avg_pool1d avg_pool2d avg_pool3d",
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d",
)
CHOOSING = _names("amax amin max min aminmax median nanmedian kthvalue mode sort topk logsumexp")
"""Reductions that choose among values; over values that are stacked for it, functions of each of them."""
SHAPING = _names(
    "view _unsafe_view reshape expand unsqueeze squeeze flatten unflatten permute transpose t numpy_T movedim flip",
    "type_as roll select slice split split_with_sizes chunk unbind getitem cat stack repeat tile repeat_interleave",
    "index index_select gather pad constant_pad_nd reflection_pad2d replication_pad2d",
    "pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle im2col col2im",
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d",
    "upsample_trilinear3d _upsample_bilinear2d_aa _upsample_bicubic2d_aa _upsample_nearest_exact1d",
    "_upsample_nearest_exact2d _upsample_nearest_exact3d",
)
"""Operations that move, repeat or blend values."""
UNDERSTOOD = (
    REDUCTIONS
    | SHAPING
    | _names(
        "linear conv1d conv2d conv3d convolution _convolution conv_transpose1d conv_transpose2d conv_transpose3d",
        "mm bmm matmul addmm baddbmm einsum mv dot linalg_multi_dot tensordot scaled_dot_product_attention",
        "cumsum tril triu diag_embed fft_fft fft_ifft fft_rfft fft_irfft fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2",
        "fft_fftshift fft_ifftshift real imag view_as_real view_as_complex conj complex grid_sampler",
        "grid_sampler_2d as_strided",
        "slice_scatter select_scatter scatter scatter_add index_add index_copy index_put lift_fresh_copy copy",
        "layer_norm native_layer_norm rms_norm _fused_rms_norm group_norm native_group_norm instance_norm batch_norm",
        "_native_batch_norm_legit_no_training _batch_norm_impl_index softmax _softmax log_softmax _log_softmax",
        "max_pool1d max_pool2d max_pool3d adaptive_max_pool2d max median sort topk",
    )
)
"""Operations that are not element-wise and no activation functions: linear ones, norms, poolings."""
OWN = ("aten", "prims", "prim")


def is_foreign(node: fx.Node) -> bool:
    """Whether the operation is none of torch's own, or holds a graph of its own."""
    foreign = isinstance(node.target, torch._ops.OpOverload) and node.target.namespace not in OWN
    return foreign or isinstance(node.target, torch._ops.HigherOrderOperator)


def is_elementwise(node: fx.Node) -> bool:
    operation = node.target
    return operation in UNTAGGED or (
        isinstance(operation, torch._ops.OpOverload) and torch.Tag.pointwise in operation.tags
    )


def argument_of(node: fx.Node, name: str) -> Any:
    """An argument of an operation by its name, its default where it is not given; None where there is none."""
    assert isinstance(node.target, torch._ops.OpOverload)
    for place, argument in enumerate(node.target._schema.arguments):
        if argument.name == name:
            return node.args[place] if place < len(node.args) else node.kwargs.get(name, argument.default_value)
    return None


def name_of(node: fx.Node) -> str:
    """The operation without its overload."""
    operation: Any = node.target
    return operation._opname if isinstance(operation, torch._ops.OpOverload) else getattr(operation, "__name__", "")
