"""The shapes that ncnn's layers compute: one rule per kind, which raises ValueError if a layer does not fit its inputs.

The writer takes the shapes of all blobs from here, and the reader checks a file by the same rules.
"""

from collections.abc import Callable
from math import prod
from typing import NamedTuple

from micronet.runtimes.ncnn.layer import Layer

MAX_KERNEL = 4096  # kernel size, stride, padding
MAX_SIDE = 1 << 16  # height, width and channels
MAX_ELEMENTS = 1 << 29  # of a blob or a tensor
INT8_OUT = 101  # the parameter 8 of layers that compute int8; 1: of those that compute float from int8
NO_WINOGRAD = 64  # the parameter 31
ACTIVATIONS = {0: 0, 1: 0, 2: 1, 3: 2, 4: 0, 5: 0, 6: 2}  # the parameter 9 -> the number of values in parameter 10


class Blob(NamedTuple):
    """A tensor: its shape, (C, H, W) or (N,), and whether it holds int8 instead of float32."""

    shape: tuple[int, ...]
    integer: bool = False


Rule = Callable[[Layer, list[Blob]], list[Blob]]


def _bounded(layer: Layer, key: int, low: int, high: int, default: int = 0) -> int:
    value = layer.number(key, default)
    if not low <= value <= high:
        raise ValueError(f"{layer.name}: parameter {key} is {value}, not {low} to {high}")
    return value


def require(layer: Layer, holds: bool, what: str) -> None:
    """Raise ValueError unless something holds of a layer."""
    if not holds:
        raise ValueError(f"{layer.name}: {what}")


def _floats(layer: Layer, *keys: int) -> None:
    for key in keys:
        require(layer, isinstance(layer.parameters.get(key), float), f"parameter {key} is not a float")


def _image(layer: Layer, blob: Blob) -> tuple[int, ...]:
    require(layer, len(blob.shape) == 3, "its input is not a feature map")
    return blob.shape


def _fused(layer: Layer) -> None:
    kind, values = layer.number(9), layer.parameters.get(10, [])
    fits = isinstance(values, list) and ACTIVATIONS.get(kind) == len(values)
    require(layer, fits, "its activation is invalid")
    _bounded(layer, 31, 0, NO_WINOGRAD)


def input_image(layer: Layer, inputs: list[Blob]) -> list[Blob]:
    """Return the shape of the images."""
    return [Blob(tuple(_bounded(layer, key, 1, MAX_SIDE) for key in (2, 1, 0)))]


def convolution(layer: Layer, inputs: list[Blob]) -> list[Blob]:
    """Return the shape that a convolution computes."""
    channels, *sides = _image(layer, inputs[0])
    outputs, group = _bounded(layer, 0, 1, MAX_SIDE), _bounded(layer, 7, 1, MAX_SIDE, 1)
    int8 = layer.number(8)
    require(layer, int8 in (0, 1, INT8_OUT) and bool(int8) == inputs[0].integer, "its input has the wrong type")
    require(layer, channels % group == 0 and outputs % group == 0, "its groups do not fit its channels")
    require(layer, (layer.kind == "Convolution") == (group == 1), f"{layer.kind} has {group} groups")
    # Others would return uninitialized memory on x86: see weighted.py, which splits them.
    require(layer, not int8 or group == 1 or group == channels == outputs, "it is a grouped int8 convolution")
    _bounded(layer, 5, 0, 1)
    _fused(layer)
    sizes, taps = [], 1
    # height, then width: kernel, dilation, stride, padding before and after
    for side, keys in zip(sides, ((11, 12, 13, 14, 16), (1, 2, 3, 4, 15)), strict=True):
        kernel, dilation, stride = (_bounded(layer, key, 1, MAX_KERNEL) for key in keys[:3])
        padding = sum(_bounded(layer, key, 0, MAX_KERNEL) for key in keys[3:])
        extent = (kernel - 1) * dilation + 1
        require(layer, extent <= side + padding, "its kernel is larger than its input")
        sizes.append((side + padding - extent) // stride + 1)
        taps *= kernel
    expected = outputs * (channels // group) * taps
    require(layer, layer.number(6) == expected <= MAX_ELEMENTS, "its weights do not fit its input")
    return [Blob((outputs, *sizes), int8 == INT8_OUT)]


def inner_product(layer: Layer, inputs: list[Blob]) -> list[Blob]:
    """Return the shape that a linear layer computes."""
    outputs, size = _bounded(layer, 0, 1, MAX_SIDE), prod(inputs[0].shape)
    require(layer, len(inputs[0].shape) == 1, "its input is not a vector")
    require(layer, layer.number(2) == outputs * size <= MAX_ELEMENTS, "its weights do not fit its input")
    require(
        layer, layer.number(8) in (0, 1) and bool(layer.number(8)) == inputs[0].integer, "its input has the wrong type"
    )
    _bounded(layer, 1, 0, 1)
    _fused(layer)
    return [Blob((outputs,))]


def pooling(layer: Layer, inputs: list[Blob]) -> list[Blob]:
    """Return the shape that a pooling layer computes."""
    channels, *sides = _image(layer, inputs[0])
    for key in (0, 4, 5, 6):
        _bounded(layer, key, 0, 1)
    if layer.number(4):
        return [Blob((channels,))]
    require(layer, layer.number(5) == 1, "its padding is not explicit")
    sizes = []
    for side, keys in zip(sides, ((11, 12, 13, 15), (1, 2, 3, 14)), strict=True):
        kernel, stride = (_bounded(layer, key, 1, MAX_SIDE) for key in keys[:2])
        before, after = (_bounded(layer, key, 0, kernel - 1 if key != keys[3] else MAX_KERNEL) for key in keys[2:])
        padded = side + before + after
        require(layer, kernel <= padded, "its kernel is larger than its input")
        sizes.append((padded - kernel) // stride + 1)
    return [Blob((channels, *sizes))]


def crop(layer: Layer, inputs: list[Blob]) -> list[Blob]:
    """Return the shape of a part of a feature map."""
    shape = _image(layer, inputs[0])
    extent = tuple(_bounded(layer, key, 1, MAX_SIDE) for key in (5, 4, 3))
    for first, size, key in zip((2, 1, 0), extent, range(3), strict=True):
        require(layer, _bounded(layer, first, 0, MAX_SIDE) + size <= shape[key], "it cuts beyond its input")
    return [Blob(extent)]


def padding(layer: Layer, inputs: list[Blob]) -> list[Blob]:
    """Return the shape of a feature map with zeros around it."""
    channels, height, width = _image(layer, inputs[0])
    top, bottom, left, right = (_bounded(layer, key, 0, MAX_KERNEL) for key in range(4))
    return [Blob((channels, height + top + bottom, width + left + right))]


def interp(layer: Layer, inputs: list[Blob]) -> list[Blob]:
    """Return the shape of a resized feature map."""
    channels, *sides = _image(layer, inputs[0])
    kind = _bounded(layer, 0, 1, 2)
    _bounded(layer, 6, 0, 1)
    require(layer, kind == 1 or min(sides) > 1, "it interpolates between fewer than two pixels")
    sizes = [_bounded(layer, key, 1, MAX_SIDE) for key in (3, 4)]
    require(layer, not layer.number(6) or min(sizes) > 1, "it aligns the corners of a single pixel")
    return [Blob((channels, *sizes))]


def binary(layer: Layer, inputs: list[Blob]) -> list[Blob]:
    """Return the shape of a sum, difference, product or quotient with a number or another blob."""
    _bounded(layer, 0, 0, 3)
    if _bounded(layer, 1, 0, 1):
        _floats(layer, 2)
        return inputs
    first, second = (blob.shape for blob in inputs)
    fits = len(first) == len(second) and first[0] == second[0]
    fits = fits and all(a == b or 1 in (a, b) for a, b in zip(first, second, strict=True))
    require(layer, fits, "its inputs do not fit together")
    return [Blob(tuple(map(max, first, second)))]


def concat(layer: Layer, inputs: list[Blob]) -> list[Blob]:
    """Return the shape of blobs that are concatenated along the channels."""
    first = inputs[0]
    fits = all(blob.shape[1:] == first.shape[1:] and len(blob.shape) == len(first.shape) for blob in inputs)
    require(layer, fits and layer.number(0) == 0, "its inputs do not fit together")
    return [Blob((sum(blob.shape[0] for blob in inputs), *first.shape[1:]))]


def equal_slices(layer: Layer, inputs: list[Blob]) -> list[Blob]:
    """Return the shapes of equal parts of the channels."""
    channels, *sides = _image(layer, inputs[0])
    count = len(layer.outputs)
    require(layer, layer.parameters == {0: [-233] * count} and channels % count == 0, "its parts are not equal")
    return [Blob((channels // count, *sides))] * count


def shuffle(layer: Layer, inputs: list[Blob]) -> list[Blob]:
    """Return the shape of a feature map with shuffled channels, which is its own."""
    group = _bounded(layer, 0, 1, MAX_SIDE)
    require(layer, _image(layer, inputs[0])[0] % group == 0, "its groups do not fit its channels")
    return inputs


def pixel_shuffle(layer: Layer, inputs: list[Blob]) -> list[Blob]:
    """Return the shape of a feature map whose channels become pixels."""
    channels, height, width = _image(layer, inputs[0])
    by = _bounded(layer, 0, 1, MAX_KERNEL)
    _bounded(layer, 1, 0, 1)
    require(layer, channels % (by * by) == 0, "its block does not fit its channels")
    return [Blob((channels // (by * by), height * by, width * by))]


def reshape(layer: Layer, inputs: list[Blob]) -> list[Blob]:
    """Return the shape of a vector that becomes a feature map."""
    shape = tuple(_bounded(layer, key, 1, MAX_SIDE) for key in (2, 1, 0))
    require(layer, prod(shape) == prod(inputs[0].shape), "its shape does not fit its input")
    return [Blob(shape)]


def scale(layer: Layer, inputs: list[Blob]) -> list[Blob]:
    """Return the shape of a blob with a factor and a bias per channel, which is its own."""
    fits = layer.number(0) == inputs[0].shape[0] and layer.number(1) == 1
    require(layer, fits, "it does not fit its channels")
    return inputs


def cast(layer: Layer, inputs: list[Blob]) -> list[Blob]:
    """Return the shape of int8 that becomes float."""
    fits = inputs[0].integer and layer.parameters == {0: 3, 1: 1}  # int8 to float32
    require(layer, fits, "its input has the wrong type")
    return [Blob(inputs[0].shape)]


def with_floats(*keys: int) -> Rule:
    """Return the rule of a layer that keeps its input's shape and has these parameters."""

    def rule(layer: Layer, inputs: list[Blob]) -> list[Blob]:
        _floats(layer, *keys)
        return inputs

    return rule


def numbered(key: int, high: int) -> Rule:
    """Return the rule of a layer that keeps its input's shape and has a number from 0 to ``high``."""

    def rule(layer: Layer, inputs: list[Blob]) -> list[Blob]:
        _bounded(layer, key, 0, high)
        return inputs

    return rule
