"""The maps between a packed network's compiled steps, and the steps before their maps have a place."""

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from micronet.runtimes.packed.kernels.cpu import BITS, FLOATS, INTEGERS

Array = NDArray[Any]
LINE = 64  # bytes of a cache line


def zeros(count: int, kind: Any) -> Array:
    """Return zeros that begin where a cache line does: no vector of theirs lies in two lines, which costs a tenth."""
    size = count * np.dtype(kind).itemsize
    room = np.zeros(size + LINE, np.uint8)
    first = -room.ctypes.data % LINE
    return room[first : first + size].view(kind)


class Unfit(Exception):
    """A program that the compiled steps do not have; numpy runs it."""


@dataclass(eq=False)
class Map:
    """A tensor between steps: what it holds, its sides, and the room that its readers want around it.

    Whole numbers are (value - zero) * scale. ``flat``: for its readers it is (C * H * W).
    """

    kind: int
    rows: int
    columns: int
    channels: int
    scale: float = 1.0
    zero: int = 0
    flat: bool = False
    pads: list[int] = field(default_factory=lambda: [0, 0, 0, 0])
    buffer: int = 0

    @property
    def pixel(self) -> int:
        """Bytes from one pixel to the next."""
        if self.kind == BITS:
            return -(-self.channels // 32) * 4
        return self.channels * (4 if self.kind == FLOATS else 1)

    @property
    def row(self) -> int:
        """Bytes from one row to the next."""
        return (self.columns + self.pads[1] + self.pads[3]) * self.pixel

    @property
    def size(self) -> int:
        """Bytes of an image, up to a whole cache line."""
        return -(-(self.rows + self.pads[0] + self.pads[2]) * self.row // LINE) * LINE

    def place(self, pads: list[int]) -> int:
        """Return where an image begins for a reader that wants such pads."""
        return (self.pads[0] - pads[0]) * self.row + (self.pads[1] - pads[1]) * self.pixel

    def planes(self, memory: NDArray[np.uint8], images: int) -> NDArray[np.float32]:
        """Return floats in memory as (N, C, H, W), of a map that lies so and has no room around it."""
        plane = self.rows * self.columns
        sides, steps = (self.channels, self.rows, self.columns), (4 * plane, 4 * self.columns, 4)
        return np.ndarray((images, *sides), np.float32, memory, self.buffer * images, (self.size, *steps))

    def pixels(self, memory: NDArray[np.uint8], images: int) -> NDArray[np.float32]:
        """Return floats in memory as (N, H, W, C)."""
        first = self.buffer * images + self.place([0, 0, 0, 0])
        sides, steps = (self.rows, self.columns, self.channels), (self.row, self.pixel, 4)
        return np.ndarray((images, *sides), np.float32, memory, first, (self.size, *steps))

    def offset(self, channel: int) -> int:
        """Return the bytes from a pixel's begin to a channel."""
        if self.kind == BITS:
            return channel // 8
        return channel * (4 if self.kind == FLOATS else 1)


class Room(NamedTuple):
    """Memory for the maps of N images.

    images: (N, C, H, W) in it, where they are to be put; scores: (N, H, W, C) in it, where they are found.
    """

    memory: NDArray[np.uint8]
    images: NDArray[np.float32]
    scores: NDArray[np.float32]


class Finish(NamedTuple):
    """What follows a step's float values, up to the value that the program reads."""

    value: int
    least: float = -math.inf
    most: float = math.inf
    kind: int = FLOATS
    quantize: dict[str, Any] = {}  # noqa: RUF012  # never written

    @property
    def clips(self) -> bool:
        """Whether values are clipped."""
        return self.least > -math.inf or self.most < math.inf


@dataclass
class Step:
    """A step before its maps have a place. ``numbers``: fields of STEP. ``channel``: of the output, where it begins."""

    numbers: dict[str, Any]
    x: Map
    out: Map
    y: Map | None = None
    pads: list[int] = field(default_factory=lambda: [0, 0, 0, 0])
    dilation: list[int] = field(default_factory=lambda: [1, 1])
    x_channel: int = 0
    channel: int = 0
    weight: Array | None = None  # (outputs, rows, columns, inputs)


def ends(finish: Finish) -> dict[str, float]:
    """Return the bounds of what follows, as fields of STEP."""
    found = {"least": finish.least, "most": finish.most}
    if finish.kind == INTEGERS:
        low, high = finish.quantize["range"]
        found |= {"low": low - finish.quantize["zero_point"], "top_level": high - finish.quantize["zero_point"]}
    return found
