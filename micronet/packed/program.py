"""A packed network: a list of operations and their numbers, and the one file that holds it.

The file is a safetensors file with three tensors, one a kind of number: ``packed`` (uint8, weights and thresholds at
their own width), ``integers`` (int32, biases) and ``floats`` (float32, scales and what is left in float). Each
operation takes its numbers from them in turn, so the header only tells shapes. All is checked before it is used.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from micronet.errors import MicronetError
from micronet.packed.codec import Levels, levels_of, pack, size, unpack

FORMAT = 1
KEY = "micronet-packed"
LARGEST = 1 << 31  # elements of a weight, beyond which a header is not believed
INT32_MAX = 2**31 - 1
LARGEST_SIZE = 4096  # of a kernel, a stride, a pad
LARGEST_SIDE = 1 << 16  # of an image
# Operation -> how many values it reads; a concatenation any number.
OPERATIONS = {
    "conv": 1, "linear": 1, "threshold": 1, "sign": 1, "relu": 1, "clip": 1, "quantize": 1, "max_pool": 1,
    "average_pool": 1, "mean": 1, "add": 2, "mul": 2, "concat": 2, "flatten": 1, "shuffle": 1, "affine": 1,
}  # fmt: skip
PARTS: dict[str, type] = {"packed": np.uint8, "integers": np.int32, "floats": np.float32}


@dataclass
class Operation:
    """One step. ``inputs``: numbers of earlier values (0: the images; operation i gives value i + 1).

    ``weight``: integers (int32) or float32, (outputs, inputs / groups, ...). ``scale``: float32, of the weight, one or
    one an output. ``bias``: float32, or int32 in units of the input's scale times the weight's. ``limits``: int32, an
    output's least sum that gives +1. ``attributes``: JSON values.
    """

    kind: str
    inputs: list[int]
    attributes: dict[str, Any] = field(default_factory=dict)
    weight: NDArray[Any] | None = None
    scale: NDArray[np.float32] | None = None
    bias: NDArray[Any] | None = None
    limits: NDArray[np.int32] | None = None


@dataclass
class Program:
    """A network. ``shape``: (C, H, W) of an image. ``about``: what micronet knows of it, as an ONNX file's metadata."""

    operations: list[Operation]
    shape: list[int]
    about: dict[str, Any]

    @property
    def weights(self) -> int:
        """Return the number of weights and biases."""
        tensors = [t for op in self.operations for t in (op.weight, op.bias, op.limits) if t is not None]
        return sum(tensor.size for tensor in tensors)


def to_bytes(program: Program) -> bytes:
    """Return a program as its file's bytes."""
    parts: dict[str, list[NDArray[Any]]] = {name: [] for name in PARTS}
    told = [_tell(operation, parts) for operation in program.operations]
    tensors = {name: np.concatenate([np.zeros(0, kind), *parts[name]]) for name, kind in PARTS.items()}
    header = {"format": FORMAT, "shape": program.shape, "operations": told, "about": program.about}
    return save(tensors, {KEY: json.dumps(header, separators=(",", ":"), sort_keys=True)})


def read(path: Path) -> Program:
    """Read a packed file. Raises MicronetError where it is none, or is damaged."""
    try:
        with safe_open(path, "numpy") as file:
            header = json.loads((file.metadata() or {})[KEY])
            tensors = {name: file.get_tensor(name) for name in PARTS}
        if any(tensors[name].dtype != kind or tensors[name].ndim != 1 for name, kind in PARTS.items()):
            raise ValueError("its tensors are of other kinds")
        if not isinstance(header, dict):
            raise ValueError("its header is no object")
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise MicronetError(f"{path} is no packed network ({error}); make it with micronet pack") from error
    parts = {name: _Part(tensor) for name, tensor in tensors.items()}
    if header.get("format") != FORMAT:
        raise MicronetError(f"{path} is of format {header.get('format')}; this micronet reads {FORMAT}")
    try:
        operations = [_restore(told, number, parts) for number, told in enumerate(header["operations"])]
        shape = [_positive(item) for item in header["shape"]]
        if max(shape) > LARGEST_SIDE:
            raise ValueError("its images are too large")
        if not operations or len(shape) != 3 or any(part.rest for part in parts.values()):
            raise ValueError("its parts do not add up")
        about = _checked(dict(header["about"]))
    except (KeyError, ValueError, TypeError, IndexError, AttributeError, OverflowError) as error:
        raise MicronetError(f"{path} is damaged ({error}); make it anew with micronet pack") from error
    return Program(operations, shape, about)


class _Part:
    """One of the file's tensors, taken from its beginning on."""

    def __init__(self, values: NDArray[Any]) -> None:
        self._values = values
        self._at = 0

    def take(self, count: int) -> NDArray[Any]:
        if not 0 <= count <= self.rest:
            raise ValueError("a tensor is shorter than its header tells")
        self._at += count
        return self._values[self._at - count : self._at]

    @property
    def rest(self) -> int:
        return int(self._values.size) - self._at


def _sizes(count: int, least: int) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, list)
        and len(value) == count
        and all(isinstance(item, int) and least <= item <= LARGEST_SIZE for item in value)
    )


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_number, value)) and value[0] <= value[1]


_NEEDED = {
    "clip": ("bounds",), "quantize": ("scale", "zero_point", "range"), "max_pool": ("kernel",),
    "average_pool": ("kernel",), "shuffle": ("groups",),
}  # fmt: skip
_ATTRIBUTES: dict[str, Callable[[Any], bool]] = {
    "kernel": _sizes(2, 1),
    "stride": _sizes(2, 1),
    "dilation": _sizes(2, 1),
    "pads": _sizes(4, 0),
    "group": lambda value: isinstance(value, int) and value > 0,
    "groups": lambda value: isinstance(value, int) and value > 0,
    "scale": lambda value: _number(value) and 0 < value < float("inf"),
    "zero_point": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "range": lambda value: _pair(value) and all(isinstance(end, int) and abs(end) < 2**31 for end in value),
    "bounds": _pair,
    "keep": lambda value: value is True,
    "count_pads": lambda value: value is True,
}


def _tell(operation: Operation, parts: dict[str, list[NDArray[Any]]]) -> dict[str, Any]:
    """Put an operation's numbers into the parts; return what the header tells of it."""
    told: dict[str, Any] = {"op": operation.kind, "in": operation.inputs, **operation.attributes}
    weight = operation.weight
    if weight is not None:
        told["shape"] = list(weight.shape)
        if weight.dtype == np.float32:
            parts["floats"].append(weight.ravel())
        else:
            levels = levels_of(weight)
            told["levels"] = list(levels)
            parts["packed"].append(pack(weight, levels))
    if operation.scale is not None:
        told["scales"] = operation.scale.size
        parts["floats"].append(operation.scale.ravel())
    if operation.bias is not None:
        kind = "floats" if operation.bias.dtype == np.float32 else "integers"
        told["bias"] = [kind, operation.bias.size]
        parts[kind].append(operation.bias)
    if operation.limits is not None:
        levels = levels_of(operation.limits)
        told["limits"] = [operation.limits.size, *levels]
        parts["packed"].append(pack(operation.limits, levels))
    return told


def _restore(told: dict[str, Any], number: int, parts: dict[str, _Part]) -> Operation:
    """Return the operation that a header tells of. Raises ValueError and its like where it tells nonsense."""
    told = dict(told)
    kind, inputs = told.pop("op"), told.pop("in")
    if kind not in OPERATIONS:
        raise ValueError(f"it asks for {kind!r}, which this micronet does not have")
    if not inputs or not all(isinstance(item, int) and 0 <= item <= number for item in inputs):
        raise ValueError("an operation reads what comes after it")
    weight = None
    if "shape" in told:
        shape = tuple(_positive(item) for item in told.pop("shape"))
        if prod(shape) > LARGEST:
            raise ValueError("a weight is too large")
        if "levels" in told:
            weight = _unpacked(parts["packed"], told.pop("levels"), shape)
        else:
            weight = parts["floats"].take(prod(shape)).reshape(shape)
    scale = parts["floats"].take(int(told.pop("scales"))) if "scales" in told else None
    bias = None
    if "bias" in told:
        part, count = told.pop("bias")
        bias = parts[part].take(int(count))
    limits = None
    if "limits" in told:
        length, *grid = told.pop("limits")
        limits = _unpacked(parts["packed"], grid, (_positive(length),))
    for name, value in told.items():
        if not _ATTRIBUTES[name](value):
            raise ValueError(f"its {name} is {value!r}")
    if kind == "quantize" and not told["range"][0] <= told["zero_point"] <= told["range"][1]:
        raise ValueError("a zero point lies outside its range")
    if (limits is not None) != (kind == "threshold") or (
        kind == "threshold" and weight is not None and weight.dtype.kind != "i"
    ):
        raise ValueError("its limits do not fit it")
    if any(name not in told for name in _NEEDED.get(kind, ())):
        raise ValueError(f"a {kind} lacks what it does")
    if "pool" in kind and any(pad >= size for pad, size in zip(told.get("pads", []), 2 * told["kernel"], strict=False)):
        raise ValueError("a pool looks beyond the map alone")
    needed = {"conv": weight, "threshold": weight, "linear": weight}
    if kind in needed and weight is None:
        raise ValueError(f"a {kind} has no numbers")
    if len(inputs) != OPERATIONS[kind] and kind != "concat":
        raise ValueError(f"a {kind} reads {len(inputs)} values")
    for values in (weight, scale, bias):
        if values is not None and not np.isfinite(values).all():
            raise ValueError("it holds NaN or infinity")
    return Operation(kind, list(inputs), told, weight, scale, bias, limits)


def _checked(about: dict[str, Any]) -> dict[str, Any]:
    """Return what a file tells of its network. Raises ValueError where that is not of the kinds it should be."""
    data, stages = about.get("data") or {}, about.get("stages") or []
    classes = data.get("classes") or [] if isinstance(data, dict) else None
    if not isinstance(stages, list) or not isinstance(classes, list) or not all(isinstance(c, str) for c in classes):
        raise ValueError("what it tells of its data is none")
    return about


def _unpacked(part: _Part, grid: list[int], shape: tuple[int, ...]) -> NDArray[np.int32]:
    offset, step, count = map(int, grid)
    levels = Levels(offset, _positive(step), _positive(count))
    if abs(offset) + step * count > INT32_MAX:
        raise ValueError("a weight's integers are beyond 32 bits")
    return unpack(part.take(size(prod(shape), levels.number)), levels, shape)


def _positive(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"a size is {value!r}")
    return value
