"""The name and arguments that a network can be built from, in JSON values; read without torch."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from micronet.core.parse import make_record
from micronet.errors import MicronetError

TORCHVISION = "torchvision:"
LARGEST_INPUT = 2**28  # values; loading a file runs its network on such inputs
MOST_INPUTS, MOST_DIMS = 1024, 16
_DTYPES = {
    *("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64"),
    *("complex64", "complex128"),
}


@dataclass(frozen=True)
class ModelSpec:
    """What is needed to build a network: its name, the factory's arguments and, for a user's file, its text."""

    name: str
    args: dict[str, Any] = field(default_factory=dict)
    source: str | None = None
    sha256: str | None = None

    @property
    def runs_user_code(self) -> bool:
        """True if building it runs code from outside micronet and torchvision."""
        return ":" in self.name and not self.name.startswith(TORCHVISION)

    @classmethod
    def from_json(cls, value: Any) -> "ModelSpec":
        """Build a spec from its JSON object; raise MicronetError if it is damaged."""
        try:
            return make_record(cls, value)
        except ValueError as error:
            raise MicronetError(f"the file's model record is corrupted ({error}); recreate the file") from error

    def to_json(self) -> dict[str, Any]:
        """Return the fields that are not None as a JSON object."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def check_described(inputs: Sequence[Any]) -> None:
    """Raise ValueError unless this is what ``describe_inputs`` returns, of at most LARGEST_INPUT values together."""
    if len(inputs) > MOST_INPUTS:
        raise ValueError(f"it has {len(inputs):,} inputs, more than {MOST_INPUTS:,}")
    values = 0
    for each in inputs:
        shape, dtype = (each.get(key) if isinstance(each, dict) else None for key in ("shape", "dtype"))
        if not isinstance(shape, list | tuple) or not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"the shape {shape!r:.40} is invalid")
        if len(shape) > MOST_DIMS:
            raise ValueError(f"an input has {len(shape):,} dimensions, more than {MOST_DIMS}")
        if dtype not in _DTYPES:
            raise ValueError(f"the type {dtype!r:.40} is invalid")
        if not isinstance(each.get("name", ""), str):
            raise ValueError(f"the name {each['name']!r:.40} is invalid")
        values += math.prod(shape)
    if values > LARGEST_INPUT:
        raise ValueError(f"its inputs have more than {LARGEST_INPUT:,} values")
