"""The vocabulary: ATen calls, grouped by what relevance does at them."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

# Operations that only rearrange elements: relevance, sign and gate-ness pass.
RESHAPES = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.reshape_as.default,
    aten.view_as.default,
}
REARRANGES = RESHAPES | {
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.numpy_T.default,
    aten.movedim.int,
    aten.movedim.intlist,
    aten.swapaxes.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.dropout_.default,
    aten.flip.default,
    aten.roll.default,
    aten.pixel_shuffle.default,
    aten.pixel_unshuffle.default,
    aten.channel_shuffle.default,
}
# Operations that choose, repeat or average elements: homogeneous and keep the sign.
SELECTS = {
    aten.expand.default,
    aten.expand_as.default,
    aten.repeat.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.narrow.default,
    aten.index.Tensor,
    aten.index_select.default,
    aten.gather.default,
    aten.chunk.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.unbind.int,
    aten.unfold.default,
    operator.getitem,
    aten.max_pool1d.default,
    aten.max_pool2d.default,
    aten.max_pool3d.default,
    aten.max_pool2d_with_indices.default,
    aten.max_pool3d_with_indices.default,
    aten.adaptive_max_pool1d.default,
    aten.adaptive_max_pool2d.default,
    aten.adaptive_max_pool3d.default,
    aten.amax.default,
    aten.amin.default,
    aten.max.dim,
    aten.min.dim,
    aten.upsample_nearest1d.vec,
    aten.upsample_nearest2d.vec,
    aten.upsample_nearest3d.vec,
    aten.upsample_linear1d.vec,
    aten.upsample_bilinear2d.vec,
    aten.upsample_trilinear3d.vec,
}
AVERAGES = {
    aten.avg_pool1d.default,
    aten.avg_pool2d.default,
    aten.avg_pool3d.default,
    aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default,
    aten.adaptive_avg_pool3d.default,
    aten._adaptive_avg_pool2d.default,
    aten.mean.default,
    aten.mean.dim,
    aten.sum.default,
    aten.sum.dim_IntList,
}
# Always >= 0, whatever comes in.
NON_NEGATIVE = {
    aten.relu.default,
    aten.relu6.default,
    aten.sigmoid.default,
    aten.hardsigmoid.default,
    aten.softmax.int,
    aten._softmax.default,
    aten.exp.default,
    aten.abs.default,
    aten.softplus.default,
    aten.sqrt.default,
    aten.rsqrt.default,
    aten.linalg_vector_norm.default,
}
CATS = {aten.cat.default, aten.stack.default, aten.concat.default}
CLAMPS = {
    aten.hardtanh.default,
    aten.clamp.default,
    aten.clamp_min.default,
}
DROPOUTS = {
    aten.dropout.default,
    aten.dropout_.default,
    aten.feature_dropout.default,
    aten.feature_dropout_.default,
    aten.alpha_dropout.default,
    aten.feature_alpha_dropout.default,
}
# Results that share memory with their first operand, or may.
VIEWS = RESHAPES | {
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.movedim.int,
    aten.movedim.intlist,
    aten.numpy_T.default,
    aten.swapaxes.default,
    aten.to.dtype,
    aten.to.device,
    aten.slice.Tensor,
    aten.select.int,
    aten.narrow.default,
    aten.expand.default,
    aten.expand_as.default,
    aten.chunk.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.unbind.int,
    aten.unfold.default,
    aten.alias.default,
    aten.detach.default,
    aten.contiguous.default,
    aten.dropout.default,
    operator.getitem,
}

# Read only the shape of their second operand.
SHAPED_LIKE = {aten.reshape_as.default, aten.view_as.default, aten.expand_as.default}
# Read the shape and type of their operand only: the result does not depend on the input.
CREATES = {
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
}

# Positively homogeneous: the ordinary gradient is the rule.
HOMOGENEOUS = (
    REARRANGES
    | SELECTS
    | AVERAGES
    | {
        aten.relu.default,
        aten.leaky_relu.default,
        aten.prelu.default,
        aten._prelu_kernel.default,
        aten.neg.default,
        aten.abs.default,
        aten.pad.default,
        aten.constant_pad_nd.default,
        aten.upsample_bicubic2d.vec,
        aten.cumsum.default,
        aten.to.dtype,
        aten.to.device,
        aten._to_copy.default,
        aten.masked_fill.Scalar,
    }
)
SCATTERS = {aten.slice_scatter.default, aten.select_scatter.default}
SOFTMAX = {aten.softmax.int, aten._softmax.default}
GATES = SOFTMAX | {
    aten.sigmoid.default,
    aten.hardsigmoid.default,
    aten.rsqrt.default,
    aten.reciprocal.default,
    aten.exp.default,
    aten.tanh.default,
    aten.linalg_vector_norm.default,
}
ADD, SUB = {aten.add.Tensor, aten.add.Scalar}, {aten.sub.Tensor, aten.sub.Scalar}
RSUB = {aten.rsub.Tensor, aten.rsub.Scalar}
MUL = {aten.mul.Tensor, aten.mul.Scalar}
DIV = {aten.div.Tensor, aten.div.Scalar}
MATMUL = {aten.matmul.default, aten.bmm.default, aten.mm.default}
WHERES = {aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf}
SDPA = aten.scaled_dot_product_attention.default
NORMS = {
    aten.layer_norm.default: "layer",
    aten.group_norm.default: "group",
    aten.rms_norm.default: "rms",
    aten.instance_norm.default: "instance",
}
CONVS = {
    aten.conv1d.default: 1,
    aten.conv2d.default: 2,
    aten.conv3d.default: 3,
    aten.conv1d.padding: 1,
    aten.conv2d.padding: 2,
    aten.conv3d.padding: 3,
}
CONVS_T = {
    aten.conv_transpose1d.default: 1,
    aten.conv_transpose2d.input: 2,
    aten.conv_transpose3d.input: 3,
}


def functional(target: Any) -> Any:
    """The out-of-place twin of an in-place ATen call."""
    schema = getattr(target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return target
    name = schema.name.split("::")[1]
    packet = getattr(aten, name.rstrip("_"), None) if name.endswith("_") else None
    overload = schema.overload_name or "default"
    return getattr(packet, overload, target) if packet is not None else target


def is_mutable(node: fx.Node) -> bool:
    """Whether the call writes into one of its operands."""
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and bool(schema.is_mutable)


def operand(node: fx.Node, position: int, name: str = "", default: Any = None) -> Any:
    """An operand by place or name, whichever the call used."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)
