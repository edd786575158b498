"""What a network in C needs of flash and RAM, by layer."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LayerSize:
    """One operation of the program: the bytes of its constants, and of the feature maps in use while it runs."""

    operation: int  # -1: the image
    kind: str
    flash: int
    ram: int
    name: str = ""  # of its layer, if it is known


@dataclass(frozen=True)
class CSizes:
    """Bytes of constants (without code, a few KiB), and of static memory: feature maps and a window of a layer."""

    flash: int
    ram: int
    layers: list[LayerSize]

    def describe(self) -> str:
        """Return the sizes in words."""
        return f"flash {self.flash:,} bytes without code, RAM {self.ram:,} bytes"

    def to_json(self) -> dict[str, Any]:
        """Return the sizes as JSON values."""
        return asdict(self)


def layer_names(note: Mapping[str, Any]) -> dict[int, str]:
    """Return the names of the layers that a folder's note lists, by their operations' indices; {} if it lists none."""
    try:
        return {int(each["operation"]): str(each["name"]) for each in note["sizes"]["layers"] if each["name"]}
    except (KeyError, TypeError, ValueError, OverflowError):
        return {}
