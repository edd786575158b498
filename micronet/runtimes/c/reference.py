"""The scores that the generated code must give, bit for bit: what the packed runtime computes.

Its compiled kernels and C add up float products in the same order, each product and addition rounded once, on
processors with such an instruction. Where they are missing, numpy does the same more slowly.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from micronet.packed.program import Operation, Program
from micronet.runtimes.packed.numpy_backend import OPERATORS, count_macs
from micronet.runtimes.packed.numpy_operators import Value
from micronet.runtimes.packed.predictor import choose_backend

Array = NDArray[Any]
MANY_MACS = 300_000_000  # of which numpy would need a minute
FUSED = ("avx512", "avx2")  # kernels that round products and sums of floats once


def reference_scores(program: Program, images: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    """Compute the network's outputs as ``scores_of`` does, for large float networks with the compiled kernels."""
    floats = any(each.weight is not None and each.weight.dtype.kind == "f" for each in program.operations)
    if floats and count_macs(program) > MANY_MACS:
        score, kernel = choose_backend(program, 1)
        if kernel in FUSED:
            found = score(images)
            return found if isinstance(found, list) else [found]
    return scores_of(program, images)


def scores_of(program: Program, images: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    """Compute the network's outputs for images (N, C, H, W): each (N, K), or (N, C, H, W)."""
    values: list[Value] = [Value(np.ascontiguousarray(images.transpose(0, 2, 3, 1)))]
    maps: dict[int, tuple[int, ...]] = {}  # flattened values -> rows, columns and channels of their maps
    with np.errstate(over="ignore", invalid="ignore"):
        for index, operation in enumerate(program.operations):
            inputs = [values[source] for source in operation.inputs]
            x, source = inputs[0], operation.inputs[0]
            if operation.kind == "flatten" and x.data.ndim == 4:
                maps[index + 1] = x.data.shape[1:]
            elif operation.kind not in ("conv", "linear", "mean") and source in maps and x.data.ndim == 2:
                maps[index + 1] = maps[source]
            if operation.kind in ("conv", "linear") and _in_floats(operation, x):
                values.append(_float_layer(operation, x, maps.get(source)))
            else:
                values.append(OPERATORS[operation.kind](operation, *inputs))
    found = [values[number].real() for number in program.results]
    return [np.ascontiguousarray(each.transpose(0, 3, 1, 2) if each.ndim == 4 else each, np.float32) for each in found]


def _in_floats(operation: Operation, x: Value) -> bool:
    assert operation.weight is not None
    return x.scale is None or operation.weight.dtype.kind == "f"


def _float_layer(operation: Operation, x: Value, shape: tuple[int, ...] | None) -> Value:
    """Compute a layer of floats; ``shape``: rows, columns and channels of its flattened input, if it was a map."""
    weight, attributes = operation.weight, operation.attributes
    assert weight is not None
    data = x.real().astype(np.float32)
    row = data.ndim == 2
    if operation.kind == "linear":
        rows, columns, channels = shape or (1, 1, data.shape[-1])
        weight, attributes = weight.reshape(len(weight), channels, rows, columns), {}
        if row:
            data = data.reshape(len(data), channels, rows, columns).transpose(0, 2, 3, 1)
    sums = _float_sums(data, weight.astype(np.float32), attributes)
    scale, bias = operation.scale, operation.bias
    if bias is not None and bias.dtype.kind == "i":
        bias = bias.astype(np.float32) * (np.float32(1) if scale is None else scale)
    sums = sums if scale is None else sums * scale
    sums = sums if bias is None else sums + bias
    return Value(sums.reshape(len(sums), -1) if row else sums)


def _float_sums(x: Array, weight: Array, attributes: dict[str, Any]) -> Array:
    """Convolve x (N, H, W, C) in the order of the kernel's rows, columns and channels."""
    outputs, inputs, height, width = weight.shape
    groups, (dy, dx) = attributes.get("group", 1), attributes.get("dilation", [1, 1])
    top, left, bottom, right = attributes.get("pads", [0, 0, 0, 0])
    sy, sx = attributes.get("stride", [1, 1])
    x = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    rows = (x.shape[1] - (height - 1) * dy - 1) // sy + 1
    columns = (x.shape[2] - (width - 1) * dx - 1) // sx + 1
    each = outputs // groups
    sums = np.zeros((len(x), rows, columns, groups, each), np.float32)
    taps = weight.reshape(groups, each, inputs, height, width)
    for i in range(height):
        for j in range(width):
            seen = x[:, i * dy : i * dy + (rows - 1) * sy + 1 : sy, j * dx : j * dx + (columns - 1) * sx + 1 : sx]
            seen = seen.reshape(*seen.shape[:3], groups, inputs)
            for channel in range(inputs):
                sums = _fused(seen[..., channel, None], taps[:, :, channel, i, j], sums)
    return sums.reshape(len(x), rows, columns, outputs)


def _fused(a: Array, b: Array, c: Array) -> Array:
    """Return a * b + c of float32 arrays, rounded once.

    The product is exact in float64. Its sum is rounded to odd there, so that rounding it again to float32 is right
    (Boldo and Melquiond, 2008).
    """
    product, other = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + other
    back = total - product
    rest = (product - (total - back)) + (other - back)
    bits = total.view(np.int64)
    away = np.where((rest > 0) == (total > 0), 1, -1)
    odd = np.where((rest != 0) & (bits & 1 == 0), bits + away, bits)
    return odd.view(np.float64).astype(np.float32)
