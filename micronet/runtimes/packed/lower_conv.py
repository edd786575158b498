"""Lowering of convolutions and linear layers, one kernel call per channel group."""

import math
from typing import Any

from micronet.packed.program import Operation
from micronet.runtimes.packed import conv_constants
from micronet.runtimes.packed.conv_constants import ConvGroup, merge_groups
from micronet.runtimes.packed.kernel_call import Epilogue, KernelCall
from micronet.runtimes.packed.kernels import instructions
from micronet.runtimes.packed.kernels.cpu import BITS, FLOAT32, UINT8
from micronet.runtimes.packed.lowering_state import LoweringState
from micronet.runtimes.packed.memory import Array, FeatureMap, UnsupportedProgram
from micronet.runtimes.packed.weight_layout import MAX_DIFFERING, max_differing


def lower_conv(state: LoweringState, index: int, operation: Operation, x: FeatureMap) -> None:
    """Lower a convolution, linear layer or threshold, with the operations that follow it."""
    weight, attributes = _conv_form(operation, x)
    arithmetic = conv_constants.choose_arithmetic(weight, x)
    x = state.floats(x) if arithmetic == FLOAT32 else x
    weight, groups = weight.transpose(0, 2, 3, 1), attributes.get("group", 1)
    if weight.shape[3] * groups != x.channels or len(weight) % groups:
        raise UnsupportedProgram("layers with mismatched sizes")
    stride, dilation = attributes.get("stride", [1, 1]), attributes.get("dilation", [1, 1])
    pads = attributes.get("pads", [0, 0, 0, 0])
    rows, columns = (
        (size + pads[axis] + pads[axis + 2] - (weight.shape[1 + axis] - 1) * dilation[axis] - 1) // stride[axis] + 1
        for axis, size in enumerate((x.rows, x.columns))
    )
    epilogue = Epilogue(index + 1, dtype=BITS) if operation.kind == "threshold" else state.fuse(index)
    out = state.output(epilogue, rows, columns, len(weight))
    out.flat = operation.kind == "linear" and x.flat
    depthwise = arithmetic == UINT8 and weight.shape[3] == 1 and groups == len(weight) and out.dtype != BITS
    merged, groups = (weight, 1) if depthwise else merge_groups(weight, groups, arithmetic, out.dtype)
    if arithmetic == BITS and max_differing(merged) > MAX_DIFFERING:  # zeros between merged groups count too
        arithmetic, x = conv_constants.float_arithmetic(weight), state.floats(x)
        merged, groups = merge_groups(weight, attributes.get("group", 1), arithmetic, out.dtype)
    inputs, each = merged.shape[3], len(merged) // groups
    read = x
    if arithmetic == BITS and groups > 1 and inputs % 32:
        read = state.new_map(BITS, x.rows, x.columns, groups * -(-inputs // 32) * 32)
        state.call(instructions.ALIGN, x, read, groups=groups, channels=x.channels)
    read.pads = [max(pair) for pair in zip(read.pads, pads, strict=True)]
    fields = {
        "opcode": instructions.CONV, "depthwise": depthwise, "arithmetic": arithmetic, "stride_y": stride[0],
        "stride_x": stride[1], "channels": each, **epilogue.fields(),
    }  # fmt: skip
    for number in range(groups):
        outputs = slice(number * each, (number + 1) * each)
        own, factor = conv_constants.split_factor(merged[outputs], arithmetic)
        group = ConvGroup(operation, outputs, own, factor, arithmetic, x, pads, stride, dilation, (rows, columns))
        own_fields = {"barrier": number == groups - 1, **group.constant_fields(state.constants, epilogue)}
        state.calls.append(KernelCall(
            fields | own_fields, read, out, pads=pads, dilation=dilation, weight=own,
            x_channel=number * read.channels // groups, out_channel=number * each,
        ))  # fmt: skip


def _conv_form(operation: Operation, x: FeatureMap) -> tuple[Array, dict[str, Any]]:
    """Return the weight (outputs, inputs, rows, columns) and attributes of a layer, a linear one as a convolution."""
    weight, attributes = operation.weight, operation.attributes
    assert weight is not None
    if operation.kind == "linear":
        shape = (x.rows, x.columns) if x.flat else (1, 1)
        if weight.shape[1] != x.channels * math.prod(shape) or (not x.flat and x.rows * x.columns > 1):
            raise UnsupportedProgram("a linear layer that is applied to each pixel of a feature map")
        weight, attributes = weight.reshape(len(weight), x.channels, *shape), {}
    if any(part is not None and part.size != len(weight) for part in (operation.bias, operation.limits)):
        raise UnsupportedProgram("a bias or threshold that does not have exactly one value per output")
    if operation.kind == "threshold" and (x.dtype == FLOAT32 or weight.dtype.kind != "i" or operation.limits is None):
        raise UnsupportedProgram("a threshold layer with float inputs or weights, or without limits")
    return weight, attributes
