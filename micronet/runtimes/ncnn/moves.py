"""Operations without weights as ncnn layers: pools, moves, resizes and activation functions.

What only moves values, or takes their maximum, commutes with rounding: it moves the floats, which are rounded later.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from micronet.packed.program import Operation
from micronet.packed.resize import positions
from micronet.runtimes.ncnn.layer import Parameter
from micronet.runtimes.ncnn.values import (
    ADD,
    FLOOR,
    HALF,
    MULTIPLY,
    NetworkBuilder,
    Unsupported,
    Value,
    bounds_of,
    without_rounding,
)

MAXIMUM, AVERAGE = 0, 1  # Pooling's types
NEAREST, BILINEAR = 1, 2  # Interp's
Lower = Callable[[NetworkBuilder, Operation, list[Value]], Value]


def _window(operation: Operation) -> dict[int, Parameter]:
    attributes = operation.attributes
    (rows, columns), (sy, sx) = attributes["kernel"], attributes.get("stride", [1, 1])
    top, left, bottom, right = attributes.get("pads", [0, 0, 0, 0])
    down, across = attributes.get("extra", [0, 0])
    return {1: columns, 11: rows, 2: sx, 12: sy, 3: left, 14: right + across, 13: top, 15: bottom + down, 5: 1}


def _max_pool(builder: NetworkBuilder, operation: Operation, raw: str) -> str:
    return builder.add("Pooling", operation.name, raw, parameters={0: MAXIMUM, **_window(operation)})


def _average_pool(builder: NetworkBuilder, operation: Operation, values: list[Value]) -> Value:
    x, parameters = builder.real_of(values[0], operation.name), _window(operation)
    counted = bool(operation.attributes.get("count_pads"))
    if counted and any(operation.attributes.get("extra", [])):  # ncnn would count what is beyond the padding too
        top, left, bottom, right = operation.attributes.get("pads", [0, 0, 0, 0])
        x = builder.add("Padding", f"{operation.name}.pad", x, parameters={0: top, 1: bottom, 2: left, 3: right})
        down, across = operation.attributes["extra"]
        parameters |= {3: 0, 14: across, 13: 0, 15: down}
        counted = False
    return Value(builder.add("Pooling", operation.name, x, parameters={0: AVERAGE, 6: int(counted), **parameters}))


def _mean(builder: NetworkBuilder, operation: Operation, values: list[Value]) -> Value:
    x = builder.real_of(values[0], operation.name)
    mean = builder.add("Pooling", operation.name, x, parameters={0: AVERAGE, 4: 1})
    return Value(_as_image(builder, f"{operation.name}.keep", mean) if operation.attributes.get("keep") else mean)


def _as_image(builder: NetworkBuilder, name: str, blob: str) -> str:
    return builder.add("Reshape", name, blob, parameters={0: 1, 1: 1, 2: builder.blobs[blob].shape[0]})


def _flatten(builder: NetworkBuilder, operation: Operation, values: list[Value]) -> Value:
    (x,) = values
    if len(builder.blobs[x.raw or x.integers or ""].shape) == 1:
        return x
    raw, integers = (blob and builder.add("Flatten", operation.name, blob) for blob in (x.raw, x.integers))
    return Value(raw, x.grid, integers)


def _shuffle(builder: NetworkBuilder, operation: Operation, raw: str) -> str:
    return builder.add("ShuffleChannel", operation.name, raw, parameters={0: operation.attributes["groups"]})


def _depth_to_space(builder: NetworkBuilder, operation: Operation, raw: str) -> str:
    (by, bx), crop = operation.attributes["block"], operation.attributes.get("crop", [0] * 4)
    if by != bx:
        raise Unsupported(f"ncnn interleaves the same number of rows and columns, not {by} and {bx}")
    found = builder.add("PixelShuffle", operation.name, raw, parameters={0: by, 1: 1}) if by > 1 else raw
    if not any(crop):
        return found
    channels, rows, columns = builder.blobs[found].shape
    top, left, bottom, right = crop
    return _cut(builder, operation, found, [0, top, left], [channels, rows - top - bottom, columns - left - right])


def _cut(builder: NetworkBuilder, operation: Operation, blob: str, begin: list[int], extent: list[int]) -> str:
    parameters: dict[int, Parameter] = {
        **dict(zip((2, 1, 0), begin, strict=True)), **dict(zip((5, 4, 3), extent, strict=True))
    }  # fmt: skip
    return builder.add("Crop", f"{operation.name}.crop", blob, parameters=parameters)


def _slice(builder: NetworkBuilder, operation: Operation, raw: str) -> str:
    begin, extent = operation.attributes["begin"], list(operation.attributes["extent"])
    stride = operation.attributes.get("stride", [1, 1])
    covered = [extent[0], *((size - 1) * step + 1 for size, step in zip(extent[1:], stride, strict=True))]
    found = _cut(builder, operation, raw, begin, covered)
    if max(stride) == 1:
        return found
    window: dict[int, Parameter] = {0: MAXIMUM, 1: 1, 11: 1, 2: stride[1], 12: stride[0], 5: 1}  # of single pixels
    return builder.add("Pooling", operation.name, found, parameters=window)


def _pad(builder: NetworkBuilder, operation: Operation, raw: str) -> str:
    top, left, bottom, right = operation.attributes["pads"]
    return builder.add("Padding", operation.name, raw, parameters={0: top, 1: bottom, 2: left, 3: right})


def _resize(builder: NetworkBuilder, operation: Operation, values: list[Value]) -> Value:
    (x,), attributes = values, operation.attributes
    if "nearest" in attributes:
        raw = builder.raw_of(x)
        sides = builder.blobs[raw].shape[1:]
        given = [positions(attributes, axis, side)[0] for axis, side in enumerate(sides)]
        own = [_nearest(size, side) for size, side in zip(attributes["size"], sides, strict=True)]
        if any((a != b).any() for a, b in zip(given, own, strict=True)):
            raise Unsupported("ncnn's nearest resize reads other pixels than this one")
        return without_rounding(x, _interpolate(builder, operation, raw, NEAREST, attributes["size"]))
    blob = builder.real_of(x, operation.name)
    sides = builder.blobs[blob].shape[1:]
    aligned = attributes["coordinates"] == "align_corners" and min(attributes["size"]) > 1
    for axis, side in enumerate(sides):
        first, _, share = positions(attributes, axis, side)
        if side > 1 and np.abs(first + share - _bilinear(attributes["size"][axis], side, aligned)).max() > 1e-5 * side:
            raise Unsupported("ncnn's bilinear resize reads between other pixels than this one")
    if 1 in sides:  # ncnn would read beyond a map of one row or column
        ends = [size if side == 1 else side for size, side in zip(attributes["size"], sides, strict=True)]
        blob = _interpolate(builder, operation, blob, NEAREST, ends)
        if ends == attributes["size"]:
            return Value(blob)
    return Value(_interpolate(builder, operation, blob, BILINEAR, attributes["size"], aligned))


def _interpolate(
    builder: NetworkBuilder, operation: Operation, blob: str, kind: int, size: list[int], aligned: bool = False
) -> str:
    parameters: dict[int, Parameter] = {0: kind, 3: size[0], 4: size[1], 6: int(aligned)}
    return builder.add("Interp", operation.name, blob, parameters=parameters)


def _nearest(size: int, side: int) -> Any:
    """Return which of ``side`` pixels ncnn's nearest resize reads (Interp::forward)."""
    step = np.float32(side) / np.float32(size)
    return np.minimum((np.arange(size, dtype=np.float32) * step).astype(np.int64), side - 1)


def _bilinear(size: int, side: int, aligned: bool) -> Any:
    """Return between which of ``side`` pixels ncnn's bilinear resize reads (linear_coeffs)."""
    at = np.arange(size, dtype=np.float64)
    at = at * ((side - 1) / (size - 1)) if aligned else (at + 0.5) * (side / size) - 0.5
    return at.clip(0, side - 1)


def _concat(builder: NetworkBuilder, operation: Operation, values: list[Value]) -> Value:
    raw = [builder.raw_of(value) for value in values]
    grids = [value.grid for value in values if value.grid]
    alike = len(grids) == len(values) and len({grid[:2] for grid in grids}) == 1
    parts = raw if alike else [builder.real_of(value, operation.name) for value in values]
    low, high = min((grid.low for grid in grids), default=0), max((grid.high for grid in grids), default=0)
    grid = grids[0]._replace(low=low, high=high) if alike else None
    return Value(builder.add("Concat", operation.name, *parts, parameters={0: 0}), grid)


def _sign(builder: NetworkBuilder, operation: Operation, values: list[Value]) -> Value:
    """Compute floor(clip(x, -1, 1/2)) + 1/2, which is -1/2 below zero and 1/2 from zero on."""
    x = builder.real_of(values[0], operation.name)
    clipped = builder.add("Clip", f"{operation.name}.clip", x, parameters=bounds_of(-1, 0.5))
    floor = builder.add("UnaryOp", operation.name, clipped, parameters={0: FLOOR})
    return Value(builder.scalar(f"{operation.name}.add", ADD, floor, 0.5), HALF)


def _affine(builder: NetworkBuilder, operation: Operation, values: list[Value]) -> Value:
    x = builder.real_of(values[0], operation.name)
    size = builder.blobs[x].shape[0]
    assert operation.scale is not None and operation.bias is not None
    tensors = [np.broadcast_to(each, size).astype(np.float32) for each in (operation.scale, operation.bias)]
    return Value(builder.add("Scale", operation.name, x, parameters={0: size, 1: 1}, tensors=tensors))


def _two(operator: int, builder: NetworkBuilder, operation: Operation, values: list[Value]) -> Value:
    parts = [builder.real_of(value, operation.name) for value in values]
    return Value(builder.add("BinaryOp", operation.name, *parts, parameters={0: operator}))


def _function(kind: str, keys: tuple[str, ...], fixed: dict[int, Parameter], builder: NetworkBuilder,
              operation: Operation, values: list[Value]) -> Value:  # fmt: skip
    parameters = fixed | {place: float(operation.attributes[key]) for place, key in enumerate(keys)}
    if kind.startswith("Hard") and operation.attributes["alpha"] <= 0:
        raise Unsupported(f"ncnn's {kind} needs a positive slope")
    x = builder.real_of(values[0], operation.name)
    return Value(builder.add(kind, operation.name, x, parameters=parameters))


def _clip(builder: NetworkBuilder, operation: Operation, values: list[Value]) -> Value:
    x = builder.real_of(values[0], operation.name)
    return Value(builder.add("Clip", operation.name, x, parameters=bounds_of(*operation.attributes["bounds"])))


def _moved(move: Callable[[NetworkBuilder, Operation, str], str]) -> Lower:
    return lambda builder, operation, values: without_rounding(
        values[0], move(builder, operation, builder.raw_of(values[0]))
    )


# Operations that move values before their rounding.
MOVES: dict[str, Lower] = {
    "max_pool": _moved(_max_pool), "shuffle": _moved(_shuffle), "depth_to_space": _moved(_depth_to_space),
    "slice": _moved(_slice), "pad": _moved(_pad), "concat": _concat, "resize": _resize,
    "unflatten": _moved(lambda builder, operation, raw: _as_image(builder, operation.name, raw)),
}  # fmt: skip
OTHERS: dict[str, Lower] = {
    "average_pool": _average_pool, "mean": _mean, "flatten": _flatten, "sign": _sign, "affine": _affine,
    "add": partial(_two, ADD), "mul": partial(_two, MULTIPLY), "clip": _clip,
    "relu": partial(_function, "ReLU", (), {0: 0.0}), "leaky_relu": partial(_function, "ReLU", ("alpha",), {}),
    "elu": partial(_function, "ELU", ("alpha",), {}),
    "hard_sigmoid": partial(_function, "HardSigmoid", ("alpha", "beta"), {}),
    "hard_swish": partial(_function, "HardSwish", ("alpha", "beta"), {}),
    "sigmoid": partial(_function, "Sigmoid", (), {}), "tanh": partial(_function, "TanH", (), {}),
    "silu": partial(_function, "Swish", (), {}), "mish": partial(_function, "Mish", (), {}),
    "gelu": partial(_function, "GELU", (), {0: 0}), "tanh_gelu": partial(_function, "GELU", (), {0: 1}),
}  # fmt: skip
