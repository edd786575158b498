"""Every operation without weights, with numpy, on feature maps (N, H, W, C)."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from micronet.errors import MicronetError
from micronet.packed.activations import ACTIVATIONS, activate
from micronet.packed.program import Operation
from micronet.packed.resize import positions

Array = NDArray[Any]


class Value(NamedTuple):
    """A tensor (N, H, W, C) or (N, C). With a ``scale``, integers for (data - zero_point) * scale."""

    data: Array
    scale: float | None = None
    zero_point: int = 0

    def real(self) -> Array:
        """Return the values, float32."""
        if self.scale is None:
            return self.data
        return (self.data.astype(np.float32) - np.float32(self.zero_point)) * np.float32(self.scale)

    def centred(self) -> Array:
        """Return integers minus their zero point, or float values as they are."""
        return self.data if self.scale is None or not self.zero_point else self.data.astype(np.int32) - self.zero_point


def signs(positive: Array) -> Value:
    """Return 1 where an array is true, else -1."""
    return Value(np.where(positive, np.int8(1), np.int8(-1)), 1.0)


def _clip(operation: Operation, x: Value) -> Value:
    low, high = operation.attributes["bounds"]
    return Value(x.real().clip(np.float32(low), np.float32(high)))


def _quantize(operation: Operation, x: Value) -> Value:
    attributes = operation.attributes
    scale, zero_point = np.float32(attributes["scale"]), int(attributes["zero_point"])
    low, high = attributes["range"]
    kind = np.uint8 if low >= 0 and high <= 255 else np.int8 if low >= -128 and high <= 127 else np.int32
    q = np.rint(x.real() / scale) + zero_point
    return Value(q.clip(low, high).astype(kind), float(scale), zero_point)


def _activate(kind: str, operation: Operation, x: Value) -> Value:
    return Value(activate(kind, x.real(), operation.attributes))


def _max_pool(operation: Operation, x: Value) -> Value:
    data = x.data
    low: Any = -np.inf if data.dtype.kind == "f" else np.iinfo(data.dtype).min
    return x._replace(data=_windows(operation, data, low).max((-2, -1)))


def _average_pool(operation: Operation, x: Value) -> Value:
    """Average windows; sums of integers are exact, and scaled after the division."""
    ones = np.ones((1, *x.data.shape[1:3], 1), np.float32)
    padding = 1 if operation.attributes.get("count_pads") else 0
    return _average(
        _windows(operation, x.centred(), 0), _windows(operation, ones, padding, 0).sum((-2, -1)), (-2, -1), x
    )


def _mean(operation: Operation, x: Value) -> Value:
    mean = _average(x.centred(), np.float32(x.data.shape[1] * x.data.shape[2]), (1, 2), x)
    return mean._replace(data=mean.data[:, None, None, :]) if operation.attributes.get("keep") else mean


def _average(values: Array, count: Any, axes: tuple[int, int], x: Value) -> Value:
    """Return sums over axes, divided by a count; of integers with the scale of ``x``, or of floats."""
    total = values.sum(axes, dtype=np.float32 if x.scale is None else np.int64).astype(np.float32) / count
    return Value(total if x.scale is None else total * np.float32(x.scale))


def _windows(operation: Operation, data: Array, fill: Any, beyond: Any = None) -> Array:
    """Return the windows of a pool over a map that is padded with ``fill``, and after that with ``beyond``."""
    attributes = operation.attributes
    top, left, bottom, right = attributes.get("pads", [0, 0, 0, 0])
    (sy, sx), extra = attributes.get("stride", [1, 1]), attributes.get("extra", [0, 0])
    data = np.pad(data, ((0, 0), (top, bottom), (left, right), (0, 0)), constant_values=fill)
    beyond = fill if beyond is None else beyond
    data = np.pad(data, ((0, 0), (0, extra[0]), (0, extra[1]), (0, 0)), constant_values=beyond)
    return np.lib.stride_tricks.sliding_window_view(data, tuple(attributes["kernel"]), (1, 2))[:, ::sy, ::sx]


def _concat(operation: Operation, *parts: Value) -> Value:
    if len({(part.scale, part.zero_point, part.data.dtype) for part in parts}) == 1:
        return parts[0]._replace(data=np.concatenate([part.data for part in parts], -1))
    return Value(np.concatenate([part.real() for part in parts], -1))


def _flatten(operation: Operation, x: Value) -> Value:
    data = x.data if x.data.ndim == 2 else x.data.transpose(0, 3, 1, 2)  # NCHW, as in training
    return x._replace(data=np.ascontiguousarray(data).reshape(len(data), -1))


def _unflatten(operation: Operation, x: Value) -> Value:
    return x._replace(data=x.data.reshape(len(x.data), 1, 1, -1))


def _shuffle(operation: Operation, x: Value) -> Value:
    *rest, channels = x.data.shape
    grouped = x.data.reshape(*rest, operation.attributes["groups"], -1)
    return x._replace(data=grouped.swapaxes(-1, -2).reshape(*rest, channels))


def _resize(operation: Operation, x: Value) -> Value:
    attributes = operation.attributes
    rows, columns = (positions(attributes, axis, size) for axis, size in enumerate(x.data.shape[1:3]))
    if "nearest" in attributes:
        return x._replace(data=x.data[:, rows[0]][:, :, columns[0]])
    data, one = x.real(), np.float32(1)
    share = rows[2][:, None, None]
    data = data[:, rows[0]] * (one - share) + data[:, rows[1]] * share
    share = columns[2][:, None]
    return Value(data[:, :, columns[0]] * (one - share) + data[:, :, columns[1]] * share)


def _depth_to_space(operation: Operation, x: Value) -> Value:
    (by, bx), (top, left, bottom, right) = operation.attributes["block"], operation.attributes.get("crop", [0] * 4)
    images, rows, columns, channels = x.data.shape
    data = x.data.reshape(images, rows, columns, by, bx, channels // (by * bx)).transpose(0, 1, 3, 2, 4, 5)
    data = data.reshape(images, rows * by, columns * bx, -1)
    return x._replace(data=data[:, top : rows * by - bottom, left : columns * bx - right])


def _slice(operation: Operation, x: Value) -> Value:
    attributes = operation.attributes
    steps = [1, *attributes.get("stride", [1, 1])]
    ends = [first + (count - 1) * step + 1 for first, count, step in
            zip(attributes["begin"], attributes["extent"], steps, strict=True)]  # fmt: skip
    if any(end > size for end, size in zip(ends, (x.data.shape[3], *x.data.shape[1:3]), strict=True)):
        raise MicronetError("the layers of the packed network do not fit together; pack the network again")
    channels, rows, columns = (slice(*each) for each in zip(attributes["begin"], ends, steps, strict=True))
    return x._replace(data=x.data[:, rows, columns, channels])


def _pad(operation: Operation, x: Value) -> Value:
    top, left, bottom, right = operation.attributes["pads"]
    padding = ((0, 0), (top, bottom), (left, right), (0, 0))
    return x._replace(data=np.pad(x.data, padding, constant_values=x.data.dtype.type(x.zero_point)))


MOVES: dict[str, Callable[..., Value]] = {
    "max_pool": _max_pool, "average_pool": _average_pool, "mean": _mean, "concat": _concat, "flatten": _flatten,
    "unflatten": _unflatten, "shuffle": _shuffle, "resize": _resize, "depth_to_space": _depth_to_space,
    "slice": _slice, "pad": _pad,
}  # fmt: skip
ELEMENTWISE: dict[str, Callable[..., Value]] = {
    "sign": lambda _, x: signs(x.real() >= 0),
    "relu": lambda _, x: Value(np.maximum(x.real(), np.float32(0))),
    "clip": _clip,
    "quantize": _quantize,
    "add": lambda _, x, y: Value(x.real() + y.real()),
    "mul": lambda _, x, y: Value(x.real() * y.real()),
    "affine": lambda operation, x: Value(x.real() * operation.scale + operation.bias),
    **{kind: partial(_activate, kind) for kind in ACTIVATIONS},
}
