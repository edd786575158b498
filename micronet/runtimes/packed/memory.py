"""The memory of a packed network: its feature maps, the workspace that holds them, and the constants."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from micronet.runtimes.packed.kernels.cpu import BITS, FLOAT32

Array = NDArray[Any]
CACHE_LINE = 64  # bytes
DTYPES = {"bytes": np.uint8, "ints": np.int32, "offsets": np.int64, "floats": np.float32}  # of the constants


class UnsupportedProgram(Exception):
    """The compiled kernels do not support a program; numpy runs it instead."""


def aligned_zeros(count: int, dtype: Any) -> Array:
    """Return zeros aligned to a cache line: a vector that spans two lines takes a tenth longer to read."""
    size = count * np.dtype(dtype).itemsize
    room = np.zeros(size + CACHE_LINE, np.uint8)
    first = -room.ctypes.data % CACHE_LINE
    return room[first : first + size].view(dtype)


@dataclass(eq=False)
class FeatureMap:
    """A tensor in the workspace, NHWC: element type, shape, quantization, and the padding that its readers need.

    UINT8 elements stand for (element - zero_point) * scale. flat: its readers see it as (N, C * H * W), in NCHW order.
    buffer: its first byte in a workspace for one image.
    """

    dtype: int
    rows: int
    columns: int
    channels: int
    scale: float = 1.0
    zero_point: int = 0
    flat: bool = False
    pads: list[int] = field(default_factory=lambda: [0, 0, 0, 0])  # top, left, bottom, right
    buffer: int = 0

    @property
    def pixel_bytes(self) -> int:
        """Return the bytes from one pixel to the next."""
        return -(-self.channels // 32) * 4 if self.dtype == BITS else self.channel_offset(self.channels)

    @property
    def row_bytes(self) -> int:
        """Return the bytes from one row to the next."""
        return (self.columns + self.pads[1] + self.pads[3]) * self.pixel_bytes

    @property
    def image_bytes(self) -> int:
        """Return the bytes per image, rounded up to whole cache lines."""
        return -(-(self.rows + self.pads[0] + self.pads[2]) * self.row_bytes // CACHE_LINE) * CACHE_LINE

    def start(self, pads: list[int]) -> int:
        """Return the byte in an image at which a reader with this padding starts."""
        return (self.pads[0] - pads[0]) * self.row_bytes + (self.pads[1] - pads[1]) * self.pixel_bytes

    def channel_offset(self, channel: int) -> int:
        """Return the bytes from the start of a pixel to a channel."""
        return channel // 8 if self.dtype == BITS else channel * (4 if self.dtype == FLOAT32 else 1)

    def view_nchw(self, memory: NDArray[np.uint8], images: int) -> NDArray[np.float32]:
        """Return an unpadded float map whose memory order is NCHW, as (N, C, H, W)."""
        shape = (images, self.channels, self.rows, self.columns)
        strides = (self.image_bytes, 4 * self.rows * self.columns, 4 * self.columns, 4)
        return np.ndarray(shape, np.float32, memory, self.buffer * images, strides)

    def view_nhwc(self, memory: NDArray[np.uint8], images: int) -> NDArray[np.float32]:
        """Return a float map as (N, H, W, C)."""
        first = self.buffer * images + self.start([0, 0, 0, 0])
        shape = (images, self.rows, self.columns, self.channels)
        return np.ndarray(shape, np.float32, memory, first, (self.image_bytes, self.row_bytes, self.pixel_bytes, 4))


class Workspace(NamedTuple):
    """Memory for the feature maps of a batch. images (N, C, H, W) and results (N, H, W, C): views into it."""

    memory: NDArray[np.uint8]
    images: NDArray[np.float32]
    results: list[NDArray[np.float32]]


class ConstantPool:
    """Collects weights, limits, scales and biases of all instructions in one array per element type."""

    def __init__(self) -> None:
        self._parts: dict[str, list[Array]] = {name: [] for name in DTYPES}

    def add(self, name: str, values: Array | list[int]) -> int:
        """Add values to an array, a key of DTYPES, and return the position of the first one.

        Raises:
            UnsupportedProgram: if integers need more than 32 bits.
        """
        values = np.ravel(values)
        if name == "ints" and values.size and not -(2**31) <= values.min() <= values.max() < 2**31:
            raise UnsupportedProgram("sums of more than 32 bits")
        if name == "bytes":
            values = np.pad(values, (0, -values.size % CACHE_LINE))
        parts = self._parts[name]
        parts.append(values.astype(DTYPES[name]))
        return sum(part.size for part in parts[:-1])

    def arrays(self) -> tuple[Array, ...]:
        """Return all constants: arrays of uint8, int32, int64 and float32, aligned to cache lines."""
        found = []
        for name, parts in self._parts.items():
            found.append(aligned_zeros(sum(part.size for part in parts), DTYPES[name]))
            np.concatenate([found[-1][:0], *parts], out=found[-1])
        return tuple(found)
