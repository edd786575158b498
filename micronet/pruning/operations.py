"""What operations do to channels: those that only move values, those on one value at a time, those that combine."""

import operator
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F
from torchvision.ops import stochastic_depth

from micronet.models.attention import attend, weigh
from micronet.models.layers import Add, ChannelShuffle, Tap

# Run on the numbers as they are.
SHUFFLES = (ChannelShuffle, nn.ChannelShuffle)
MOVING_MODULES = (nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle)
MOVING_CALLS: set[object] = {
    operator.getitem, torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze,
    torch.chunk, torch.split, torch.unbind, torch.roll, torch.flip, torch.narrow, torch.select, torch.swapaxes,
    torch.movedim, torch.cat, torch.concat, torch.concatenate, torch.stack, F.pixel_shuffle, F.pixel_unshuffle,
}  # fmt: skip
MOVING_METHODS = {
    "flatten", "view", "reshape", "permute", "transpose", "squeeze", "unsqueeze", "chunk", "split", "unbind", "roll",
    "flip", "narrow", "select", "swapaxes", "movedim", "expand", "expand_as", "repeat", "unflatten", "t",
}  # fmt: skip

MOVING_ATTRIBUTES = {"T", "mT"}

# Each value becomes another, whatever lies beside it.
POINTWISE_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh, nn.Hardswish,
    nn.Hardsigmoid, nn.Hardtanh, nn.Softplus, nn.CELU, nn.SELU, nn.LogSigmoid, nn.Softsign, nn.Identity, nn.Dropout,
    nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, Tap,
)  # fmt: skip
POINTWISE_CALLS: set[object] = {
    F.relu, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.mish, F.sigmoid, F.tanh, F.hardswish, F.hardsigmoid,
    F.hardtanh, F.softplus, F.dropout, F.dropout2d, torch.relu, torch.sigmoid, torch.tanh, torch.clamp, torch.abs,
    torch.neg, torch.exp, torch.sqrt, torch.pow, torch.square, operator.neg, operator.pow, operator.gt, operator.ge,
    operator.lt, operator.le, stochastic_depth,
}  # fmt: skip
POINTWISE_METHODS = {
    "relu", "relu_", "sigmoid", "tanh", "clamp", "contiguous", "float", "to", "detach", "clone", "abs", "neg", "exp",
    "sqrt", "type", "pow", "square", "half", "double", "bfloat16", "type_as", "masked_fill",
}  # fmt: skip

# Values at the same place, of tensors that are broadcast to one another, become one.
COMBINING_MODULES = (Add,)
COMBINING_CALLS: set[object] = {
    operator.add, operator.iadd, operator.sub, operator.isub, operator.mul, operator.imul, operator.truediv, torch.add,
    torch.sub, torch.mul, torch.multiply, torch.div, torch.maximum, torch.minimum, torch.where,
}  # fmt: skip
COMBINING_METHODS = {"add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_"}

# Attention, and its two products.
MATRIX_CALLS: set[object] = {torch.matmul, torch.bmm, operator.matmul}
ATTENDING_CALLS: set[object] = {attend, weigh, F.scaled_dot_product_attention, *MATRIX_CALLS}
ATTENDING_METHODS = {"matmul", "bmm"}

# Values become one over some axes, or shares of their sum along one.
SOFTMAX_CALLS: set[object] = {F.softmax, torch.softmax}
REDUCING_CALLS: set[object] = {torch.mean, torch.sum, torch.amax, torch.amin, *SOFTMAX_CALLS}
REDUCING_METHODS = {"mean", "sum", "amax", "amin", "softmax"}

# Each channel's map becomes another map, beside the others.
POOLS = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.LPPool2d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool3d, nn.Upsample, nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d,
)  # fmt: skip
POOL_CALLS: set[object] = {
    F.max_pool1d, F.max_pool2d, F.max_pool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d,
    F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, F.adaptive_max_pool2d, torch.max_pool2d, F.interpolate,
}  # fmt: skip

# Means and variances over channels: without some of these the others would be scaled anew.
NORMALISING_MODULES = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)
NORMALISING_CALLS: set[object] = {F.layer_norm, F.group_norm, F.rms_norm, F.local_response_norm, F.normalize}

# What tells of a tensor, not its values.
TELLING_METHODS = {"size", "dim", "ndimension", "numel", "element_size", "is_floating_point"}
TELLING_ATTRIBUTES = {"shape", "ndim", "device", "dtype", "is_cuda", "requires_grad"}

# What gives a part of a tensor, whose values are the tensor's own.
PARTS = {operator.getitem, torch.chunk, torch.split, torch.narrow, torch.select, torch.unbind}
PART_METHODS = {"chunk", "split", "narrow", "select", "unbind"}
IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv}


_KINDS: tuple[tuple[str, set[object], set[str]], ...] = (
    ("telling", set(), TELLING_METHODS),
    ("moving", MOVING_CALLS, MOVING_METHODS),
    ("combining", POINTWISE_CALLS | COMBINING_CALLS, POINTWISE_METHODS | COMBINING_METHODS),
    ("attending", ATTENDING_CALLS, ATTENDING_METHODS),
    ("reducing", REDUCING_CALLS, REDUCING_METHODS),
    ("pooling", POOL_CALLS, set()),
)


def kind(node: fx.Node) -> str:
    """Return what a call does to channels: telling, moving, combining, attending, reducing, pooling; "" if unknown."""
    if node.target is getattr:
        return (
            "telling" if node.args[1] in TELLING_ATTRIBUTES else "moving" if node.args[1] in MOVING_ATTRIBUTES else ""
        )
    is_method = node.op == "call_method"
    return next((name for name, calls, methods in _KINDS if node.target in (methods if is_method else calls)), "")


def is_softmax(node: fx.Node) -> bool:
    """Tell whether a node that reduces keeps its axes: a softmax, as a module, a call or a method."""
    return node.op == "call_module" or node.target in SOFTMAX_CALLS or node.target == "softmax"


def rank(operation: Any) -> int | None:
    """Return how many axes an operation's batched input has, by its name (``MaxPool2d``: 4); None where any number."""
    name = getattr(operation, "__name__", type(operation).__name__)
    norm = isinstance(operation, nn.modules.batchnorm._BatchNorm)  # BatchNorm1d takes (N, C) and (N, C, L) alike
    return int(name[-2]) + 2 if name[-2:] in ("1d", "2d", "3d") and not norm else None


def writes_part(node: fx.Node) -> bool:
    """Tell whether a node writes into a part of a tensor, which others may read as a whole."""
    target, method = node.target, str(node.target) if node.op == "call_method" else ""
    in_place = target in IN_PLACE or (method.endswith("_") and not method.endswith("__")) or node.kwargs.get("inplace")
    source = node.args[0] if node.args else None
    if not in_place or not isinstance(source, fx.Node):
        return False
    return source.target in PARTS or (source.op == "call_method" and source.target in PART_METHODS)


def why_whole(of: Any) -> str:
    """Return why a module or call that is not followed leaves its channels whole."""
    if isinstance(of, NORMALISING_MODULES) or of in NORMALISING_CALLS:
        return "normalises over its channels, so that each depends on all"
    return "is not understood by pruning"
