"""What a network in C needs of flash and RAM."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LayerSize:
    """One operation of the program: the bytes of its constants, and of the feature maps in use while it runs."""

    operation: int  # -1: the image
    kind: str
    flash: int
    ram: int


@dataclass(frozen=True)
class CSizes:
    """Bytes of constants (without code, a few KiB), and of static memory: feature maps and a window of a layer."""

    flash: int
    ram: int
    layers: list[LayerSize]

    def to_json(self) -> dict[str, Any]:
        """Return the sizes as JSON values."""
        return asdict(self)
