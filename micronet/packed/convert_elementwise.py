"""ONNX operators that compute each value on its own, or from the values in the same place of two feature maps."""

import math
from typing import Any

import numpy as np
import onnx

from micronet.packed.builder import Converter, ProgramBuilder, Unsupported, attributes_of


def _quantize(builder: ProgramBuilder, node: onnx.NodeProto) -> None:
    scale, zero_point = (builder.constants[name] for name in node.input[1:])
    if scale.size > 1:
        raise Unsupported("QuantizeLinear of activations with more than one scale is not supported")
    limits = np.iinfo(zero_point.dtype)
    ends = [int(limits.min), int(limits.max)]
    attributes = {"scale": float(scale.item()), "zero_point": int(zero_point.item()), "range": ends}
    builder.add(node, "quantize", attributes=attributes)


def _dequantize(builder: ProgramBuilder, node: onnx.NodeProto) -> None:
    if node.input[0] not in builder.constants:
        builder.aliases[node.output[0]] = node.input[0]  # an activation: it stays integer
        return
    q = builder.constants[node.input[0]].astype(np.int32)
    axis = attributes_of(node).get("axis", 1)
    shape = [-1 if index == axis else 1 for index in range(q.ndim)]
    if len(node.input) > 2:
        q = q - builder.constants[node.input[2]].astype(np.int32).reshape(shape)
    builder.axes[node.output[0]] = axis
    builder.dequantized[node.output[0]] = q, builder.constants[node.input[1]].astype(np.float32).reshape(-1)


def _greater_or_equal(builder: ProgramBuilder, node: onnx.NodeProto) -> None:
    """Convert x >= 0 ? 1 : -1 into a sign."""
    zero = builder.constants.get(node.input[1])
    for where in builder.graph.node:
        if where.op_type != "Where" or where.input[0] != node.output[0]:
            continue
        values = [builder.constants[name].reshape(-1)[0] for name in where.input[1:] if name in builder.constants]
        if zero is None or zero.any() or values != [1.0, -1.0]:
            raise Unsupported("comparisons are only supported against 0, to compute a sign")
        builder.add(where, "sign", node.input[0])


def _clip(builder: ProgramBuilder, node: onnx.NodeProto) -> None:
    bounds = [float(builder.constants[name].item()) if name else default for name, default in
              zip([*node.input[1:], "", ""], (-math.inf, math.inf), strict=False)]  # fmt: skip
    builder.add(node, "clip", attributes={"bounds": bounds})


def _unary(kind: str, **defaults: float) -> Converter:
    """Return a converter into relu or one of ACTIVATIONS, with the operator's alpha and beta."""

    def convert(builder: ProgramBuilder, node: onnx.NodeProto) -> None:
        given = attributes_of(node)
        builder.add(node, kind, attributes={name: float(given.get(name, defaults[name])) for name in defaults})

    return convert


def _gelu(builder: ProgramBuilder, node: onnx.NodeProto) -> None:
    builder.add(node, "tanh_gelu" if attributes_of(node).get("approximate") == b"tanh" else "gelu")


def _prelu(builder: ProgramBuilder, node: onnx.NodeProto) -> None:
    """Convert max(x, 0) + slope * min(x, 0)."""
    slope, name, channels = builder.constant(node.input[1]), node.output[0], builder.channels(node.input[0])
    if slope is None or slope.size not in (1, channels):
        raise Unsupported("PRelu is only supported with one slope, or one per channel")
    above = builder.add(node, "relu", output=f"{name}/above")
    below = builder.add(node, "clip", attributes={"bounds": [-math.inf, 0.0]}, output=f"{name}/below")
    slope = slope.reshape(-1).astype(np.float32)
    below = builder.add(node, "affine", below, scale=slope, bias=np.zeros_like(slope), output=f"{name}/sloped")
    builder.add(node, "add", above, below)


def _arithmetic(builder: ProgramBuilder, node: onnx.NodeProto) -> None:
    """Convert +, -, * and / of two feature maps, or of one and a constant per network or per channel."""
    kind = node.op_type
    for place, name in enumerate(node.input):
        constant = builder.constant(name)
        if constant is not None:
            _affine(builder, node, node.input[1 - place], constant, place == 0)
            return
    first, second = node.input
    ranks = {len(builder.shapes.get(name, [0, 0, 0])) for name in node.input}
    channels = set(map(builder.channels, node.input))
    if len(ranks) > 1 or len(channels) > 1:
        raise Unsupported(f"{kind} is only supported for feature maps with the same number of channels")
    if kind == "Div":
        raise Unsupported("Div is only supported with a constant divisor")
    if kind == "Sub":
        ones = np.ones(1, np.float32)
        second = builder.add(node, "affine", second, scale=-ones, bias=0 * ones, output=f"{node.output[0]}/negative")
    builder.add(node, "mul" if kind == "Mul" else "add", first, second)


def _affine(builder: ProgramBuilder, node: onnx.NodeProto, source: str, constant: Any, constant_first: bool) -> None:
    """Convert arithmetic with a constant into x * scale + bias."""
    kind, channels = node.op_type, builder.channels(source)
    shape = (1,) * (len(builder.shapes.get(source, [0, 0, 0])) + 1 - constant.ndim) + constant.shape
    if constant.size > 1 and (constant.size != channels or shape[1:2] != (channels,)):
        raise Unsupported(f"{kind} only supports constants with one value, or one per channel")
    value, one, zero = constant.reshape(-1), np.ones(constant.size, np.float32), np.zeros(constant.size, np.float32)
    if kind == "Div" and constant_first:
        raise Unsupported("Div is only supported with a constant divisor")
    sign = -1 if kind == "Sub" and constant_first else 1
    scale, bias = {
        "Add": (one, value), "Sub": (sign * one, sign * -value), "Mul": (value, zero), "Div": (one / value, zero),
    }[kind]  # fmt: skip
    builder.add(node, "affine", source, scale=scale.astype(np.float32), bias=bias.astype(np.float32))


def _batch_norm(builder: ProgramBuilder, node: onnx.NodeProto) -> None:
    gamma, beta, mean, variance = (builder.constants[name].astype(np.float64) for name in node.input[1:5])
    scale = gamma / np.sqrt(variance + attributes_of(node).get("epsilon", 1e-5))
    bias = (beta - mean * scale).astype(np.float32)
    builder.add(node, "affine", scale=scale.astype(np.float32), bias=bias)


def _alias(builder: ProgramBuilder, node: onnx.NodeProto) -> None:
    builder.aliases[node.output[0]] = node.input[0]


ELEMENTWISE: dict[str, Converter] = {
    "QuantizeLinear": _quantize, "DequantizeLinear": _dequantize, "GreaterOrEqual": _greater_or_equal,
    "Relu": _unary("relu"), "Clip": _clip, "Gelu": _gelu,
    "HardSigmoid": _unary("hard_sigmoid", alpha=0.2, beta=0.5),
    "HardSwish": _unary("hard_swish", alpha=1 / 6, beta=0.5),
    "Sigmoid": _unary("sigmoid"), "Tanh": _unary("tanh"), "Mish": _unary("mish"), "PRelu": _prelu,
    "Elu": _unary("elu", alpha=1.0),
    "LeakyRelu": _unary("leaky_relu", alpha=0.01),
    **dict.fromkeys(("Add", "Sub", "Mul", "Div"), _arithmetic),
    "BatchNormalization": _batch_norm, "Identity": _alias, "Dropout": _alias,
}  # fmt: skip
