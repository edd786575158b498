"""From an ONNX model, as ``to_onnx`` makes it, to the smallest form that runs: a packed program.

Dequantized integers stay integers; what ``thresholds`` can do without floats is done without.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from micronet.errors import MicronetError
from micronet.packed.program import Program
from micronet.packed.thresholds import Draft, fuse_thresholds, move_signs
from micronet.runtimes.onnxruntime import metadata


def pack_model(proto: onnx.ModelProto) -> Program:
    """Return a model as a packed program.

    Raises MicronetError that names what the packed runtime does not have, before anything runs.
    """
    draft = Draft(proto)
    lacking = sorted({node.op_type for node in proto.graph.node if node.op_type not in _TRANSLATE})
    if lacking:
        raise MicronetError(f"the packed runtime does not have {', '.join(lacking)}; use the ONNX file")
    for node in proto.graph.node:
        if node.output[0] not in draft.steps and node.output[0] not in draft.alias:
            _TRANSLATE[node.op_type](draft, node)
    move_signs(draft)
    fuse_thresholds(draft, draft.name(proto.graph.output[0].name))
    return _numbered(draft, proto)


def _numbered(draft: Draft, proto: onnx.ModelProto) -> Program:
    """Return the operations that the output needs, in an order that works, by number."""
    order: list[str] = []
    _visit(draft, draft.name(proto.graph.output[0].name), order)
    number = {proto.graph.input[0].name: 0} | {name: index for index, name in enumerate(order, 1)}
    for name in order:
        operation, inputs = draft.steps[name]
        operation.inputs = [number[item] for item in inputs]
    dims = [dim.dim_value for dim in proto.graph.input[0].type.tensor_type.shape.dim]
    if len(dims) != 4 or 0 in dims[1:]:
        raise MicronetError("a packed network is of images of one size; export without free sides")
    about = {key: value for key, value in metadata(proto).items() if key in ("model", "data")}
    about["stages"] = [record.get("stage") for record in metadata(proto).get("history") or []]
    return Program([draft.steps[name][0] for name in order], dims[1:], about)


def _visit(draft: Draft, name: str, order: list[str]) -> None:
    stack = [(name, False)]
    while stack:
        current, ready = stack.pop()
        if current not in draft.steps or current in order:
            continue
        if ready:
            order.append(current)
            continue
        stack.append((current, True))
        stack += [(item, False) for item in reversed(draft.steps[current][1])]


def _integers(draft: Draft, value: str) -> tuple[NDArray[Any], NDArray[np.float32] | None]:
    """Return a stored tensor as integers and their scale, or as float32 alone."""
    if value in draft.stored:
        return draft.stored[value].astype(np.float32), None
    if value in draft.weights:
        return draft.weights[value]
    raise MicronetError(f"{value} is computed, not stored; the packed runtime multiplies by stored weights alone")


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}


def _conv(draft: Draft, node: onnx.NodeProto) -> None:
    at = _attributes(node)
    weight, scale = _integers(draft, node.input[1])
    if weight.ndim != 4 or at.get("auto_pad", b"NOTSET") != b"NOTSET":
        raise MicronetError(f"{node.name}: the packed runtime has convolutions of images, with their pads written down")
    told = {
        "group": at.get("group", 1) if at.get("group", 1) > 1 else None,
        "stride": _unless(at.get("strides"), [1, 1]),
        "pads": _unless(at.get("pads"), [0, 0, 0, 0]),
        "dilation": _unless(at.get("dilations"), [1, 1]),
    }
    draft.add(node, "conv", [node.input[0]], at=told, weight=weight, scale=scale, bias=_bias(draft, node))


def _gemm(draft: Draft, node: onnx.NodeProto) -> None:
    at = _attributes(node)
    weight, scale = _integers(draft, node.input[1])
    if at.get("alpha", 1.0) != 1 or at.get("beta", 1.0) != 1 or at.get("transA", 0):
        raise MicronetError(f"{node.name}: the packed runtime has no scaled or transposed products")
    weight = weight if at.get("transB", 0) else np.ascontiguousarray(weight.T)
    draft.add(node, "linear", [node.input[0]], weight=weight, scale=scale, bias=_bias(draft, node))


def _bias(draft: Draft, node: onnx.NodeProto) -> NDArray[Any] | None:
    if len(node.input) < 3 or not node.input[2]:
        return None
    bias, scale = _integers(draft, node.input[2])
    return bias if scale is None else bias.astype(np.int32)


def _dequantize(draft: Draft, node: onnx.NodeProto) -> None:
    if node.input[0] not in draft.stored:
        draft.alias[node.output[0]] = node.input[0]  # an activation: it stays integers
        return
    q = draft.stored[node.input[0]].astype(np.int32)
    axis = _attributes(node).get("axis", 1)
    along = [-1 if index == axis else 1 for index in range(q.ndim)]
    if len(node.input) > 2:
        q = q - draft.stored[node.input[2]].astype(np.int32).reshape(along)
    draft.weights[node.output[0]] = q, draft.stored[node.input[1]].astype(np.float32).reshape(-1)


def _quantize(draft: Draft, node: onnx.NodeProto) -> None:
    zero_point = draft.stored[node.input[2]]
    limits = np.iinfo(zero_point.dtype)
    told = {
        "scale": float(draft.stored[node.input[1]]),
        "zero_point": int(zero_point),
        "range": [int(limits.min), int(limits.max)],
    }
    draft.add(node, "quantize", [node.input[0]], at=told)


def _greater(draft: Draft, node: onnx.NodeProto) -> None:
    wheres = [other for other in draft.graph.node if other.op_type == "Where" and other.input[0] == node.output[0]]
    zero = draft.stored.get(node.input[1])
    for where in wheres:
        ends = [float(draft.stored[name].reshape(-1)[0]) for name in where.input[1:] if name in draft.stored]
        if zero is None or zero.any() or ends != [1.0, -1.0]:
            raise MicronetError(f"{node.name}: the packed runtime compares with 0 alone, for a sign")
        draft.add(where, "sign", [node.input[0]])


def _pool(draft: Draft, node: onnx.NodeProto) -> None:
    at = _attributes(node)
    if _unless(at.get("dilations"), [1, 1]):
        raise MicronetError(f"{node.name}: the packed runtime has no pools with gaps (dilation)")
    if at.get("ceil_mode", 0) or at.get("auto_pad", b"NOTSET") != b"NOTSET" or len(at["kernel_shape"]) != 2:
        raise MicronetError(f"{node.name}: the packed runtime has pools of images without ceil_mode")
    told: dict[str, Any] = {
        "kernel": list(at["kernel_shape"]),
        "stride": _unless(at.get("strides"), [1, 1]),
        "pads": _unless(at.get("pads"), [0, 0, 0, 0]),
    }
    if node.op_type == "AveragePool":
        told["count_pads"] = bool(at.get("count_include_pad", 0)) or None
    draft.add(node, "max_pool" if node.op_type == "MaxPool" else "average_pool", [node.input[0]], at=told)


def _mean(draft: Draft, node: onnx.NodeProto) -> None:
    at = _attributes(node)
    axes = [int(axis) % 4 for axis in (draft.stored[node.input[1]] if len(node.input) > 1 else (2, 3))]
    if sorted(axes) != [2, 3]:
        raise MicronetError(f"{node.name}: the packed runtime averages over height and width alone")
    keep = node.op_type == "GlobalAveragePool" or bool(at.get("keepdims", 1))
    draft.add(node, "mean", [node.input[0]], at={"keep": keep or None})


def _reshape(draft: Draft, node: onnx.NodeProto) -> None:
    """A flatten, or the first of reshape, transpose, reshape: a channel shuffle, with a flatten in its last or none."""
    sides = draft.sides.get(node.input[0], [0])  # (C, H, W)
    if node.op_type == "Flatten" or _flattens(draft, node, sides):
        draft.add(node, "flatten", [node.input[0]])
        return
    shape = draft.stored[node.input[1]].tolist()
    transposes = [other for other in draft.graph.node if other.input[0] == node.output[0]]
    lasts = [other for other in draft.graph.node if transposes and other.input[0] == transposes[0].output[0]]
    parted = len(shape) == 5 and shape[3:] == sides[1:] and len(transposes) == len(lasts) == 1
    swapped = parted and transposes[0].op_type == "Transpose" and lasts[0].op_type == "Reshape"
    if not swapped or list(_attributes(transposes[0])["perm"]) != [0, 2, 1, 3, 4]:
        raise MicronetError(f"{node.name}: the packed runtime reshapes to shuffle channels or to flatten alone")
    draft.add(transposes[0], "shuffle", [node.input[0]], at={"groups": int(shape[1])})
    if _flattens(draft, lasts[0], sides):
        draft.add(lasts[0], "flatten", [transposes[0].output[0]])
    elif draft.sides.get(lasts[0].output[0]) == sides:
        draft.alias[lasts[0].output[0]] = transposes[0].output[0]
    else:
        raise MicronetError(f"{lasts[0].name}: the packed runtime shuffles channels within maps of one size")


def _flattens(draft: Draft, node: onnx.NodeProto, sides: list[int]) -> bool:
    """Return whether a reshape makes one row of each image."""
    shape = draft.stored[node.input[1]].tolist()
    return len(shape) == 2 and shape[1] in (-1, math.prod(sides))


def _unary(kind: str) -> Callable[[Draft, onnx.NodeProto], None]:
    return lambda draft, node: draft.add(node, kind, [node.input[0]])


def _clip(draft: Draft, node: onnx.NodeProto) -> None:
    ends = [float(draft.stored[name]) if name else end for name, end in
            zip([*node.input[1:], "", ""], (-math.inf, math.inf), strict=False)]  # fmt: skip
    draft.add(node, "clip", [node.input[0]], at={"bounds": ends})


def _several(kind: str) -> Callable[[Draft, onnx.NodeProto], None]:
    def translate(draft: Draft, node: onnx.NodeProto) -> None:
        if any(name in draft.stored for name in node.input):
            raise MicronetError(f"{node.name}: the packed runtime does not combine with a stored tensor")
        if kind == "concat" and _attributes(node)["axis"] not in (1, -3):
            raise MicronetError(f"{node.name}: the packed runtime joins channels alone")
        draft.add(node, kind, list(node.input))

    return translate


def _norm(draft: Draft, node: onnx.NodeProto) -> None:
    gamma, beta, mean, variance = (draft.stored[name].astype(np.float64) for name in node.input[1:5])
    factor = gamma / np.sqrt(variance + _attributes(node).get("epsilon", 1e-5))
    shift = (beta - mean * factor).astype(np.float32)
    draft.add(node, "affine", [node.input[0]], scale=factor.astype(np.float32), bias=shift)


def _same(draft: Draft, node: onnx.NodeProto) -> None:
    draft.alias[node.output[0]] = node.input[0]


def _unless(values: Any, usual: list[int]) -> list[int] | None:
    found = usual if values is None else list(values)
    return None if found == usual else found


_TRANSLATE: dict[str, Callable[[Draft, onnx.NodeProto], None]] = {
    "Conv": _conv, "Gemm": _gemm, "DequantizeLinear": _dequantize, "QuantizeLinear": _quantize,
    "GreaterOrEqual": _greater, "Where": _same, "Relu": _unary("relu"), "Clip": _clip, "MaxPool": _pool,
    "AveragePool": _pool, "GlobalAveragePool": _mean, "ReduceMean": _mean, "Reshape": _reshape, "Flatten": _reshape,
    "Transpose": _same, "Add": _several("add"), "Mul": _several("mul"), "Concat": _several("concat"),
    "BatchNormalization": _norm, "Identity": _same, "Dropout": _same,
}  # fmt: skip
