"""Constant tables as C code, each at its true width, and the names of the code."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from micronet.errors import MicronetError

TYPES = {
    "uint8": "uint8_t", "int8": "int8_t", "uint16": "uint16_t", "int16": "int16_t", "int32": "int32_t",
    "uint64": "uint64_t", "float32": "float",
}  # fmt: skip
PER_LINE = {"uint64": 6, "float32": 8}


@dataclass
class Tables:
    """The tables of a network. layer_bytes: bytes by operation; a table that several share belongs to the first."""

    layer_bytes: dict[int, int] = field(default_factory=dict)
    _code: list[str] = field(default_factory=list)
    _known: dict[tuple[str, bytes], str] = field(default_factory=dict)

    def add(self, operation: int, values: NDArray[Any]) -> str:
        """Add a table of an operation; return its name in C. Equal tables are stored once."""
        values = np.ascontiguousarray(values).ravel()
        if values.dtype == np.float32 and not np.isfinite(values).all():
            raise MicronetError(f"operation {operation} of the network has NaN or infinity; --target c cannot hold it")
        key = values.dtype.name, values.tobytes()
        if key not in self._known:
            name = self._known[key] = f"table_{len(self._known)}"
            self.layer_bytes[operation] = self.layer_bytes.get(operation, 0) + values.nbytes
            self._code.append(define(name, values))
        return self._known[key]

    def code(self) -> str:
        """Return the definitions of all tables."""
        return "\n".join(self._code)


def define(name: str, values: NDArray[Any], kind: str = "") -> str:
    """Return the definition of a constant array."""
    texts = [literal(value) for value in values.ravel()]
    size = PER_LINE.get(values.dtype.name, 20)
    lines = [", ".join(texts[first : first + size]) for first in range(0, len(texts), size)]
    body = ",\n    ".join(lines)
    return f"static const {kind or TYPES[values.dtype.name]} {name}[{len(texts)}] = {{\n    {body}\n}};"


def literal(value: Any) -> str:
    """Return a number as a C constant of its own type, exact to the last bit."""
    if isinstance(value, (float, np.floating)):
        return f"{float(np.float32(value)).hex()}f"
    number = int(value)
    if isinstance(value, np.uint64):
        return f"0x{number:x}u"
    return "(-2147483647 - 1)" if number == -(2**31) else str(number)


def fields(**values: Any) -> str:
    """Return an initializer of a struct from its fields; zeros, which C gives the others, and None are left out."""
    given = {name: value for name, value in values.items() if value is not None and value is not False}
    texts = [
        f".{name} = {value if isinstance(value, str) else literal(value)}"
        for name, value in given.items()
        if isinstance(value, str) or value != 0
    ]
    return "{" + ", ".join(texts or ["0"]) + "}"
