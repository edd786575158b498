"""ONNX operators with weights: convolutions, transposed convolutions and linear layers."""

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from micronet.packed.builder import Converter, ProgramBuilder, Unsupported, attributes_of, unless_default, window_of


def _conv(builder: ProgramBuilder, node: onnx.NodeProto) -> None:
    given = attributes_of(node)
    weight, scale = builder.weight(node.input[1])
    _require_explicit(node, weight, given)
    group = given.get("group", 1)
    attributes = {
        **window_of(given),
        "group": group if group > 1 else None,
        "dilation": unless_default(given.get("dilations"), [1, 1]),
    }
    builder.add(node, "conv", attributes=attributes, weight=weight, scale=scale, bias=_bias(builder, node))


def _require_explicit(node: onnx.NodeProto, weight: NDArray[Any], given: dict[str, Any]) -> None:
    if weight.ndim != 4 or given.get("auto_pad", b"NOTSET") != b"NOTSET":
        raise Unsupported(f"{node.op_type} is only supported in 2-D and with explicit padding")


def _gemm(builder: ProgramBuilder, node: onnx.NodeProto) -> None:
    given = attributes_of(node)
    weight, scale = builder.weight(node.input[1])
    if given.get("alpha", 1.0) != 1 or given.get("beta", 1.0) != 1 or given.get("transA", 0):
        raise Unsupported("Gemm with alpha, beta or transA is not supported")
    weight = weight if given.get("transB", 0) else np.ascontiguousarray(weight.T)
    builder.add(node, "linear", weight=weight, scale=scale, bias=_bias(builder, node))


def _bias(builder: ProgramBuilder, node: onnx.NodeProto) -> NDArray[Any] | None:
    if len(node.input) < 3 or not node.input[2]:
        return None
    bias, scale = builder.weight(node.input[2])
    if scale is None:
        return bias
    in_float = builder.weight(node.input[1])[1] is None  # then the bias has a unit of its own, not the sums'
    return (bias * scale).astype(np.float32) if in_float else bias.astype(np.int32)


def _conv_transpose(builder: ProgramBuilder, node: onnx.NodeProto) -> None:
    """Convert a transposed convolution into a convolution for each of its stride's phases, and interleave them.

    With o + p = q * s + r, output o sums input q - m times tap r + m * s: a convolution with ceil(k / s) taps whose
    outputs are the phases r. Outputs before o = 0 and after the last one are cut off.
    """
    given = attributes_of(node)
    weight, scale = builder.weight(node.input[1])  # (inputs, outputs / groups, rows, columns)
    _require_explicit(node, weight, given)
    groups, stride = given.get("group", 1), list(given.get("strides", [1, 1]))
    weight, pads = _dilated(weight, given.get("dilations", [1, 1])), list(given.get("pads", [0, 0, 0, 0]))
    if any(pad >= size for pad, size in zip(pads, 2 * weight.shape[2:], strict=True)):
        raise Unsupported("ConvTranspose is only supported with padding smaller than its kernel")
    channels, *sides = builder.image_shape(node.input[0])
    outputs = builder.image_shape(node.output[0])
    rows, columns = (
        _phase_window(*axis) for axis in zip(sides, outputs[1:], weight.shape[2:], stride, pads, strict=False)
    )
    if scale is not None and scale.size > 1:
        if builder.axes[node.input[1]] != 1:
            raise Unsupported("ConvTranspose with one weight scale per input channel is not supported")
        scale = np.tile(scale, groups)
    each = weight.shape[1]
    weight = weight.reshape(groups, channels // groups, each, *weight.shape[2:]).swapaxes(1, 2)
    weight = weight.reshape(groups * each, channels // groups, *weight.shape[3:])
    phases = [_phase_taps(weight, stride, row, column) for row in range(stride[0]) for column in range(stride[1])]
    by_group = groups > 1  # then the phases of an output are side by side, so that a group's outputs are
    parts = {
        name: values if values is None or values.size == 1 < outputs[0]
        else np.stack([values] * len(phases), 1 if by_group else 0).reshape(-1)
        for name, values in (("scale", scale), ("bias", _bias(builder, node)))
    }  # fmt: skip
    parts["weight"] = np.stack(phases, 1 if by_group else 0).reshape(-1, *phases[0].shape[1:])
    padding = unless_default([rows[0], columns[0], rows[1], columns[1]], [0, 0, 0, 0])
    attributes = {"group": groups if by_group else None, "pads": padding}
    value = builder.add(node, "conv", attributes=attributes, output=f"{node.output[0]}/phases", **parts)
    if by_group:
        value = builder.add(
            node, "shuffle", value, attributes={"groups": len(weight)}, output=f"{node.output[0]}/shuffled"
        )
    crop = unless_default([rows[2], columns[2], rows[3], columns[3]], [0, 0, 0, 0])
    builder.add(node, "depth_to_space", value, attributes={"block": stride, "crop": crop})


def _dilated(weight: NDArray[Any], dilation: list[int]) -> NDArray[Any]:
    """Return weights with the zeros between them that a dilation means."""
    rows, columns = ((size - 1) * step + 1 for size, step in zip(weight.shape[2:], dilation, strict=True))
    spread = np.zeros((*weight.shape[:2], rows, columns), weight.dtype)
    spread[:, :, :: dilation[0], :: dilation[1]] = weight
    return spread


def _phase_window(size: int, length: int, kernel: int, stride: int, pad: int) -> tuple[int, int, int, int]:
    """Return a transposed convolution's padding before and after an axis of ``size``, and what to crop of its output.

    length: of the output. pad: what the transposed convolution cuts off at the start.
    """
    taps, first = -(-kernel // stride), pad // stride
    count = (pad + length - 1) // stride - first + 1
    before = taps - 1 - first
    return before, count + taps - 1 - size - before, pad % stride, count * stride - pad % stride - length


def _phase_taps(weight: NDArray[Any], stride: list[int], row: int, column: int) -> NDArray[Any]:
    """Return the taps row + m * stride for falling m, with zeros where the kernel has none, and so for the columns."""
    rows, columns = (-(-size // step) for size, step in zip(weight.shape[2:], stride, strict=True))
    taps = np.zeros((*weight.shape[:2], rows, columns), weight.dtype)
    own = weight[:, :, row :: stride[0], column :: stride[1]]
    taps[:, :, : own.shape[2], : own.shape[3]] = own
    return np.ascontiguousarray(taps[:, :, ::-1, ::-1])


LAYERS: dict[str, Converter] = {"Conv": _conv, "ConvTranspose": _conv_transpose, "Gemm": _gemm}
