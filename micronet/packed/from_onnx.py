"""Conversion of an ONNX model, as ``to_onnx`` exports it, into a packed program.

Dequantized integers stay integers, and integer thresholds replace floats before signs.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from micronet.errors import MicronetError
from micronet.packed.builder import ProgramBuilder, fuse_thresholds, move_signs
from micronet.packed.program import Program
from micronet.runtimes.onnxruntime import metadata


def pack_model(proto: onnx.ModelProto) -> Program:
    """Convert an ONNX model. Raises MicronetError that names every operator the packed runtime does not have."""
    builder = ProgramBuilder(proto)
    missing = sorted({node.op_type for node in proto.graph.node if node.op_type not in _CONVERTERS})
    if missing:
        raise MicronetError(f"the packed runtime does not support {', '.join(missing)}; use the ONNX file instead")
    for node in proto.graph.node:
        if node.output[0] not in builder.operations and node.output[0] not in builder.aliases:
            _CONVERTERS[node.op_type](builder, node)
    move_signs(builder)
    output = builder.resolve(proto.graph.output[0].name)
    fuse_thresholds(builder, output)
    return _build(builder, proto, output)


def _build(builder: ProgramBuilder, proto: onnx.ModelProto, output: str) -> Program:
    """Number the operations that the output depends on."""
    needed = {output}
    for name, (_, inputs) in reversed(builder.operations.items()):
        needed.update(inputs if name in needed else ())
    names = [name for name in builder.operations if name in needed]
    number = {proto.graph.input[0].name: 0} | {name: index for index, name in enumerate(names, 1)}
    operations = [builder.operations[name][0] for name in names]
    for operation, name in zip(operations, names, strict=True):
        operation.inputs = [number[item] for item in builder.operations[name][1]]
    shape = [dim.dim_value for dim in proto.graph.input[0].type.tensor_type.shape.dim]
    if len(shape) != 4 or 0 in shape[1:]:
        raise MicronetError(
            "packed networks require a fixed image size; export the model without dynamic height or width"
        )
    about = metadata(proto)
    stages = [record.get("stage") for record in about.get("history") or []]
    about = {key: about[key] for key in ("model", "data") if key in about} | {"stages": stages}
    return Program(operations, shape[1:], about)


def _unsupported(node: onnx.NodeProto, limit: str) -> MicronetError:
    return MicronetError(f"{node.name}: the packed runtime {limit}; use the ONNX file instead")


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}


def _conv(builder: ProgramBuilder, node: onnx.NodeProto) -> None:
    given = _attributes(node)
    weight, scale = builder.weight(node.input[1])
    if weight.ndim != 4 or given.get("auto_pad", b"NOTSET") != b"NOTSET":
        raise _unsupported(node, "only supports 2-D convolutions with explicit padding")
    group = given.get("group", 1)
    attributes = {
        **_window(given),
        "group": group if group > 1 else None,
        "dilation": _unless_default(given.get("dilations"), [1, 1]),
    }
    builder.add(node, "conv", attributes=attributes, weight=weight, scale=scale, bias=_bias(builder, node))


def _gemm(builder: ProgramBuilder, node: onnx.NodeProto) -> None:
    given = _attributes(node)
    weight, scale = builder.weight(node.input[1])
    if given.get("alpha", 1.0) != 1 or given.get("beta", 1.0) != 1 or given.get("transA", 0):
        raise _unsupported(node, "does not support Gemm with alpha, beta or transA")
    weight = weight if given.get("transB", 0) else np.ascontiguousarray(weight.T)
    builder.add(node, "linear", weight=weight, scale=scale, bias=_bias(builder, node))


def _bias(builder: ProgramBuilder, node: onnx.NodeProto) -> NDArray[Any] | None:
    if len(node.input) < 3 or not node.input[2]:
        return None
    bias, scale = builder.weight(node.input[2])
    return bias if scale is None else bias.astype(np.int32)


def _dequantize(builder: ProgramBuilder, node: onnx.NodeProto) -> None:
    if node.input[0] not in builder.constants:
        builder.aliases[node.output[0]] = node.input[0]  # an activation: it stays integer
        return
    q = builder.constants[node.input[0]].astype(np.int32)
    axis = _attributes(node).get("axis", 1)
    shape = [-1 if index == axis else 1 for index in range(q.ndim)]
    if len(node.input) > 2:
        q = q - builder.constants[node.input[2]].astype(np.int32).reshape(shape)
    builder.dequantized[node.output[0]] = q, builder.constants[node.input[1]].astype(np.float32).reshape(-1)


def _quantize(builder: ProgramBuilder, node: onnx.NodeProto) -> None:
    scale, zero_point = (builder.constants[name] for name in node.input[1:])
    limits = np.iinfo(zero_point.dtype)
    ends = [int(limits.min), int(limits.max)]
    attributes = {"scale": float(scale), "zero_point": int(zero_point), "range": ends}
    builder.add(node, "quantize", attributes=attributes)


def _greater_or_equal(builder: ProgramBuilder, node: onnx.NodeProto) -> None:
    """Convert x >= 0 ? 1 : -1 into a sign."""
    zero = builder.constants.get(node.input[1])
    for where in builder.graph.node:
        if where.op_type != "Where" or where.input[0] != node.output[0]:
            continue
        values = [builder.constants[name].reshape(-1)[0] for name in where.input[1:] if name in builder.constants]
        if zero is None or zero.any() or values != [1.0, -1.0]:
            raise _unsupported(node, "supports comparisons only against 0, and only to compute a sign")
        builder.add(where, "sign", node.input[0])


def _pool(builder: ProgramBuilder, node: onnx.NodeProto) -> None:
    given = _attributes(node)
    if _unless_default(given.get("dilations"), [1, 1]):
        raise _unsupported(node, "does not support dilated pooling")
    if given.get("ceil_mode", 0) or given.get("auto_pad", b"NOTSET") != b"NOTSET" or len(given["kernel_shape"]) != 2:
        raise _unsupported(node, "only supports 2-D pooling with explicit padding and without ceil_mode")
    attributes: dict[str, Any] = {**_window(given), "kernel": list(given["kernel_shape"])}
    if node.op_type == "AveragePool":
        attributes["count_pads"] = bool(given.get("count_include_pad", 0)) or None
    kind = "max_pool" if node.op_type == "MaxPool" else "average_pool"
    builder.add(node, kind, attributes=attributes)


def _mean(builder: ProgramBuilder, node: onnx.NodeProto) -> None:
    given = _attributes(node)
    axes = [int(axis) % 4 for axis in (builder.constants[node.input[1]] if len(node.input) > 1 else (2, 3))]
    if sorted(axes) != [2, 3]:
        raise _unsupported(node, f"only supports averages over height and width, not over axes {axes}")
    keep = node.op_type == "GlobalAveragePool" or bool(given.get("keepdims", 1))
    builder.add(node, "mean", attributes={"keep": keep or None})


def _reshape(builder: ProgramBuilder, node: onnx.NodeProto) -> None:
    """Convert a flatten, or a channel shuffle (reshape, transpose, reshape), which may end flat."""
    sides = builder.shapes.get(node.input[0], [0])  # (C, H, W)
    if node.op_type == "Flatten" or _flattens(builder, node, sides):
        builder.add(node, "flatten")
        return
    shape = builder.constants[node.input[1]].tolist()
    transposes = [other for other in builder.graph.node if other.input[0] == node.output[0]]
    last = [other for other in builder.graph.node if transposes and other.input[0] == transposes[0].output[0]]
    grouped = len(shape) == 5 and shape[3:] == sides[1:] and len(transposes) == len(last) == 1
    swapped = grouped and transposes[0].op_type == "Transpose" and last[0].op_type == "Reshape"
    if not swapped or list(_attributes(transposes[0])["perm"]) != [0, 2, 1, 3, 4]:
        raise _unsupported(node, "only supports reshapes that flatten or shuffle channels")
    builder.add(transposes[0], "shuffle", node.input[0], attributes={"groups": int(shape[1])})
    if _flattens(builder, last[0], sides):
        builder.add(last[0], "flatten", transposes[0].output[0])
    elif builder.shapes.get(last[0].output[0]) == sides:
        builder.aliases[last[0].output[0]] = transposes[0].output[0]
    else:
        raise _unsupported(last[0], "only supports channel shuffles that preserve the shape")


def _flattens(builder: ProgramBuilder, node: onnx.NodeProto, sides: list[int]) -> bool:
    """Return True if a reshape makes one row of each image of shape ``sides``."""
    shape = builder.constants[node.input[1]].tolist()
    return len(shape) == 2 and shape[1] in (-1, math.prod(sides))


def _clip(builder: ProgramBuilder, node: onnx.NodeProto) -> None:
    bounds = [float(builder.constants[name]) if name else default for name, default in
              zip([*node.input[1:], "", ""], (-math.inf, math.inf), strict=False)]  # fmt: skip
    builder.add(node, "clip", attributes={"bounds": bounds})


def _combine(kind: str) -> Callable[[ProgramBuilder, onnx.NodeProto], None]:
    def convert(builder: ProgramBuilder, node: onnx.NodeProto) -> None:
        if any(name in builder.constants for name in node.input):
            raise _unsupported(node, f"does not support {node.op_type} with a constant input")
        if kind == "concat" and _attributes(node)["axis"] not in (1, -3):
            raise _unsupported(node, "only supports concatenation along the channel axis")
        builder.add(node, kind, *node.input)

    return convert


def _batch_norm(builder: ProgramBuilder, node: onnx.NodeProto) -> None:
    gamma, beta, mean, variance = (builder.constants[name].astype(np.float64) for name in node.input[1:5])
    scale = gamma / np.sqrt(variance + _attributes(node).get("epsilon", 1e-5))
    bias = (beta - mean * scale).astype(np.float32)
    builder.add(node, "affine", scale=scale.astype(np.float32), bias=bias)


def _alias(builder: ProgramBuilder, node: onnx.NodeProto) -> None:
    builder.aliases[node.output[0]] = node.input[0]


def _window(given: dict[str, Any]) -> dict[str, Any]:
    """Return the stride and the pads of a convolution or pool; None for defaults."""
    pads = _unless_default(given.get("pads"), [0, 0, 0, 0])
    return {"stride": _unless_default(given.get("strides"), [1, 1]), "pads": pads}


def _unless_default(values: Any, default: list[int]) -> list[int] | None:
    found = default if values is None else list(values)
    return None if found == default else found


_CONVERTERS: dict[str, Callable[[ProgramBuilder, onnx.NodeProto], None]] = {
    "Conv": _conv, "Gemm": _gemm, "DequantizeLinear": _dequantize, "QuantizeLinear": _quantize,
    "Relu": lambda builder, node: builder.add(node, "relu"), "GreaterOrEqual": _greater_or_equal, "Where": _alias,
    "Clip": _clip, "MaxPool": _pool, "AveragePool": _pool, "GlobalAveragePool": _mean, "ReduceMean": _mean,
    "Reshape": _reshape, "Flatten": _reshape, "Transpose": _alias, "Add": _combine("add"), "Mul": _combine("mul"),
    "Concat": _combine("concat"), "BatchNormalization": _batch_norm, "Identity": _alias, "Dropout": _alias,
}  # fmt: skip
