"""The JSON header of an artifact file, read without torch and without loading tensors.

An artifact is a safetensors file (https://huggingface.co/docs/safetensors): the header's length in eight bytes, a JSON
header, then raw tensors. Its metadata has one entry, ``micronet``, whose value is the JSON of ``Header``.
"""

import json
import struct
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from micronet.errors import MicronetError

FORMAT = 1
KEY = "micronet"
LARGEST_HEADER = 100_000_000  # the format's own limit, in bytes
_IMPORT = "(import it with: micronet import --model NAME --weights {path})"
# A file's first bytes -> what it seems to be.
_SIGNATURES = {
    b"PK\x03\x04": f"a PyTorch or zip file {_IMPORT}",
    b"\x80": f"a pickle {_IMPORT}",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8": "a JPEG image",
    b"\x08": "an ONNX file",
}


@dataclass(frozen=True)
class StageRecord:
    """One stage that a model went through, in JSON values only."""

    stage: str
    config: dict[str, Any] = field(default_factory=dict)  # its settings
    result: dict[str, Any] = field(default_factory=dict)  # the structure, enough to rebuild the network without data

    def to_json(self) -> dict[str, Any]:
        """Return the record as a JSON object."""
        return asdict(self)


@dataclass(frozen=True)
class Header:
    """Everything in an artifact except its tensors."""

    model: dict[str, Any]  # a ModelSpec
    history: list[StageRecord]
    metrics: dict[str, Any] = field(default_factory=dict)  # what was measured before it was written
    data: dict[str, Any] | None = None  # a DataSpec
    seed: int | None = None
    command: str = ""  # the command line that made it, in files of earlier versions
    versions: dict[str, str] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)  # a tensor -> the name that its memory is stored under

    def to_json(self) -> dict[str, Any]:
        """Return the header as a JSON object."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Header":
        """Build a header from its JSON object; raise KeyError or TypeError if it is damaged."""
        fields = {key: item for key, item in value.items() if key in cls.__dataclass_fields__}
        fields["history"] = [StageRecord(**record) for record in value["history"]]
        header = cls(**fields)
        for name in ("model", "metrics", "versions", "tied"):
            if not isinstance(getattr(header, name), dict):
                raise TypeError(f"{name} is not a JSON object")
        if not all(isinstance(part, dict) for record in header.history for part in (record.config, record.result)):
            raise TypeError("a history record is not a JSON object")
        return header


class TensorInfo(NamedTuple):
    """A stored tensor's safetensors dtype name, shape and size in bytes."""

    dtype: str
    shape: tuple[int, ...]
    size_bytes: int


def read_header(path: Path) -> tuple[Header, dict[str, TensorInfo]]:
    """Return an artifact's header, and the dtypes, shapes and sizes of its tensors.

    Raises:
        MicronetError: The file is damaged or not an artifact; the message says what it seems to be.
    """
    raw, data_bytes = _read_raw(path)
    metadata = raw.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise MicronetError(f"{path} has corrupted metadata; recreate it")
    try:
        tensors = {
            name: TensorInfo(entry["dtype"], tuple(entry["shape"]), _size(entry["data_offsets"]))
            for name, entry in raw.items()
        }
    except (KeyError, TypeError, ValueError) as error:
        raise MicronetError(f"{path} has a corrupted tensor table ({error}); recreate it") from error
    expected = sum(info.size_bytes for info in tensors.values())
    if data_bytes != expected:
        raise MicronetError(
            f"{path} is truncated or corrupted: it has {data_bytes:,} bytes of tensor data, expected {expected:,}; "
            "copy it again"
        )
    if KEY not in metadata:
        raise MicronetError(
            f"{path} is a safetensors file that micronet did not write; import it with: "
            f"micronet import --model NAME --weights {path}"
        )
    try:
        value = json.loads(metadata[KEY])
        if value["format"] > FORMAT:
            raise MicronetError(
                f"{path} has format {value['format']}, but this version of micronet only reads formats up to "
                f"{FORMAT}; upgrade with pip install -U micronet-compress"
            )
        return Header.from_json(value), tensors
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MicronetError(f"{path} has a corrupted micronet header ({error}); recreate it") from error


def _read_raw(path: Path) -> tuple[dict[str, Any], int]:
    """Return the safetensors JSON header and the number of bytes after it."""
    if path.is_dir():
        raise MicronetError(f"{path} is a folder; expected an artifact (.safetensors)")
    if not path.exists():
        raise MicronetError(f"{path} does not exist; create it with micronet train or micronet import")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= min(LARGEST_HEADER, size - 8):
                raise ValueError("it has no header")
            raw = json.loads(file.read(length))
            if not isinstance(raw, dict):
                raise ValueError("its header is not a JSON object")
        return raw, size - 8 - length
    except OSError as error:
        raise MicronetError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        kind = "an empty file" if not start else "a truncated, corrupted or unrecognized file"
        kind = next((kind for signature, kind in _SIGNATURES.items() if start.startswith(signature)), kind)
        raise MicronetError(f"{path} is {kind.format(path=path)}, not an artifact (.safetensors)") from error


def _size(offsets: list[int]) -> int:
    begin, end = offsets
    if not 0 <= begin <= end:
        raise ValueError("invalid offsets")
    return end - begin
