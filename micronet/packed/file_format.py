"""The packed file: a safetensors file with three tensors, one per kind of number.

``packed`` (uint8) holds integer weights and thresholds at their own width, ``integers`` (int32) biases, and ``floats``
(float32) scales and everything that stayed float. Operations take their numbers from them in order, so the header only
holds shapes. Everything is checked before it is used.
"""

import json
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from micronet.core.tensor_file import check_tensors, read_table, seal
from micronet.errors import FailedError, MicronetError
from micronet.packed.checks import MAX_SIDE, check_about, check_operation, positive
from micronet.packed.levels import Levels, find_levels, pack, packed_bytes, unpack
from micronet.packed.program import OPERATIONS, Operation, Program

FORMATS = (1, 2)  # files of several outputs have format 2, which earlier versions would misread
KEY = "micronet-packed"
MAX_WEIGHTS = 1 << 31  # elements per weight; a larger number means a damaged header
MAX_INT32 = 2**31 - 1
TENSORS: dict[str, type] = {"packed": np.uint8, "integers": np.int32, "floats": np.float32}
TYPES = {"packed": "U8", "integers": "I32", "floats": "F32"}  # their names in safetensors files


def to_bytes(program: Program) -> bytes:
    """Return a program as the bytes of its file."""
    parts: dict[str, list[NDArray[Any]]] = {name: [] for name in TENSORS}
    entries = [_store(operation, parts) for operation in program.operations]
    tensors = {name: np.concatenate([np.zeros(0, kind), *parts[name]]) for name, kind in TENSORS.items()}
    header = {"format": 1, "shape": program.shape, "operations": entries, "about": program.about}
    if program.outputs is not None:
        header |= {"format": 2, "outputs": program.outputs}
    text = json.dumps(header, separators=(",", ":"), sort_keys=True)
    return b"".join(seal(save(tensors, {KEY: text})))


def read(path: Path) -> Program:
    """Read a packed file. Raises MicronetError if it is damaged or not a packed network, FailedError if it has NaN."""
    try:
        table = read_table(path)
        header = table.header(KEY)
        check_tensors(path, table)
        if any(table.tensors[name].dtype != kind for name, kind in TYPES.items()):
            raise ValueError("its tensors have the wrong types")
        with safe_open(path, "numpy") as file:
            tensors = {name: file.get_tensor(name) for name in TENSORS}
        if any(tensor.ndim != 1 for tensor in tensors.values()):
            raise ValueError("its tensors are not vectors")
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise MicronetError(f"{path} is not a packed network ({error}); create one with micronet pack") from error
    if header.get("format") not in FORMATS:
        raise MicronetError(
            f"{path} has format {header.get('format')}, but this version of micronet reads formats "
            f"{' and '.join(map(str, FORMATS))}; pack the network again with micronet pack"
        )
    try:
        operations = [_load(entry, number, tensors) for number, entry in enumerate(header["operations"])]
        shape = [positive(item) for item in header["shape"]]
        if max(shape) > MAX_SIDE:
            raise ValueError("its image size is too large")
        if not operations or len(shape) != 3 or any(tensor.size for tensor in tensors.values()):
            raise ValueError("its tensors do not match its header")
        outputs = [_value(item, operations) for item in header["outputs"]] if header["format"] == 2 else None
        if outputs == []:
            raise ValueError("it has no outputs")
        about = dict(header["about"])
        check_about(about)
    except FailedError as error:
        raise FailedError(f"{path}: {error}; pack the network again with micronet pack") from error
    except (KeyError, ValueError, TypeError, IndexError, AttributeError, OverflowError) as error:
        raise MicronetError(f"{path} is corrupted ({error}); pack the network again with micronet pack") from error
    return Program(operations, shape, about, outputs)


def _value(item: Any, operations: list[Operation]) -> int:
    if not isinstance(item, int) or not 0 <= item <= len(operations):
        raise ValueError("one of its outputs is never computed")
    return item


def _take(tensors: dict[str, NDArray[Any]], name: str, count: int) -> NDArray[Any]:
    """Remove numbers from the start of one of the file's tensors, and return them."""
    if not 0 <= count <= tensors[name].size:
        raise ValueError("a tensor is shorter than its header says")
    taken, tensors[name] = tensors[name][:count], tensors[name][count:]
    return taken


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
        shape = tuple(positive(item) for item in entry.pop("shape"))
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
        limits = _unpack(tensors, levels, (positive(length),))
    operation = Operation(kind, list(inputs), entry, weight, scale, bias, limits)
    check_operation(operation)
    return operation


def _unpack(tensors: dict[str, NDArray[Any]], levels: list[int], shape: tuple[int, ...]) -> NDArray[np.int32]:
    offset, step, count = map(int, levels)
    checked = Levels(offset, positive(step), positive(count))
    if abs(offset) + step * count > MAX_INT32:
        raise ValueError("a weight needs more than 32 bits")
    return unpack(_take(tensors, "packed", packed_bytes(prod(shape), checked.number)), checked, shape)
