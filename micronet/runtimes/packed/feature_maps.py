"""Feature maps between the instructions of a packed network, and the workspace that holds them."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from micronet.runtimes.packed.kernels.cpu import BITS, FLOAT32

Array = NDArray[Any]
CACHE_LINE = 64  # bytes


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
        if self.dtype == BITS:
            return -(-self.channels // 32) * 4
        return self.channels * (4 if self.dtype == FLOAT32 else 1)

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
        if self.dtype == BITS:
            return channel // 8
        return channel * (4 if self.dtype == FLOAT32 else 1)

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
    """Memory for the feature maps of a batch. images (N, C, H, W) and scores (N, H, W, C) are views into it."""

    memory: NDArray[np.uint8]
    images: NDArray[np.float32]
    scores: NDArray[np.float32]
