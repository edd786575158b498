"""A layer of an ncnn network, as a line of its .param file and as bytes of its .bin file.

A line is ``kind name inputs outputs BLOB... ID=VALUE...``. In the .bin file, the weights of convolutions and linear
layers begin with a tag that says their type, and are padded to four bytes; all other numbers are float32.
Source: ncnn's ``src/net.cpp``, ``paramdict.cpp`` and ``modelbin.cpp``.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAGIC = "7767517"  # the first line of a .param file
ARRAY = -23300  # minus the number of a parameter: that of one with several values
TAGS: dict[str, int] = {"float32": 0, "float16": 0x01306B47, "int8": 0x000D4B38}
WITH_TAG = ("Convolution", "ConvolutionDepthWise", "InnerProduct")  # their first tensor has a tag
LONGEST_NAME = 255  # bytes that ncnn reads
LARGEST = float(np.finfo(np.float32).max)
Parameter = int | float | list[float] | list[int]


@dataclass
class Layer:
    """A layer: what it is, the blobs that it reads and computes, its parameters by number, and its tensors."""

    kind: str
    name: str
    inputs: list[str]
    outputs: list[str]
    parameters: dict[int, Parameter] = field(default_factory=dict)
    tensors: list[NDArray[Any]] = field(default_factory=list)

    def number(self, key: int, default: int = 0) -> int:
        """Return a whole-number parameter. Raises ValueError if it is of another type."""
        value = self.parameters.get(key, default)
        if not isinstance(value, int):
            raise ValueError(f"{self.name}: parameter {key} is not a whole number")
        return value

    @property
    def line(self) -> str:
        """The layer's line in the .param file."""
        blobs = [*self.inputs, *self.outputs]
        parameters = [_write(key, value) for key, value in self.parameters.items()]
        head = f"{self.kind:<24} {self.name:<24} {len(self.inputs)} {len(self.outputs)}"
        return " ".join([head, *blobs, *parameters])

    @property
    def data(self) -> bytes:
        """The layer's part of the .bin file."""
        tagged = self.kind in WITH_TAG
        return b"".join(_bytes(tensor, tagged and not index) for index, tensor in enumerate(self.tensors))


def _write(key: int, value: Parameter) -> str:
    if isinstance(value, list):
        return ",".join([f"{ARRAY - key}={len(value)}", *map(_number, value)])
    return f"{key}={_number(value)}"


def _number(value: float) -> str:
    """Return a number as text: of a float32, the nine digits that identify it, in the 15 characters that ncnn reads."""
    if isinstance(value, int):
        return str(value)
    return f"{float(np.clip(np.float32(value), -LARGEST, LARGEST)):.8e}"


def _bytes(tensor: NDArray[Any], tagged: bool) -> bytes:
    data = tensor.astype(tensor.dtype.newbyteorder("<")).tobytes()
    if not tagged:
        return data
    return TAGS[tensor.dtype.name].to_bytes(4, "little") + data + bytes(-len(data) % 4)


def clean(name: str) -> str:
    """Return a layer's name as ncnn can read it: without spaces, and its last ``LONGEST_NAME`` bytes of UTF-8."""
    printable = "".join(letter if letter.isprintable() and not letter.isspace() else "_" for letter in name)
    return printable.encode()[-LONGEST_NAME:].decode(errors="ignore")  # a character that is cut is left out
