"""Mutations that know the structure of a file: JSON trees, containers, protobuf messages, arrays, plain bytes."""

import copy
import io
import json
import struct
from contextlib import suppress
from random import Random
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import safetensors.numpy

from micronet.core.tensor_file import CHECKSUMS, seal

LARGEST_INT = 2**63 - 1
DEEP = "[" * 3000 + "]" * 3000
ODD_VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 7, 255, 2**16, 2**31 - 1, 2**40, LARGEST_INT, 2**64, 10**30, -(2**63),
    0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), "", "x", "8", "nan", "../../etc/passwd", "/dev/zero",
    "\x1b[31mred\x07", "a" * 5000, "\u202e\ud800", "os:system", [], {}, [[]], [None], {"": {}}, {"a": 1}, [0], [-1],
    [1, 2, 3, 4, 5, 6, 7], [1e9] * 3, 10**400, -(10**400), [float("nan")] * 3, [2**31] * 100,
]  # fmt: skip


SAME_SIZE = [  # types that a tensor's bytes can be called instead
    ("F64", "I64", "U64"), ("F32", "I32", "U32"), ("F16", "BF16", "I16", "U16"), ("I8", "U8", "BOOL", "F8_E4M3"),
]  # fmt: skip
FLOATS = {"F64": "<d", "F32": "<f"}


def mutate_bytes(content: bytes, random: Random) -> bytes:
    """Flip, remove, repeat, insert or overwrite bytes, once or a few times."""
    data = bytearray(content)
    for _ in range(random.choice([1, 1, 1, 2, 5, 20])):
        if not data:
            return bytes(random.randbytes(random.randrange(20)))
        # Headers are at the start and directories at the end; most of the rest is numbers.
        near = random.choice([len(data), min(len(data), 64), min(len(data), 4096)])
        at = random.choice([random.randrange(near), len(data) - 1 - random.randrange(near)])
        length = random.choice([1, 1, 2, 4, 8, 100])
        match random.randrange(6):
            case 0:
                data[at] ^= 1 << random.randrange(8)
            case 1:
                del data[at : at + length]
            case 2:
                data[at:at] = random.randbytes(length)
            case 3:
                data[at : at + length] = random.choice([b"\x00", b"\xff", b"\x7f", b"\x80"]) * length
            case 4:
                data[at:at] = data[at : at + length]
            case 5:
                del data[at:]
    return bytes(data)


def mutate_json(value: Any, random: Random) -> Any:
    """Change nodes of a JSON tree: another value, a lost, doubled or renamed key, or a value from elsewhere in it."""
    for _ in range(random.choice([1, 1, 1, 2, 4])):
        places = list(_places(value))
        if not places:
            return copy.deepcopy(random.choice(ODD_VALUES))
        owner, key = random.choice(places)
        match random.randrange(6):
            case 0 | 1:
                owner[key] = copy.deepcopy(random.choice(ODD_VALUES))
            case 2:
                del owner[key]
            case 3:
                other, name = random.choice(places)
                owner[key] = json.loads(json.dumps(other[name])) if _has(other, name) else None
            case 4 if isinstance(owner, dict):
                owner[random.choice(["", "x", key + "x", "\x1b[2J", "stage"])] = copy.deepcopy(owner[key])
            case 5 if isinstance(owner[key], int | float) and not isinstance(owner[key], bool):
                owner[key] = random.choice([-owner[key], owner[key] + 1, owner[key] * 1000, str(owner[key])])
    return value


def mutate_tensor_file(content: bytes, random: Random) -> bytes:
    """Mutate a safetensors file of ours: its bytes, its table, or the JSON header inside, sealed again or not."""
    if random.random() < 0.3:
        return mutate_bytes(content, random)
    length = struct.unpack("<Q", content[:8])[0]
    table, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    metadata = table["__metadata__"]
    metadata.pop(CHECKSUMS, None)
    key = next(iter(metadata))
    part = random.randrange(14)
    if part < 7:
        header = mutate_json(json.loads(metadata[key]), random)
        metadata[key] = DEEP if part == 0 and random.random() < 0.2 else json.dumps(header)
    elif part < 9:
        table = mutate_json(table, random)
    elif part < 10:
        data = mutate_bytes(data, random)
    elif part < 12:
        data = _poison(table, data, random)
    elif part < 13:
        entry = random.choice([each for name, each in table.items() if name != "__metadata__"])
        entry["dtype"] = random.choice(next(kinds for kinds in SAME_SIZE if entry["dtype"] in kinds))
    else:
        name = random.choice(list(json.loads(metadata[key])))
        odd = random.choice(["1", "null", "9" * 400, "NaN", "1e999", "[]", '"nin"'])
        metadata[key] = metadata[key].replace("{", f"{{{json.dumps(name)}: {odd},", 1)
    text = json.dumps(table, separators=(",", ":")).encode("utf-8", "surrogatepass")
    file = struct.pack("<Q", len(text)) + text + data
    if random.random() < 0.8:  # a hostile file has valid checksums
        with suppress(ValueError, TypeError, KeyError, AttributeError):
            return b"".join(seal(file))
    return file


def _poison(table: dict[str, Any], data: bytes, random: Random) -> bytes:
    """Overwrite a number of a float tensor with one that no network computes with."""
    floats = [each for name, each in table.items() if name != "__metadata__" and each["dtype"] in FLOATS]
    entry = random.choice(floats)
    kind, (begin, end) = FLOATS[entry["dtype"]], entry["data_offsets"]
    size = struct.calcsize(kind)
    if begin == end:
        return data
    at = begin + size * random.randrange((end - begin) // size)
    value = random.choice([float("nan"), float("nan"), float("inf"), float("-inf"), -1.0, 3e38, 1e-44, 0.0])
    return data[:at] + struct.pack(kind, value) + data[at + size :]


def holds_nan(content: bytes) -> bool:
    """Return True for a tensor file or an ONNX file of which a tensor holds NaN."""
    arrays: list[Any] = []
    with suppress(Exception):
        arrays += safetensors.numpy.load(content).values()
    if not arrays:
        with suppress(Exception):
            proto = onnx.load_model_from_string(content)
            arrays += [onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer]
    return any(
        np.isnan(array).any() for array in arrays if array.dtype.kind == "f" or array.dtype == ml_dtypes.bfloat16
    )


def mutate_json_file(content: bytes, random: Random) -> bytes:
    """Mutate a JSON file: its bytes or its tree."""
    if random.random() < 0.4:
        return mutate_bytes(content, random)
    if random.random() < 0.05:
        return DEEP.encode()
    return json.dumps(mutate_json(json.loads(content), random)).encode()


def mutate_toml(content: bytes, random: Random) -> bytes:
    """Mutate a recipe: its bytes, or the value, key or order of a line."""
    if random.random() < 0.3:
        return mutate_bytes(content, random)
    lines = content.decode().splitlines()
    at = random.randrange(len(lines))
    name, separator, _ = lines[at].partition("=")
    match random.randrange(5):
        case 0 | 1 if separator:
            value = random.choice([*ODD_VALUES, "[" * 2000, float("-inf")])
            lines[at] = f"{name}= {value if isinstance(value, str) and value.startswith('[[') else json.dumps(value)}"
        case 2:
            del lines[at]
        case 3:
            lines.insert(at, random.choice(lines))
        case 4:
            lines[at] = random.choice(
                ["[stage]", "[[stage]]", "a.b.c = 1", "device = 'cuda:99'", "epochs = 10e400", "é=1"]
            )
        case _:
            random.shuffle(lines)
    return "\n".join(lines).encode()


def mutate_npz(content: bytes, random: Random) -> bytes:
    """Mutate an .npz file: its bytes, or the type, shape, values or names of its arrays."""
    arrays = {}
    if random.random() < 0.6:
        with suppress(MemoryError):  # a bomb
            arrays = dict(np.load(io.BytesIO(content)))
    if not arrays:
        return mutate_bytes(content, random)
    name = random.choice(list(arrays))
    array = arrays[name]
    match random.randrange(8):
        case 0:
            arrays[name] = array.astype(random.choice(["f4", "f8", "i8", "u1", "S3", "c8", "?", "M8[s]", "<U2", ">i4"]))
        case 1:
            arrays[name] = array[: random.randrange(len(array) + 1)] if array.ndim else array
        case 2:
            arrays[name] = array.reshape(random.choice([(1, *array.shape), (*array.shape, 1), (-1,)]))
        case 3:
            filled = array.copy()
            filled.flat[random.randrange(max(1, filled.size)) :] = random.choice([0, 1, 255]) if array.size else 0
            arrays[name] = filled
        case 4:
            arrays[random.choice(["", "x", "../x", "a/b", "classes", "\x1b[2J"])] = arrays.pop(name)
        case 5:
            arrays[name] = np.array(random.choice([0, -1, 2**40, np.nan, np.inf]))
        case 6:
            large = array.astype(np.int64) if array.dtype.kind in "iu" else array.astype(np.float64)
            if large.size:
                large.flat[0] = random.choice([2**40, -1, 10**6])
            arrays[name] = large
        case 7:
            del arrays[name]
    file = io.BytesIO()
    np.savez_compressed(file, **{name or "empty": array for name, array in arrays.items()})
    return file.getvalue()


def _places(value: Any) -> Any:
    """Yield every (owner, key) in a JSON tree."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def _has(owner: Any, key: Any) -> bool:
    return key in owner if isinstance(owner, dict) else key < len(owner)
