"""The kinds of ncnn layers that micronet writes: for each, what it may hold and the shape of what it computes.

The writer takes the shapes of all blobs from here, and the reader checks a file by the same rules: ncnn itself checks
nothing, so a file that breaks one of them can crash the process.
"""

from collections.abc import Callable
from math import prod
from typing import NamedTuple

from micronet.runtimes.ncnn.layer import Layer

MAX_KERNEL = 4096  # kernel size, stride, padding
MAX_SIDE = 1 << 16  # height, width and channels
MAX_ELEMENTS = 1 << 30  # of a blob or a tensor
INT8_OUT = 101  # the parameter 8 of layers that compute int8; 1: of those that compute float from int8
NO_WINOGRAD = 64  # the parameter 31
TAKE_INT8 = ("Convolution", "ConvolutionDepthWise", "InnerProduct", "Cast", "Split", "Flatten")
ACTIVATIONS = {0: 0, 1: 0, 2: 1, 3: 2, 4: 0, 5: 0, 6: 2}  # the parameter 9 -> the number of values in parameter 10


class Blob(NamedTuple):
    """A tensor: its shape, (C, H, W) or (N,), and whether it holds int8 instead of float32."""

    shape: tuple[int, ...]
    integer: bool = False


def infer(layer: Layer, inputs: list[Blob]) -> list[Blob]:
    """Return the blobs that a layer computes. Raises ValueError if it does not fit its inputs."""
    ids, rule = KINDS[layer.kind]
    if not set(layer.parameters) <= set(ids):
        raise ValueError(f"{layer.name}: {layer.kind} has an unknown parameter")
    expected = {"Input": 0, "Concat": max(1, len(inputs))}.get(layer.kind, 1)
    expected = 2 - layer.number(1) if layer.kind == "BinaryOp" else expected
    _require(layer, len(inputs) == expected, f"{layer.kind} has {len(inputs)} inputs, not {expected}")
    fits = layer.kind in TAKE_INT8 or not any(blob.integer for blob in inputs)
    _require(layer, fits, f"{layer.kind} reads int8")
    found = rule(layer, inputs)
    for blob in found:
        sides = len(blob.shape) == 1 or all(1 <= size <= MAX_SIDE for size in blob.shape)
        _require(layer, sides and 1 <= prod(blob.shape) <= MAX_ELEMENTS, f"its output has the shape {blob.shape}")
    _require(layer, len(found) == len(layer.outputs), f"{layer.kind} has {len(layer.outputs)} outputs")
    return found


def tensor_sizes(layer: Layer) -> list[int]:
    """Return the number of elements of each of a layer's tensors, in order."""
    if layer.kind == "Quantize":
        return [1]
    if layer.kind == "Scale":
        return [layer.number(0), layer.number(0)]
    if layer.kind == "InnerProduct":
        outputs = layer.number(0)
        scales = [outputs, 1] if layer.number(8) else []
        return [layer.number(2), *([outputs] if layer.number(1) else []), *scales]
    if layer.kind not in ("Convolution", "ConvolutionDepthWise"):
        return []
    outputs, int8 = layer.number(0), layer.number(8)
    scales = [layer.number(7) if layer.kind == "ConvolutionDepthWise" else outputs, 1] if int8 else []
    return [layer.number(6), *([outputs] if layer.number(5) else []), *scales, *([1] if int8 == INT8_OUT else [])]


def macs(layer: Layer, output: Blob) -> int:
    """Return the multiply-accumulates of a layer that computes ``output``."""
    if layer.kind == "InnerProduct":
        return layer.number(2)
    positions = prod(output.shape[1:])
    return layer.number(6) * positions if layer.kind.startswith("Convolution") else 0


def _bounded(layer: Layer, key: int, low: int, high: int, default: int = 0) -> int:
    value = layer.number(key, default)
    if not low <= value <= high:
        raise ValueError(f"{layer.name}: parameter {key} is {value}, not {low} to {high}")
    return value


def _require(layer: Layer, holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"{layer.name}: {what}")


def _floats(layer: Layer, *keys: int) -> None:
    for key in keys:
        _require(layer, isinstance(layer.parameters.get(key), float), f"parameter {key} is not a float")


def _image(layer: Layer, blob: Blob) -> tuple[int, ...]:
    _require(layer, len(blob.shape) == 3, "its input is not a feature map")
    return blob.shape


def _fused(layer: Layer) -> None:
    kind, values = layer.number(9), layer.parameters.get(10, [])
    fits = isinstance(values, list) and ACTIVATIONS.get(kind) == len(values)
    _require(layer, fits, "its activation is invalid")
    _bounded(layer, 31, 0, NO_WINOGRAD)


def _input(layer: Layer, inputs: list[Blob]) -> list[Blob]:
    return [Blob(tuple(_bounded(layer, key, 1, MAX_SIDE) for key in (2, 1, 0)))]


def _convolution(layer: Layer, inputs: list[Blob]) -> list[Blob]:
    channels, *sides = _image(layer, inputs[0])
    outputs, group = _bounded(layer, 0, 1, MAX_SIDE), _bounded(layer, 7, 1, MAX_SIDE, 1)
    int8 = layer.number(8)
    _require(layer, int8 in (0, 1, INT8_OUT) and bool(int8) == inputs[0].integer, "its input has the wrong type")
    _require(layer, channels % group == 0 and outputs % group == 0, "its groups do not fit its channels")
    _bounded(layer, 5, 0, 1)
    _fused(layer)
    sizes, taps = [], 1
    # height, then width: kernel, dilation, stride, padding before and after
    for side, keys in zip(sides, ((11, 12, 13, 14, 16), (1, 2, 3, 4, 15)), strict=True):
        kernel, dilation, stride = (_bounded(layer, key, 1, MAX_KERNEL) for key in keys[:3])
        padding = sum(_bounded(layer, key, 0, MAX_KERNEL) for key in keys[3:])
        extent = (kernel - 1) * dilation + 1
        _require(layer, extent <= side + padding, "its kernel is larger than its input")
        sizes.append((side + padding - extent) // stride + 1)
        taps *= kernel
    expected = outputs * (channels // group) * taps
    _require(layer, layer.number(6) == expected <= MAX_ELEMENTS, "its weights do not fit its input")
    return [Blob((outputs, *sizes), int8 == INT8_OUT)]


def _inner_product(layer: Layer, inputs: list[Blob]) -> list[Blob]:
    outputs, size = _bounded(layer, 0, 1, MAX_SIDE), prod(inputs[0].shape)
    _require(layer, len(inputs[0].shape) == 1, "its input is not a vector")
    _require(layer, layer.number(2) == outputs * size <= MAX_ELEMENTS, "its weights do not fit its input")
    _require(
        layer, layer.number(8) in (0, 1) and bool(layer.number(8)) == inputs[0].integer, "its input has the wrong type"
    )
    _bounded(layer, 1, 0, 1)
    _fused(layer)
    return [Blob((outputs,))]


def _pooling(layer: Layer, inputs: list[Blob]) -> list[Blob]:
    channels, *sides = _image(layer, inputs[0])
    for key in (0, 4, 5, 6):
        _bounded(layer, key, 0, 1)
    if layer.number(4):
        return [Blob((channels,))]
    _require(layer, layer.number(5) == 1, "its padding is not explicit")
    sizes = []
    for side, keys in zip(sides, ((11, 12, 13, 15), (1, 2, 3, 14)), strict=True):
        kernel, stride = (_bounded(layer, key, 1, MAX_SIDE) for key in keys[:2])
        before, after = (_bounded(layer, key, 0, kernel - 1 if key != keys[3] else MAX_KERNEL) for key in keys[2:])
        padded = side + before + after
        _require(layer, kernel <= padded, "its kernel is larger than its input")
        sizes.append((padded - kernel) // stride + 1)
    return [Blob((channels, *sizes))]


def _crop(layer: Layer, inputs: list[Blob]) -> list[Blob]:
    shape = _image(layer, inputs[0])
    extent = tuple(_bounded(layer, key, 1, MAX_SIDE) for key in (5, 4, 3))
    for first, size, key in zip((2, 1, 0), extent, range(3), strict=True):
        _require(layer, _bounded(layer, first, 0, MAX_SIDE) + size <= shape[key], "it cuts beyond its input")
    return [Blob(extent)]


def _padding(layer: Layer, inputs: list[Blob]) -> list[Blob]:
    channels, height, width = _image(layer, inputs[0])
    top, bottom, left, right = (_bounded(layer, key, 0, MAX_KERNEL) for key in range(4))
    return [Blob((channels, height + top + bottom, width + left + right))]


def _interp(layer: Layer, inputs: list[Blob]) -> list[Blob]:
    channels, *sides = _image(layer, inputs[0])
    kind = _bounded(layer, 0, 1, 2)
    _bounded(layer, 6, 0, 1)
    _require(layer, kind == 1 or min(sides) > 1, "it interpolates between fewer than two pixels")
    sizes = [_bounded(layer, key, 1, MAX_SIDE) for key in (3, 4)]
    _require(layer, not layer.number(6) or min(sizes) > 1, "it aligns the corners of a single pixel")
    return [Blob((channels, *sizes))]


def _binary(layer: Layer, inputs: list[Blob]) -> list[Blob]:
    _bounded(layer, 0, 0, 3)
    if _bounded(layer, 1, 0, 1):
        _floats(layer, 2)
        return inputs
    first, second = (blob.shape for blob in inputs)
    fits = len(first) == len(second) and first[0] == second[0]
    fits = fits and all(a == b or 1 in (a, b) for a, b in zip(first, second, strict=True))
    _require(layer, fits, "its inputs do not fit together")
    return [Blob(tuple(map(max, first, second)))]


def _concat(layer: Layer, inputs: list[Blob]) -> list[Blob]:
    first = inputs[0]
    fits = all(blob.shape[1:] == first.shape[1:] and len(blob.shape) == len(first.shape) for blob in inputs)
    _require(layer, fits and layer.number(0) == 0, "its inputs do not fit together")
    return [Blob((sum(blob.shape[0] for blob in inputs), *first.shape[1:]))]


def _slice(layer: Layer, inputs: list[Blob]) -> list[Blob]:
    channels, *sides = _image(layer, inputs[0])
    count = len(layer.outputs)
    _require(layer, layer.parameters == {0: [-233] * count} and channels % count == 0, "its parts are not equal")
    return [Blob((channels // count, *sides))] * count


def _shuffle(layer: Layer, inputs: list[Blob]) -> list[Blob]:
    group = _bounded(layer, 0, 1, MAX_SIDE)
    _require(layer, _image(layer, inputs[0])[0] % group == 0, "its groups do not fit its channels")
    return inputs


def _pixel_shuffle(layer: Layer, inputs: list[Blob]) -> list[Blob]:
    channels, height, width = _image(layer, inputs[0])
    by = _bounded(layer, 0, 1, MAX_KERNEL)
    _bounded(layer, 1, 0, 1)
    _require(layer, channels % (by * by) == 0, "its block does not fit its channels")
    return [Blob((channels // (by * by), height * by, width * by))]


def _reshape(layer: Layer, inputs: list[Blob]) -> list[Blob]:
    shape = tuple(_bounded(layer, key, 1, MAX_SIDE) for key in (2, 1, 0))
    _require(layer, prod(shape) == prod(inputs[0].shape), "its shape does not fit its input")
    return [Blob(shape)]


def _scale(layer: Layer, inputs: list[Blob]) -> list[Blob]:
    fits = layer.number(0) == inputs[0].shape[0] and layer.number(1) == 1
    _require(layer, fits, "it does not fit its channels")
    return inputs


def _cast(layer: Layer, inputs: list[Blob]) -> list[Blob]:
    fits = inputs[0].integer and layer.parameters == {0: 3, 1: 1}  # int8 to float32
    _require(layer, fits, "its input has the wrong type")
    return [Blob(inputs[0].shape)]


def _with_floats(*keys: int) -> "Rule":
    """Return the rule of a layer that keeps its input's shape and has these parameters."""

    def rule(layer: Layer, inputs: list[Blob]) -> list[Blob]:
        _floats(layer, *keys)
        return inputs

    return rule


def _numbered(key: int, high: int) -> "Rule":
    def rule(layer: Layer, inputs: list[Blob]) -> list[Blob]:
        _bounded(layer, key, 0, high)
        return inputs

    return rule


Rule = Callable[[Layer, list[Blob]], list[Blob]]
_WINDOW = (0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13, 14, 15, 16, 31)
KINDS: dict[str, tuple[tuple[int, ...], Rule]] = {
    "Input": ((0, 1, 2), _input),
    "Convolution": (_WINDOW, _convolution),
    "ConvolutionDepthWise": ((*_WINDOW, 7), _convolution),
    "InnerProduct": ((0, 1, 2, 8, 9, 10, 31), _inner_product),
    "Quantize": ((), lambda layer, inputs: [Blob(inputs[0].shape, True)]),
    "Cast": ((0, 1), _cast),
    "Pooling": ((0, 1, 2, 3, 4, 5, 6, 11, 12, 13, 14, 15), _pooling),
    "BinaryOp": ((0, 1, 2), _binary),
    "UnaryOp": ((0,), _numbered(0, 27)),
    "Split": ((), lambda layer, inputs: inputs * len(layer.outputs)),
    "Flatten": ((), lambda layer, inputs: [Blob((prod(inputs[0].shape),), inputs[0].integer)]),
    "Concat": ((0,), _concat),
    "Slice": ((0,), _slice),
    "Crop": (tuple(range(6)), _crop),
    "Padding": (tuple(range(4)), _padding),
    "Interp": ((0, 3, 4, 6), _interp),
    "ShuffleChannel": ((0,), _shuffle),
    "PixelShuffle": ((0, 1), _pixel_shuffle),
    "Reshape": ((0, 1, 2), _reshape),
    "Scale": ((0, 1), _scale),
    "GELU": ((0,), _numbered(0, 1)),
    **dict.fromkeys(("Sigmoid", "TanH", "Swish", "Mish"), ((), _with_floats())),
    **dict.fromkeys(("ReLU", "ELU"), ((0,), _with_floats(0))),
    **dict.fromkeys(("Clip", "HardSigmoid", "HardSwish"), ((0, 1), _with_floats(0, 1))),
}  # fmt: skip
