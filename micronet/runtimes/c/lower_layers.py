"""Lowering of convolutions and linear layers to calls of kernels."""

from typing import Any

import numpy as np

from micronet.packed.program import Operation
from micronet.runtimes.c import weights
from micronet.runtimes.c.maps import BITS, BYTES, FLOATS, Map
from micronet.runtimes.c.state import Fused, State
from micronet.runtimes.c.weights import Array, Stored

EXACT = 2**53  # sums of integers that numpy computes exactly
INT32 = 2**31 - 1


def lower_layer(state: State, operation: Operation, x: Map) -> None:
    """Lower a convolution, a linear layer, or a convolution with thresholds, and what follows it."""
    weight, attributes, x = _conv_form(state, operation, x)
    groups = attributes.get("group", 1)
    stride, dilation = attributes.get("stride", [1, 1]), attributes.get("dilation", [1, 1])
    pads, kernel = attributes.get("pads", [0, 0, 0, 0]), weight.shape[1:3]
    rows, columns = (
        (size + pads[axis] + pads[axis + 2] - (kernel[axis] - 1) * dilation[axis] - 1) // stride[axis] + 1
        for axis, size in enumerate((x.rows, x.columns))
    )
    if rows < 1 or columns < 1 or weight.shape[3] * groups != x.channels or len(weight) % groups:
        raise state.mismatch()
    stored, x = _store(state, weight, groups, x)
    if operation.kind == "threshold":
        fused = Fused(state.index + 1)
        fused.target = {"type": BITS}
    else:
        fused = state.fuse(state.index + 1)
    out = state.output(fused, rows, columns, len(weight))
    out.vector = operation.kind == "linear"
    numbers = _numbers(state, operation, stored, weight, x)
    layer = state.struct(
        "layer", weight=state.table(stored.table),
        centre=None if stored.centre is None else state.table(stored.centre), **numbers, **state.steps(fused),
        factor=1 if "limits" in numbers and stored.kernel == "conv_bits" else stored.factor,
        offset=stored.offset, width=stored.width, groups=groups, each=len(weight) // groups, inputs=weight.shape[3],
        size=weight[0].size, kernel_rows=kernel[0], kernel_columns=kernel[1], stride_rows=stride[0],
        stride_columns=stride[1], dilation_rows=dilation[0], dilation_columns=dilation[1], pad_top=pads[0],
        pad_left=pads[1],
    )  # fmt: skip
    state.call(stored.kernel, [x], [out], layer)
    size = weight[0].size
    patch = {"conv_bits": 16 * -(-size // 64), "conv_floats": 4 * size, "conv_bytes": size, "conv_levels": size}
    state.patch_bytes = max(state.patch_bytes, patch.get(stored.kernel, 0))


def _conv_form(state: State, operation: Operation, x: Map) -> tuple[Array, dict[str, Any], Map]:
    """Return the weight (outputs, rows, columns, inputs) and attributes of a layer, a linear one as a convolution."""
    weight, attributes = operation.weight, operation.attributes
    assert weight is not None
    if operation.kind == "linear":
        if weight.ndim != 2 or weight.shape[1] != x.channels * (x.pixels if x.flat else 1):
            raise state.mismatch()
        shape = (x.rows, x.columns) if x.flat else (1, 1)
        weight, attributes = weight.reshape(len(weight), x.channels, *shape), {}
    else:
        x = state.materialize(x)
    if weight.ndim != 4 or any(
        part is not None and part.size != len(weight) for part in (operation.bias, operation.limits)
    ):
        raise state.mismatch()
    if operation.scale is not None and operation.scale.size not in (1, len(weight)):
        raise state.mismatch()
    if operation.kind == "threshold" and (x.type == FLOATS or weight.dtype.kind == "f" or operation.limits is None):
        raise state.refuse("thresholds of float sums")
    return weight.transpose(0, 2, 3, 1), attributes, x


def _store(state: State, weight: Array, groups: int, x: Map) -> tuple[Stored, Map]:
    """Return the weight as the kernel for its input reads it, and that input."""
    depthwise = weight.shape[3] == 1 and groups == len(weight)
    if x.type == FLOATS or weight.dtype.kind == "f":
        found = weights.store_depthwise(weight, floats=True) if depthwise else None
        return found or weights.store_floats(weight, groups), state.floats(x)
    if x.type == BITS and (found := weights.store_signs(weight, groups)):
        return found, x
    if x.type == BITS:
        x = state.bytes_of(x)
    found = weights.store_depthwise(weight, floats=False) if depthwise and x.type == BYTES else None
    found = found or (weights.store_integers(weight, groups) if x.type == BYTES else weights.store_wide(weight))
    largest_input = max(abs(x.low - x.zero), abs(x.high - x.zero))
    if found.kernel == "conv_wide" and found.largest * largest_input >= EXACT:
        raise state.refuse("sums of more than 53 bits")
    return found, x


def _numbers(state: State, operation: Operation, stored: Stored, weight: Array, x: Map) -> dict[str, Any]:
    """Return the fields of what follows a layer's sums: limits, or base, scale and bias."""
    outputs, bias = len(weight), operation.bias
    floats = stored.kernel.endswith("_floats")
    base = np.zeros(outputs, np.int64)
    if stored.kernel in ("conv_bytes", "conv_levels"):  # they add up values, not values minus their zero point
        base -= x.zero * weight.reshape(outputs, -1).sum(1).astype(np.int64)
    if operation.limits is not None:
        limits = operation.limits.astype(np.int64) - base
        if stored.kernel == "conv_bits":  # for sums of weights without their factor
            limits = -(-limits // stored.factor)
        bound = INT32 - 1 if stored.kernel == "conv_wide" else min(stored.largest, INT32 - 1)
        limits = limits.clip(-bound - 1, bound + 1)
        kind = np.int16 if np.abs(limits).max() < 2**15 else np.int32
        return {"limits": state.table(limits.astype(kind)), "limit_bytes": np.dtype(kind).itemsize}
    scale = None if operation.scale is None else np.broadcast_to(operation.scale.astype(np.float32), outputs)
    if not floats:
        own = np.float32(x.scale)
        scale = np.full(outputs, own, np.float32) if scale is None else scale * own
    if bias is not None and bias.dtype.kind == "i":
        if floats:
            bias = bias.astype(np.float32) * (np.float32(1) if scale is None else scale)
        else:
            base, bias = base + bias, None
    if np.abs(base).max() + (0 if stored.kernel == "conv_wide" else stored.largest) > INT32:
        raise state.refuse("sums of more than 32 bits")
    found: dict[str, Any] = {}
    if base.any():
        found["base"] = state.table(base.astype(np.int32))
    if scale is not None and (scale != 1).any():
        alike = (scale == scale[0]).all()
        found["scale"] = state.table(scale[:1] if alike else scale)
        found["scale_stride"] = 0 if alike else 1
    if bias is not None:
        found["bias"] = state.table(bias.astype(np.float32))
    return found
