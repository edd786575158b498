"""Tensor files: safetensors files with a JSON header of micronet's and checksums over every byte.

A safetensors file (https://huggingface.co/docs/safetensors) is the length of its table in eight bytes, the table in
JSON, then raw tensors. Artifacts, checkpoints, packed networks and calibration statistics have two entries in the
table's metadata: the JSON header, under a key of their kind, and ``checksums``. That is a text of CRC-32s of eight
hexadecimal digits each: the table's, taken with zeros for the checksums, then each tensor's, by name. A CRC-32 finds
every flipped bit and every burst of up to 32 bits (Peterson and Brown 1961, "Cyclic Codes for Error Detection").
"""

import json
import math
import mmap
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from micronet.core.parse import LARGEST_TEXT, check_regular, parse_json
from micronet.errors import MicronetError

CHECKSUMS = "checksums"
_DIGITS = 8
SIZES = {  # bytes of a number, by its type's name in safetensors files
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1), **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4), **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}  # fmt: skip


class TensorInfo(NamedTuple):
    """A stored tensor's safetensors dtype name, shape, and place among the bytes after the table."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    size_bytes: int


@dataclass(frozen=True)
class Table:
    """All of a tensor file but its tensors.

    Attributes:
        text: The table's bytes with their length before them.
        metadata: Its metadata: texts by key.
        tensors: The stored tensors by name.
    """

    text: bytes
    metadata: dict[str, str]
    tensors: dict[str, TensorInfo]

    @property
    def checksums(self) -> str | None:
        """The stored checksums; None in files of versions before there were any."""
        return self.metadata.get(CHECKSUMS)

    def header(self, key: str) -> dict[str, Any]:
        """Return the JSON header under a key; raise KeyError or ValueError if there is none, or it is damaged."""
        if stray := self.metadata.keys() - {key, CHECKSUMS}:
            raise ValueError(f"its metadata has an unknown entry {min(stray)!r}")
        value = parse_json(self.metadata[key])
        if not isinstance(value, dict):
            raise ValueError("its header is not a JSON object")
        return value


def read_table(path: Path) -> Table:
    """Read a tensor file's table, and check its own checksum.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not a tensor file, or is damaged.
    """
    check_regular(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(LARGEST_TEXT, size - 8):
            raise ValueError("it has no header")
        text = start + file.read(length)
    return parse_table(text, size - len(text))


def parse_table(text: bytes, data_bytes: int) -> Table:
    """Return the table in ``text``, which ``data_bytes`` bytes of tensors follow; raise ValueError if it is damaged."""
    table = _parse(text, data_bytes)
    stored = table.checksums
    if stored is not None:
        _check("its header", stored[:_DIGITS], _crc(text.replace(_entry(stored), _entry("0" * len(stored)))))
        if len(stored) != _DIGITS * (len(table.tensors) + 1):
            raise ValueError("it does not have one checksum per tensor")
    return table


def check_tensors(path: Path, table: Table) -> None:
    """Raise MicronetError that names the first tensor whose bytes do not match their checksum, if there are any."""
    if table.checksums is None or not table.tensors:
        return
    try:
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
            memoryview(data) as whole,
            whole[len(table.text) :] as content,
        ):
            for index, (name, crc) in enumerate(_tensor_crcs(table, content), 1):
                _check(f"tensor {name}", table.checksums[index * _DIGITS : (index + 1) * _DIGITS], crc)
    except ValueError as error:
        raise MicronetError(f"{path} is corrupted: {error}; copy it again or recreate it") from error


def seal(data: bytes) -> tuple[bytes, memoryview]:
    """Return a safetensors file with checksums, in two parts: its table with its length before it, and the rest."""
    length = 8 + struct.unpack("<Q", data[:8])[0]
    raw, content = parse_json(data[8:length]), memoryview(data)[length:]
    blank = "0" * _DIGITS * len(raw)  # one for each tensor, and one in place of the metadata
    raw["__metadata__"][CHECKSUMS] = blank
    text = json.dumps(raw, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors are aligned
    table = _parse(struct.pack("<Q", len(text)) + text, len(content))
    found = _crc(table.text) + "".join(crc for _, crc in _tensor_crcs(table, content))
    return table.text.replace(_entry(blank), _entry(found)), content


def _parse(text: bytes, data_bytes: int) -> Table:
    raw = parse_json(text[8:])
    metadata = raw.pop("__metadata__", None) or {} if isinstance(raw, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its header is not a JSON object of tensors and texts")
    tensors = {name: _tensor_info(name, entry) for name, entry in raw.items()}
    expected = sum(info.size_bytes for info in tensors.values())
    if data_bytes != expected:
        raise ValueError(f"it has {data_bytes:,} bytes of tensor data, expected {expected:,}")
    return Table(text, metadata, tensors)


def _tensor_info(name: str, entry: Any) -> TensorInfo:
    """Return what the table says of a tensor; raise ValueError if it makes no sense."""
    if isinstance(entry, dict):
        dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
        if isinstance(dtype, str) and _naturals(shape) and _naturals(offsets) and len(offsets) == 2:
            begin, end = offsets
            if end - begin == math.prod(shape) * SIZES.get(dtype, math.inf):
                return TensorInfo(dtype, tuple(shape), begin, end - begin)
    raise ValueError(f"its entry for tensor {name!r} is invalid")


def _naturals(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _tensor_crcs(table: Table, content: memoryview) -> Iterator[tuple[str, str]]:
    """Yield each tensor's name and the CRC-32 of its bytes, by name; ``content``: the bytes after the table."""
    for name, info in sorted(table.tensors.items()):
        with content[info.begin : info.begin + info.size_bytes] as part:
            found = _crc(part)
        yield name, found


def _crc(data: bytes | memoryview) -> str:
    return f"{zlib.crc32(data):0{_DIGITS}x}"


def _check(what: str, stored: str, found: str) -> None:
    if stored != found:
        raise ValueError(f"{what} does not match its checksum")


def _entry(checksums: str) -> bytes:
    return f'"{CHECKSUMS}":"{checksums}"'.encode()
