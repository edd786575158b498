"""ONNX operators that pool, average, or move values."""

import math
from typing import Any

import numpy as np
import onnx

from micronet.packed.builder import Converter, ProgramBuilder, Unsupported, attributes_of, unless_default, window_of
from micronet.packed.resize import COORDINATES, ROUNDINGS


def _pool(builder: ProgramBuilder, node: onnx.NodeProto) -> None:
    given, kind = attributes_of(node), node.op_type
    if unless_default(given.get("dilations"), [1, 1]):
        raise Unsupported(f"{kind} with dilation is not supported")
    if given.get("auto_pad", b"NOTSET") != b"NOTSET" or len(given["kernel_shape"]) != 2:
        raise Unsupported(f"{kind} is only supported in 2-D and with explicit padding")
    attributes: dict[str, Any] = {**window_of(given), "kernel": list(given["kernel_shape"])}
    if given.get("ceil_mode", 0):
        sizes = builder.image_shape(node.input[0])[1:]
        attributes["extra"] = unless_default(
            [_beyond(attributes, axis, size) for axis, size in enumerate(sizes)], [0, 0]
        )
    if kind == "AveragePool":
        attributes["count_pads"] = bool(given.get("count_include_pad", 0)) or None
    builder.add(node, "max_pool" if kind == "MaxPool" else "average_pool", attributes=attributes)


def _beyond(attributes: dict[str, Any], axis: int, size: int) -> int:
    """Return by how much the last window exceeds the padded map if its number is rounded up.

    It must start on the map or on the padding before it.
    """
    kernel, stride = attributes["kernel"][axis], (attributes["stride"] or [1, 1])[axis]
    pads = attributes["pads"] or [0, 0, 0, 0]
    padded = size + pads[axis] + pads[axis + 2]
    windows = -(-(padded - kernel) // stride) + 1
    windows -= (windows - 1) * stride >= size + pads[axis]
    return int(max(0, (windows - 1) * stride + kernel - padded))


def _reduce(builder: ProgramBuilder, node: onnx.NodeProto) -> None:
    """Convert averages and maxima over height and width."""
    given, maximum = attributes_of(node), "Max" in node.op_type
    of_globe = node.op_type.startswith("Global")
    axes = (2, 3) if of_globe else builder.constants[node.input[1]] if len(node.input) > 1 else given.get("axes", ())
    rank = len(builder.shapes.get(node.input[0], [0, 0, 0])) + 1
    if rank != 4 or sorted(int(axis) % 4 for axis in axes) != [2, 3]:
        raise Unsupported(
            f"{node.op_type} is only supported over height and width, not over axes {list(map(int, axes))}"
        )
    keep = of_globe or bool(given.get("keepdims", 1))
    if not maximum:
        builder.add(node, "mean", attributes={"keep": keep or None})
        return
    _, *sides = builder.image_shape(node.input[0])
    output = node.output[0] if keep else f"{node.output[0]}/pixel"
    value = builder.add(node, "max_pool", attributes={"kernel": sides}, output=output)
    if not keep:
        builder.add(node, "flatten", value)


def _reshape(builder: ProgramBuilder, node: onnx.NodeProto) -> None:
    """Convert a flatten, (N, C) to (N, C, 1, 1), or a channel shuffle, which may end flat.

    A shuffle is a reshape, a transpose and a reshape.
    """
    sides = builder.shapes.get(node.input[0], [0])  # (C, H, W)
    if node.op_type == "Flatten":
        if attributes_of(node).get("axis", 1) != 1:
            raise Unsupported("Flatten is only supported with axis 1")
        builder.add(node, "flatten")
        return
    if len(sides) == 1 and builder.shapes.get(node.output[0]) == [*sides, 1, 1]:
        builder.add(node, "unflatten")
        return
    if node.input[1] not in builder.constants:
        raise Unsupported("Reshape is only supported with a constant shape")
    if _flattens(builder, node, sides):
        builder.add(node, "flatten")
        return
    shape = builder.constants[node.input[1]].tolist()
    transposes = [other for other in builder.graph.node if other.input and other.input[0] == node.output[0]]
    last = [
        other
        for other in builder.graph.node
        if transposes and other.input and other.input[0] == transposes[0].output[0]
    ]
    grouped = len(shape) == 5 and shape[3:] == sides[1:] and len(transposes) == len(last) == 1
    swapped = grouped and transposes[0].op_type == "Transpose" and last[0].op_type == "Reshape"
    if not swapped or list(attributes_of(transposes[0])["perm"]) != [0, 2, 1, 3, 4]:
        raise Unsupported("Reshape and Transpose are only supported to flatten feature maps or to shuffle channels")
    flat = _flattens(builder, last[0], sides)
    if not flat and builder.shapes.get(last[0].output[0]) != sides:
        raise Unsupported("channel shuffles are only supported if they preserve the shape")
    builder.add(transposes[0], "shuffle", node.input[0], attributes={"groups": int(shape[1])})
    builder.aliases[node.output[0]] = node.input[0]
    if flat:
        builder.add(last[0], "flatten", transposes[0].output[0])
    else:
        builder.aliases[last[0].output[0]] = transposes[0].output[0]


def _flattens(builder: ProgramBuilder, node: onnx.NodeProto, sides: list[int]) -> bool:
    """Return True if a reshape makes one row of each image of shape ``sides``."""
    shape = builder.constants[node.input[1]].tolist()
    return len(shape) == 2 and shape[1] in (-1, math.prod(sides))


def _squeeze(builder: ProgramBuilder, node: onnx.NodeProto) -> None:
    """Convert the removal of height and width, in one or two steps, into a flatten."""
    rank = len(builder.shapes.get(node.input[0], [0, 0, 0])) + 1
    axes = (
        {int(axis) % rank for axis in builder.constants.get(node.input[1], np.zeros(0))} if len(node.input) > 1 else {0}
    )
    if not axes or not axes <= {2, 3}:
        raise Unsupported("Squeeze is only supported for height and width")
    builder.add(node, "flatten")


def _unsqueeze(builder: ProgramBuilder, node: onnx.NodeProto) -> None:
    """Convert the addition of height and width to (N, C), as in squeeze-and-excitation."""
    rank = len(builder.shapes.get(node.input[0], [0, 0, 0])) + 1
    axes = builder.constants.get(node.input[1], np.zeros(0)) if len(node.input) > 1 else np.zeros(0)
    if rank != 2 or sorted(int(axis) % 4 for axis in axes) != [2, 3]:
        raise Unsupported("Unsqueeze is only supported to add height and width to (N, C)")
    builder.add(node, "unflatten")


def _expand(builder: ProgramBuilder, node: onnx.NodeProto) -> None:
    """Convert the repetition of one row or column into a resize."""
    before, after = builder.image_shape(node.input[0]), builder.image_shape(node.output[0])
    if before[0] != after[0]:
        raise Unsupported("Expand is only supported for height and width")
    factors = [out / size for size, out in zip(before[1:], after[1:], strict=True)]
    attributes = {"size": after[1:], "factors": factors, "coordinates": "asymmetric", "nearest": "floor"}
    builder.add(node, "resize", attributes=attributes)


def _concat(builder: ProgramBuilder, node: onnx.NodeProto) -> None:
    rank = len(builder.shapes.get(node.input[0], [0, 0, 0])) + 1
    if attributes_of(node)["axis"] % rank != 1:
        raise Unsupported("Concat is only supported along the channel axis")
    if any(builder.constant(name) is not None for name in node.input):
        raise Unsupported("Concat with a constant is not supported")
    builder.add(node, "concat", *node.input)


def _resize(builder: ProgramBuilder, node: onnx.NodeProto) -> None:
    given = attributes_of(node)
    mode, coordinates, nearest = (
        given.get(name, default.encode()).decode()
        for name, default in (("mode", "nearest"), ("coordinate_transformation_mode", "half_pixel"),
                              ("nearest_mode", "round_prefer_floor"))
    )  # fmt: skip
    plain = not (given.get("antialias", 0) or given.get("exclude_outside", 0) or given.get("axes"))
    if mode not in ("nearest", "linear") or coordinates not in COORDINATES or nearest not in ROUNDINGS or not plain:
        raise Unsupported("Resize is only supported in nearest or bilinear mode, without antialiasing")
    before, after = builder.image_shape(node.input[0]), builder.image_shape(node.output[0])
    if before[0] != after[0]:
        raise Unsupported("Resize is only supported for height and width")
    scales = builder.constants.get(node.input[2]) if len(node.input) > 2 else None
    factors = [out / size for size, out in zip(before[1:], after[1:], strict=True)]
    if scales is not None and scales.size == 4:
        factors = [float(scale) for scale in scales[2:]]
    attributes = {"size": after[1:], "factors": factors, "coordinates": coordinates}
    builder.add(node, "resize", attributes={**attributes, "nearest": nearest if mode == "nearest" else None})


def _depth_to_space(builder: ProgramBuilder, node: onnx.NodeProto) -> None:
    given, value = attributes_of(node), node.input[0]
    block, channels = given["blocksize"], builder.image_shape(node.output[0])[0]
    if given.get("mode", b"DCR") == b"CRD":
        value = builder.add(node, "shuffle", attributes={"groups": channels}, output=f"{node.output[0]}/shuffled")
    builder.add(node, "depth_to_space", value, attributes={"block": [block, block]})


def _slice(builder: ProgramBuilder, node: onnx.NodeProto) -> None:
    bounds = [builder.constants[name].tolist() for name in node.input[1:] if name in builder.constants]
    shape = builder.image_shape(node.input[0])
    if len(bounds) < 3 or len(bounds) < len(node.input) - 1:
        raise Unsupported("Slice is only supported with constant bounds")
    begin, end, stride = [0, 0, 0], list(shape), [1, 1, 1]
    steps = bounds[3] if len(bounds) > 3 else [1] * len(bounds[0])
    for first, last, axis, step in zip(*bounds[:3], steps, strict=True):
        place = axis % 4 - 1
        if place < 0 or step < 1 or (place == 0 and step > 1):
            raise Unsupported(
                "Slice is only supported along channels (with step 1), height and width (with positive steps)"
            )
        begin[place], end[place], stride[place] = *slice(first, last).indices(shape[place])[:2], step
    _cut(builder, node, begin, end, stride)


def _cut(
    builder: ProgramBuilder, node: onnx.NodeProto, begin: list[int], end: list[int], stride: list[int], **parts: Any
) -> None:
    extent = [-(-(last - first) // step) for first, last, step in zip(begin, end, stride, strict=True)]
    if min(extent) < 1:
        raise Unsupported(f"{node.op_type} with an empty result is not supported")
    attributes = {"begin": begin, "extent": extent, "stride": unless_default(stride[1:], [1, 1])}
    builder.add(node, "slice", attributes=attributes, **parts)


def _split(builder: ProgramBuilder, node: onnx.NodeProto) -> None:
    shape = builder.image_shape(node.input[0])
    if attributes_of(node).get("axis", 0) % 4 != 1:
        raise Unsupported("Split is only supported along the channel axis")
    first = 0
    for name in node.output:
        channels = builder.image_shape(name)[0]
        _cut(builder, node, [first, 0, 0], [first + channels, *shape[1:]], [1, 1, 1], output=name)
        first += channels


def _pad(builder: ProgramBuilder, node: onnx.NodeProto) -> None:
    given = attributes_of(node)
    amounts = builder.constants.get(node.input[1]) if len(node.input) > 1 else None
    value = builder.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(1)
    if (
        given.get("mode", b"constant") != b"constant"
        or amounts is None
        or amounts.size != 8
        or value is None
        or value.any()
    ):
        raise Unsupported("Pad is only supported with zeros and constant padding sizes")
    pads = [int(amounts[place]) for place in (2, 3, 6, 7)]
    if amounts.sum() != sum(pads) or min(pads) < 0:
        raise Unsupported("Pad is only supported along height and width, with nonnegative sizes")
    builder.add(node, "pad", attributes={"pads": pads})


SHAPES: dict[str, Converter] = {
    "MaxPool": _pool, "AveragePool": _pool, "Reshape": _reshape, "Flatten": _reshape, "Squeeze": _squeeze,
    **dict.fromkeys(("GlobalAveragePool", "ReduceMean", "GlobalMaxPool", "ReduceMax"), _reduce),
    "Concat": _concat, "Resize": _resize, "DepthToSpace": _depth_to_space, "Slice": _slice, "Split": _split,
    "Pad": _pad, "Unsqueeze": _unsqueeze, "Expand": _expand,
}  # fmt: skip
