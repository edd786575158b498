"""The packed file: a safetensors file with three tensors, one per kind of number.

``packed`` (uint8) holds integer weights and thresholds at their own width, ``integers`` (int32) biases, and ``floats``
(float32) scales and everything that stayed float. Operations take their numbers from them in order, so the header only
holds shapes. Everything is checked before it is used.
"""

import json
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from micronet.errors import MicronetError
from micronet.packed.levels import Levels, find_levels, pack, packed_bytes, unpack
from micronet.packed.program import OPERATIONS, Operation, Program

FORMAT = 1
KEY = "micronet-packed"
MAX_WEIGHTS = 1 << 31  # elements per weight; a larger number means a damaged header
MAX_INT32 = 2**31 - 1
MAX_KERNEL = 4096  # kernel size, stride, padding
MAX_IMAGE_SIDE = 1 << 16
TENSORS: dict[str, type] = {"packed": np.uint8, "integers": np.int32, "floats": np.float32}


def to_bytes(program: Program) -> bytes:
    """Return a program as the bytes of its file."""
    parts: dict[str, list[NDArray[Any]]] = {name: [] for name in TENSORS}
    entries = [_store(operation, parts) for operation in program.operations]
    tensors = {name: np.concatenate([np.zeros(0, kind), *parts[name]]) for name, kind in TENSORS.items()}
    header = {"format": FORMAT, "shape": program.shape, "operations": entries, "about": program.about}
    return save(tensors, {KEY: json.dumps(header, separators=(",", ":"), sort_keys=True)})


def read(path: Path) -> Program:
    """Read a packed file. Raises MicronetError if it is damaged or not a packed network."""
    try:
        with safe_open(path, "numpy") as file:
            header = json.loads((file.metadata() or {})[KEY])
            tensors = {name: file.get_tensor(name) for name in TENSORS}
        if any(tensors[name].dtype != kind or tensors[name].ndim != 1 for name, kind in TENSORS.items()):
            raise ValueError("its tensors have the wrong types")
        if not isinstance(header, dict):
            raise ValueError("its header is not a JSON object")
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise MicronetError(f"{path} is not a packed network ({error}); create one with micronet pack") from error
    if header.get("format") != FORMAT:
        raise MicronetError(
            f"{path} has format {header.get('format')}, but this version of micronet reads format {FORMAT}; pack the "
            "network again with micronet pack"
        )
    try:
        operations = [_load(entry, number, tensors) for number, entry in enumerate(header["operations"])]
        shape = [_positive(item) for item in header["shape"]]
        if max(shape) > MAX_IMAGE_SIDE:
            raise ValueError("its images are too large")
        if not operations or len(shape) != 3 or any(tensor.size for tensor in tensors.values()):
            raise ValueError("its tensors do not match its header")
        about = dict(header["about"])
        _check_about(about)
    except (KeyError, ValueError, TypeError, IndexError, AttributeError, OverflowError) as error:
        raise MicronetError(f"{path} is corrupted ({error}); pack the network again with micronet pack") from error
    return Program(operations, shape, about)


def _take(tensors: dict[str, NDArray[Any]], name: str, count: int) -> NDArray[Any]:
    """Remove numbers from the start of one of the file's tensors, and return them."""
    if not 0 <= count <= tensors[name].size:
        raise ValueError("a tensor is shorter than its header says")
    taken, tensors[name] = tensors[name][:count], tensors[name][count:]
    return taken


def _sizes(count: int, least: int) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, list)
        and len(value) == count
        and all(isinstance(item, int) and least <= item <= MAX_KERNEL for item in value)
    )


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_number, value)) and value[0] <= value[1]


_REQUIRED = {
    "clip": ("bounds",), "quantize": ("scale", "zero_point", "range"), "max_pool": ("kernel",),
    "average_pool": ("kernel",), "shuffle": ("groups",),
}  # fmt: skip
_ATTRIBUTES: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("kernel", "stride", "dilation"), _sizes(2, 1)),
    "pads": _sizes(4, 0),
    **dict.fromkeys(("group", "groups"), lambda value: isinstance(value, int) and value > 0),
    "scale": lambda value: _number(value) and 0 < value < float("inf"),
    "zero_point": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "range": lambda value: _pair(value) and all(isinstance(end, int) and abs(end) < 2**31 for end in value),
    "bounds": _pair,
    **dict.fromkeys(("keep", "count_pads"), lambda value: value is True),
}


def _store(operation: Operation, parts: dict[str, list[NDArray[Any]]]) -> dict[str, Any]:
    """Add an operation's numbers to the parts; return its entry in the header."""
    entry: dict[str, Any] = {"op": operation.kind, "in": operation.inputs, **operation.attributes}
    weight = operation.weight
    if weight is not None:
        entry["shape"] = list(weight.shape)
        if weight.dtype == np.float32:
            parts["floats"].append(weight.ravel())
        else:
            levels = find_levels(weight)
            entry["levels"] = list(levels)
            parts["packed"].append(pack(weight, levels))
    if operation.scale is not None:
        entry["scales"] = operation.scale.size
        parts["floats"].append(operation.scale.ravel())
    if operation.bias is not None:
        kind = "floats" if operation.bias.dtype == np.float32 else "integers"
        entry["bias"] = [kind, operation.bias.size]
        parts[kind].append(operation.bias)
    if operation.limits is not None:
        levels = find_levels(operation.limits)
        entry["limits"] = [operation.limits.size, *levels]
        parts["packed"].append(pack(operation.limits, levels))
    return entry


def _load(entry: dict[str, Any], number: int, tensors: dict[str, NDArray[Any]]) -> Operation:
    """Return the operation of a header entry. Raises ValueError and similar errors if it makes no sense."""
    entry = dict(entry)
    kind, inputs = entry.pop("op"), entry.pop("in")
    if kind not in OPERATIONS:
        raise ValueError(f"this version of micronet does not support its {kind!r} operation")
    if not inputs or not all(isinstance(item, int) and 0 <= item <= number for item in inputs):
        raise ValueError("an operation reads a value before it is computed")
    weight = None
    if "shape" in entry:
        shape = tuple(_positive(item) for item in entry.pop("shape"))
        if prod(shape) > MAX_WEIGHTS:
            raise ValueError("a weight tensor has too many elements")
        if "levels" in entry:
            weight = _unpack(tensors, entry.pop("levels"), shape)
        else:
            weight = _take(tensors, "floats", prod(shape)).reshape(shape)
    scale = _take(tensors, "floats", int(entry.pop("scales"))) if "scales" in entry else None
    bias = limits = None
    if "bias" in entry:
        name, count = entry.pop("bias")
        bias = _take(tensors, name, int(count))
    if "limits" in entry:
        length, *levels = entry.pop("limits")
        limits = _unpack(tensors, levels, (_positive(length),))
    operation = Operation(kind, list(inputs), entry, weight, scale, bias, limits)
    _check_operation(operation)
    return operation


def _check_operation(operation: Operation) -> None:
    """Raise ValueError or KeyError if an operation's attributes or numbers do not fit it."""
    kind, attributes, weight = operation.kind, operation.attributes, operation.weight
    for name, value in attributes.items():
        if not _ATTRIBUTES[name](value):
            raise ValueError(f"the attribute {name} of an operation has the invalid value {value!r}")
    if kind == "quantize" and not attributes["range"][0] <= attributes["zero_point"] <= attributes["range"][1]:
        raise ValueError("a zero point is outside its range")
    if (operation.limits is not None) != (kind == "threshold") or (
        kind == "threshold" and weight is not None and weight.dtype.kind != "i"
    ):
        raise ValueError(f"its {kind} operation has invalid limits")
    if any(name not in attributes for name in _REQUIRED.get(kind, ())):
        raise ValueError(f"its {kind} operation needs {', '.join(_REQUIRED[kind])}")
    if "pool" in kind and any(
        pad >= size for pad, size in zip(attributes.get("pads", []), 2 * attributes["kernel"], strict=False)
    ):
        raise ValueError("the padding of a pooling operation is not smaller than its kernel")
    if kind in ("conv", "threshold", "linear") and weight is None:
        raise ValueError(f"its {kind} operation has no weight")
    if len(operation.inputs) != OPERATIONS[kind] and kind != "concat":
        raise ValueError(f"its {kind} operation has {len(operation.inputs)} inputs, not {OPERATIONS[kind]}")
    for values in (weight, operation.scale, operation.bias):
        if values is not None and not np.isfinite(values).all():
            raise ValueError("it contains NaN or infinity")


def _check_about(about: dict[str, Any]) -> None:
    """Raise ValueError if what a file says about its network has the wrong types."""
    data, stages = about.get("data") or {}, about.get("stages") or []
    classes = data.get("classes") or [] if isinstance(data, dict) else None
    if not isinstance(stages, list) or not isinstance(classes, list) or not all(isinstance(c, str) for c in classes):
        raise ValueError("its metadata is invalid")


def _unpack(tensors: dict[str, NDArray[Any]], levels: list[int], shape: tuple[int, ...]) -> NDArray[np.int32]:
    offset, step, count = map(int, levels)
    checked = Levels(offset, _positive(step), _positive(count))
    if abs(offset) + step * count > MAX_INT32:
        raise ValueError("a weight needs more than 32 bits")
    return unpack(_take(tensors, "packed", packed_bytes(prod(shape), checked.number)), checked, shape)


def _positive(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"a size is {value!r}, not a positive integer")
    return value
