"""Convolutions and linear layers with numpy: every sum of integers is exact.

A float32 product of integers is exact if no sum reaches 2^24; otherwise it is computed in float64.
"""

from collections.abc import Callable

import numpy as np

from micronet.errors import MicronetError
from micronet.packed.program import Operation
from micronet.runtimes.packed.numpy_operators import Array, Value, signs

EXACT_FLOAT32 = 2**24
FEW_CHANNELS = 16


def conv_sums(x: Array, operation: Operation) -> Array:
    """Convolve without scale and bias: x (N, H, W, C) -> (N, H', W', O), float32 or float64, exact for integers."""
    weight, attributes = operation.weight, operation.attributes
    assert weight is not None
    groups, (dy, dx) = attributes.get("group", 1), attributes.get("dilation", [1, 1])
    top, left, bottom, right = attributes.get("pads", [0, 0, 0, 0])
    sy, sx = attributes.get("stride", [1, 1])
    x = _exact(x, weight)
    weight = weight.astype(x.dtype)
    x = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    outputs, inputs, height, width = weight.shape
    rows = (x.shape[1] - (height - 1) * dy - 1) // sy + 1
    columns = (x.shape[2] - (width - 1) * dx - 1) // sx + 1
    if rows < 1 or columns < 1 or x.shape[3] != inputs * groups or outputs % groups:
        raise MicronetError("the layers of the packed network do not fit together; pack the network again")
    if groups == 1 and inputs < FEW_CHANNELS:  # products per kernel position would be too small to be fast
        seen = np.lib.stride_tricks.sliding_window_view(x, ((height - 1) * dy + 1, (width - 1) * dx + 1), (1, 2))
        seen = seen[:, ::sy, ::sx, :, ::dy, ::dx].reshape(len(x) * rows * columns, -1)
        product: Array = (seen @ weight.reshape(outputs, -1).T).reshape(len(x), rows, columns, outputs)
        return product
    sums = np.zeros((len(x), rows, columns, outputs), x.dtype)
    each = outputs // groups
    for i in range(height):
        for j in range(width):
            seen = x[:, i * dy : i * dy + (rows - 1) * sy + 1 : sy, j * dx : j * dx + (columns - 1) * sx + 1 : sx]
            for group in range(groups):
                part = np.ascontiguousarray(seen[..., group * inputs : (group + 1) * inputs])
                taps = weight[group * each : (group + 1) * each, :, i, j]
                sums[..., group * each : (group + 1) * each] += part @ taps.T
    return sums


def _exact(x: Array, weight: Array) -> Array:
    """Return a layer's input in the float type in which sums of integers are exact; floats as float32."""
    if x.dtype.kind == "f" or weight.dtype.kind == "f":
        return x.astype(np.float32)
    largest = int(np.abs(weight).reshape(len(weight), -1).sum(1).max()) * int(np.abs(x).max(initial=0))
    return x.astype(np.float32 if largest < EXACT_FLOAT32 else np.float64)


def _scale(sums: Array, operation: Operation, x: Value) -> Value:
    """Apply a layer's scales and bias to its sums over ``x``."""
    scale: Array = np.array(1 if x.scale is None else x.scale, np.float32)
    if operation.scale is not None:
        scale = operation.scale * scale
    if operation.bias is not None and operation.bias.dtype == np.int32:
        return Value((sums + operation.bias).astype(np.float32) * scale)
    out = sums.astype(np.float32)
    out = out * scale if operation.scale is not None or x.scale is not None else out
    return Value(out if operation.bias is None else out + operation.bias)


def _linear(operation: Operation, x: Value) -> Value:
    assert operation.weight is not None
    data = _exact(x.centred(), operation.weight)
    return _scale(data @ operation.weight.astype(data.dtype).T, operation, x)


LAYERS: dict[str, Callable[..., Value]] = {
    "conv": lambda operation, x: _scale(conv_sums(x.centred(), operation), operation, x),
    "linear": _linear,
    "threshold": lambda operation, x: signs(conv_sums(x.centred(), operation) >= operation.limits),
}
