"""What ``inspect`` tells of a packed network, and of a folder that ``export`` wrote."""

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from micronet.core.files import file_size
from micronet.core.folders import read_note
from micronet.packed.file_format import read
from micronet.packed.levels import find_levels, packed_bytes
from micronet.packed.program import Operation, Program
from micronet.runtimes.c.sizes import layer_names
from micronet.stages.origin import origin

FLOAT_BITS = 32
FIELDS = (
    "layers",
    "inputs",
    "outputs",
    "operators",
    "params",
    "producer",
    "opsets",
    "other_metadata",
    "integer_layers",
)
_MAKES = {"quantize": "integer", "sign": "binary", "threshold": "binary"}
_NAMES = {2: "binary", 3: "ternary"}


def inspect_packed(path: Path, names: Mapping[int, str] | None = None) -> dict[str, Any]:
    """Return what a packed file holds, in JSON values; raise MicronetError or FailedError as ``read`` does.

    ``names``: of its layers, which the file does not hold, by their operations' indices.
    """
    program = read(path)
    layers = [
        {"name": (names or {}).get(number, str(number)), **_row(each, _input_type(program, each))}
        for number, each in enumerate(program.operations)
        if each.weight is not None
    ]
    return {
        "file": str(path),
        "kind": "packed",
        "size_bytes": path.stat().st_size,
        "inputs": [{"name": "images", "dtype": "float32", "shape": ["N", *program.shape]}],
        "outputs": [{"name": f"operation {value - 1}", "dtype": "float32", "shape": None} for value in program.results],
        "operators": dict(Counter(each.kind for each in program.operations).most_common()),
        "params": program.weights,
        "layers": layers,
        "integer_layers": sum(layer["integer"] for layer in layers),
        "metadata": origin(program.about),
    }


def _row(operation: Operation, given: str) -> dict[str, Any]:
    """Return the row of an operation with a weight; its ``bits`` are what one weight takes in the file."""
    weight = operation.weight
    assert weight is not None
    is_float = weight.dtype.kind == "f"
    number = 0 if is_float else find_levels(weight).number
    bits = FLOAT_BITS if is_float else math.log2(3) if number == 3 else max(1, math.ceil(math.log2(number)))
    return {
        "operator": operation.kind,
        "shape": "x".join(map(str, weight.shape)),
        "params": weight.size,
        "size_bytes": weight.nbytes if is_float else packed_bytes(weight.size, number),
        "bits": round(bits, 2),
        "weight": "float32" if is_float else _NAMES.get(number, f"{bits}-bit"),
        "input": given,
        "integer": not is_float and given != "float32",
    }


def _input_type(program: Program, operation: Operation) -> str:
    """Return what an operation reads: what the last operation that changes the type of numbers before it makes."""
    while operation.inputs[0] > 0:
        operation = program.operations[operation.inputs[0] - 1]
        if operation.kind in _MAKES:
            return _MAKES[operation.kind]
        if operation.weight is not None:
            break
    return "float32"


def inspect_folder(path: Path) -> dict[str, Any]:
    """Return what the note in a folder from ``export`` says, and what a packed network in it holds.

    Raises MicronetError if a file is not as it was written.
    """
    note = read_note(path)
    files = {name: about["bytes"] for name, about in note.pop("files").items()}
    recorded = note.pop("metadata", None) or note.pop("about", None)  # ncnn's
    own = {name: note.pop(name) for name in FIELDS if name in note}  # in forms of the targets' own
    params = {"params": own["params"]} if isinstance(own.get("params"), int) else {}
    about = {
        "layers": [], **note, **params, "metadata": origin(recorded if isinstance(recorded, dict) else {}),
        "files": files, "note": own,
    }  # fmt: skip
    for name in files:
        if name.endswith(".packed"):
            about |= inspect_packed(path / name, layer_names(note))
    return {**about, "file": str(path), "kind": "folder", "size_bytes": file_size(path)}
