"""Running a packed network with numpy only: integers stay integers, and every sum of them is exact.

Feature maps are (N, H, W, C), so that a convolution is one matrix product per kernel position. A float32 product of
integers is exact if no sum reaches 2^24; otherwise it is computed in float64.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from micronet.errors import MicronetError
from micronet.packed.program import Operation, Program

EXACT_FLOAT32 = 2**24
FEW_CHANNELS = 16
MAX_BATCH = 8  # images per batch, so that feature maps stay in the processor's caches
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


def check_images(program: Program, images: NDArray[np.float32]) -> None:
    """Raise MicronetError if images are not floats (N, C, H, W) of the program's size."""
    if images.dtype.kind != "f":
        raise MicronetError(
            f"the packed network expects float images, normalized as in training, but got {images.dtype}"
        )
    if images.ndim != 4 or list(images.shape[1:]) != program.shape:
        raise MicronetError(
            f"the packed network expects images of shape (N, {', '.join(map(str, program.shape))}), but got "
            f"{images.shape}"
        )


def run(program: Program, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Score images (N, C, H, W) -> (N, K). Raises MicronetError if they have another size."""
    check_images(program, images)
    for _, value in _walk(program, images):
        last = value
    return np.ascontiguousarray(last.real(), dtype=np.float32)


def score_in_batches(
    score: Callable[[NDArray[np.float32]], NDArray[np.float32]], images: NDArray[np.float32], max_batch: int,
    threads: int, pool: ThreadPoolExecutor | None,
) -> NDArray[np.float32]:  # fmt: skip
    """Score images (N, C, H, W) in batches of at most ``max_batch``, small enough that every thread gets some."""
    if not len(images):
        return score(np.zeros((1, *images.shape[1:]), np.float32))[:0]
    size = min(max_batch, -(-len(images) // threads))
    batches = [images[start : start + size] for start in range(0, len(images), size)]
    return np.concatenate(list((pool.map if pool else map)(score, batches)))


def count_macs(program: Program) -> int:
    """Return the multiply-accumulates per image, from each layer's output size."""
    image = np.zeros((1, *program.shape), np.float32)
    return sum(
        value.data.size * operation.weight[0].size
        for operation, value in _walk(program, image)
        if operation.weight is not None
    )


def _walk(program: Program, images: NDArray[np.float32]) -> Iterator[tuple[Operation, Value]]:
    """Yield each operation and its output for the images."""
    values: list[Value] = [Value(np.ascontiguousarray(images.transpose(0, 2, 3, 1)))]
    last_use = {source: index for index, op in enumerate(program.operations) for source in op.inputs}
    for index, operation in enumerate(program.operations):
        values.append(OPERATORS[operation.kind](operation, *[values[source] for source in operation.inputs]))
        yield operation, values[-1]
        for source in operation.inputs:
            if last_use[source] == index:
                values[source] = Value(np.zeros(0))  # free the memory


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


def _signs(positive: Array) -> Value:
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


def _max_pool(operation: Operation, x: Value) -> Value:
    data = x.data
    low: Any = -np.inf if data.dtype.kind == "f" else np.iinfo(data.dtype).min
    return x._replace(data=_windows(operation, data, low).max((-2, -1)))


def _average_pool(operation: Operation, x: Value) -> Value:
    data = x.real()
    total = _windows(operation, data, 0).sum((-2, -1))
    if operation.attributes.get("count_pads"):
        return Value(total / np.float32(np.prod(operation.attributes["kernel"])))
    ones = np.ones((1, *data.shape[1:3], 1), np.float32)
    return Value((total / _windows(operation, ones, 0).sum((-2, -1))).astype(np.float32))


def _windows(operation: Operation, data: Array, fill: Any) -> Array:
    attributes = operation.attributes
    top, left, bottom, right = attributes.get("pads", [0, 0, 0, 0])
    sy, sx = attributes.get("stride", [1, 1])
    data = np.pad(data, ((0, 0), (top, bottom), (left, right), (0, 0)), constant_values=fill)
    return np.lib.stride_tricks.sliding_window_view(data, tuple(attributes["kernel"]), (1, 2))[:, ::sy, ::sx]


def _mean(operation: Operation, x: Value) -> Value:
    out = x.real().mean((1, 2), dtype=np.float32)
    return Value(out[:, None, None, :] if operation.attributes.get("keep") else out)


def _concat(operation: Operation, *parts: Value) -> Value:
    if len({(part.scale, part.zero_point) for part in parts}) == 1:
        return parts[0]._replace(data=np.concatenate([part.data for part in parts], -1))
    return Value(np.concatenate([part.real() for part in parts], -1))


def _flatten(operation: Operation, x: Value) -> Value:
    data = x.data if x.data.ndim == 2 else x.data.transpose(0, 3, 1, 2)  # NCHW, as in training
    return x._replace(data=np.ascontiguousarray(data).reshape(len(data), -1))


def _shuffle(operation: Operation, x: Value) -> Value:
    *rest, channels = x.data.shape
    grouped = x.data.reshape(*rest, operation.attributes["groups"], -1)
    return x._replace(data=grouped.swapaxes(-1, -2).reshape(*rest, channels))


OPERATORS: dict[str, Callable[..., Value]] = {
    "conv": lambda operation, x: _scale(conv_sums(x.centred(), operation), operation, x),
    "linear": _linear,
    "threshold": lambda operation, x: _signs(conv_sums(x.centred(), operation) >= operation.limits),
    "sign": lambda _, x: _signs(x.real() >= 0),
    "relu": lambda _, x: Value(np.maximum(x.real(), np.float32(0))),
    "clip": _clip,
    "quantize": _quantize,
    "max_pool": _max_pool,
    "average_pool": _average_pool,
    "mean": _mean,
    "add": lambda _, x, y: Value(x.real() + y.real()),
    "mul": lambda _, x, y: Value(x.real() * y.real()),
    "concat": _concat,
    "flatten": _flatten,
    "shuffle": _shuffle,
    "affine": lambda operation, x: Value(x.real() * operation.scale + operation.bias),
}
