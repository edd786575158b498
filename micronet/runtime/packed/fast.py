"""Running a packed network with signs as bits, where numba is installed: what ``kernels`` has, and the rest."""

from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from micronet.runtime.packed import kernels
from micronet.runtime.packed.program import Operation, Program
from micronet.runtime.packed.run import RUN, Array, Value, scaled

LANES = kernels.LANES


class Bits(NamedTuple):
    """Signs (N, H, W, C) as bits, 1 for +1: ``data`` (N, H, W, bytes), zero beyond the ``channels``."""

    data: NDArray[np.uint8]
    channels: int

    def value(self) -> Value:
        """Return the signs as integers."""
        bits = np.unpackbits(self.data, axis=-1, bitorder="little", count=self.channels)
        return Value(bits.astype(np.int8) * np.int8(2) - np.int8(1), 1.0)


class BinaryConv:
    """A convolution of signs with binary or ternary weights and thresholds behind it, its weights laid out to run."""

    def __init__(self, operation: Operation) -> None:
        assert operation.weight is not None
        at = operation.attributes
        self._weight = operation.weight // max(1, int(np.abs(operation.weight).max()))  # sums are told in signs
        limits = np.zeros(len(operation.weight)) if operation.limits is None else operation.limits
        self._limits = limits.astype(np.int64)
        self._pads = at.get("pads", [0, 0, 0, 0])
        self._stride, self._dilation = at.get("stride", [1, 1]), at.get("dilation", [1, 1])
        self._planes = 1 if np.abs(self._weight).min() == 1 else 2
        self._classes: dict[tuple[int, int], Any] = {}

    @cached_property
    def weights(self) -> NDArray[np.uint8]:
        """The weights as the kernel reads them: by block of channels, plane, row, column, byte."""
        # A ternary weight is the mean of two signs: both its own, or one of each where it is 0.
        planes = [self._weight >= 0, self._weight > 0] if self._planes == 2 else [self._weight > 0]
        outs = -(-len(self._weight) // LANES) * LANES
        packed = []
        for plane in planes:
            padded = np.zeros((outs, *plane.shape[1:]), bool)
            padded[: len(plane)] = plane
            packed.append(np.packbits(padded.transpose(0, 2, 3, 1), axis=-1, bitorder="little"))
        parts = []
        for start in range(0, outs, 2 * LANES):
            for bits in packed:
                parts.append(self._laid_out(bits[start : start + 2 * LANES]))
        return np.concatenate(parts)

    def _laid_out(self, bits: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """(channels, rows, columns, bytes) -> flat: the channels of a byte side by side, 32 a vector."""
        vectors = bits.reshape(-1, LANES, *bits.shape[1:]).transpose(2, 3, 4, 0, 1)
        if kernels.WEIGHT_BYTES == 2:
            vectors = np.stack([vectors & 15, vectors >> 4], -2)
        return np.ascontiguousarray(vectors).ravel()

    def __call__(self, x: Bits) -> Bits:
        """Return the signs behind the convolution."""
        return Bits(self._run(x, counted=False)[0], len(self._weight))

    def sums(self, x: Bits) -> NDArray[np.float32]:
        """Return the convolution's sums (N, H', W', channels)."""
        out, differing = self._run(x, counted=True)
        rows, columns = out.shape[1:3]
        room, row_class, column_class = self._classes_of(x.data.shape[1], x.data.shape[2], rows, columns)[1:]
        outs = len(self._weight)
        whole = room[row_class[:, None], column_class].astype(np.float32)  # limits are 0: the sum without a difference
        found: NDArray[np.float32] = np.float32(-2 // self._planes) * differing[..., :outs] + whole[..., :outs]
        return found

    def _run(self, x: Bits, *, counted: bool) -> tuple[NDArray[np.uint8], NDArray[np.int16]]:
        top, left, bottom, right = self._pads
        count, high, wide, _ = x.data.shape
        outs, _, kernel_height, kernel_width = self._weight.shape
        (sy, sx), (dy, dx) = self._stride, self._dilation
        rows = (high + top + bottom - (kernel_height - 1) * dy - 1) // sy + 1
        columns = (wide + left + right - (kernel_width - 1) * dx - 1) // sx + 1
        slack = max(0, kernels.PIXELS - columns) * sx  # the last block of pixels may look beyond a narrow map
        padded = x.data
        if top or left or bottom or right or slack:
            padded = np.zeros((count, high + top + bottom, wide + left + right + slack, x.data.shape[3]), np.uint8)
            padded[:, top : top + high, left : left + wide] = x.data
        limits, _, row_class, column_class = self._classes_of(high, wide, rows, columns)
        channels = -(-outs // LANES) * LANES
        out = np.zeros((count, rows, columns, channels // 8), np.uint8)
        differing = np.empty((count, rows, columns, channels) if counted else (0, 0, 0, 0), np.int16)
        geometry = (kernel_height, kernel_width, sy, sx, dy, dx, -(-x.channels // 8), self._planes)
        kernels.conv_bits(
            padded, self.weights, limits, row_class, column_class, kernels.TABLE, geometry, out, differing
        )
        return out, differing

    def _classes_of(self, high: int, wide: int, rows: int, columns: int) -> Any:
        """Return the most bits that may differ (row classes, column classes, channels), and the places' classes."""
        if (high, wide) not in self._classes:
            top, left = self._pads[:2]
            row_class, row_masks = _inside(rows, self._stride[0], self._dilation[0], self._weight.shape[2], top, high)
            column_class, column_masks = _inside(
                columns, self._stride[1], self._dilation[1], self._weight.shape[3], left, wide
            )
            sums = self._weight.sum(1).astype(np.int64)  # (channels, rows, columns)
            whole = sums.sum((1, 2))
            products = int(np.prod(self._weight.shape[1:]))
            outs = -(-len(self._weight) // LANES) * LANES
            limits = np.full((len(row_masks), len(column_masks), outs), -1, np.int64)
            rooms = np.zeros_like(limits)
            for i, rows_inside in enumerate(row_masks):
                for j, columns_inside in enumerate(column_masks):
                    seen = (sums * rows_inside[:, None] * columns_inside).sum((1, 2))
                    # sum = products - (2 / planes) * differing + (what the padding, taken for -1, is off by)
                    room = products + (whole - seen) - self._limits
                    rooms[i, j, : len(self._weight)] = room
                    limits[i, j, : len(self._weight)] = room // (2 // self._planes)
            clipped = limits.clip(-1, np.iinfo(np.int16).max).astype(np.int16)
            self._classes[high, wide] = clipped, rooms, row_class, column_class
        return self._classes[high, wide]


def _inside(count: int, stride: int, dilation: int, kernel: int, pad: int, size: int) -> tuple[Array, list[Array]]:
    """Return for each output place which class it is of, and for each class which kernel places lie in the map."""
    places = np.arange(count)[:, None] * stride - pad + np.arange(kernel) * dilation
    masks, classes = np.unique((places >= 0) & (places < size), axis=0, return_inverse=True)
    return classes.reshape(-1).astype(np.int64), list(masks)


class GroupedConv:
    """A grouped convolution of signs: one a group, of whole bytes of channels."""

    def __init__(self, operation: Operation) -> None:
        assert operation.weight is not None and operation.limits is not None
        groups = operation.attributes["group"]
        alone = {name: value for name, value in operation.attributes.items() if name != "group"}
        pieces = zip(np.split(operation.weight, groups), np.split(operation.limits, groups), strict=True)
        self._parts = [
            BinaryConv(Operation("threshold", [], alone, weight, limits=limits)) for weight, limits in pieces
        ]
        self._inner, self._each = operation.weight.shape[1], len(operation.weight) // groups

    def __call__(self, x: Bits) -> Bits:
        """Return the signs behind the convolution."""
        width = self._inner // 8
        outs = []
        for group, conv in enumerate(self._parts):
            own = np.ascontiguousarray(x.data[..., group * width : (group + 1) * width])
            outs.append(conv(Bits(own, self._inner)).data[..., : self._each // 8])
        return Bits(np.concatenate(outs, -1), self._each * len(self._parts))


def prepare(operation: Operation) -> BinaryConv | GroupedConv | None:
    """Return a fast form of a convolution of signs with thresholds, or None where there is none."""
    weight, groups = operation.weight, operation.attributes.get("group", 1)
    if operation.kind not in ("threshold", "conv") or weight is None or weight.dtype.kind != "i":
        return None
    if operation.kind == "conv" and groups > 1:
        return None
    unit = int(np.abs(weight).max())
    if not np.isin(weight, (-unit, 0, unit)).all() or not unit:
        return None
    if int(np.prod(weight.shape[1:])) * 2 > np.iinfo(np.int16).max:
        return None
    if groups == 1:
        return BinaryConv(operation)
    aligned = weight.shape[1] % 8 == 0 and len(weight) // groups % 8 == 0
    return GroupedConv(operation) if aligned else None


def pack(x: Array) -> Bits:
    """Return the signs of values (N, H, W, C) as bits."""
    *shape, channels = x.shape
    out = np.zeros((*shape, -(-channels // LANES) * LANES // 8), np.uint8)
    flat = np.ascontiguousarray(x, dtype=np.float32).reshape(-1, channels)
    kernels.pack_signs(flat, out.reshape(-1, out.shape[-1]))
    return Bits(out, channels)


def pool(operation: Operation, x: Bits) -> Bits:
    """Return the maximum of signs."""
    at = operation.attributes
    top, left, bottom, right = at.get("pads", [0, 0, 0, 0])
    (ky, kx), (sy, sx) = at["kernel"], at.get("stride", [1, 1])
    padded = np.pad(x.data, ((0, 0), (top, bottom), (left, right), (0, 0)))
    rows, columns = (padded.shape[1] - ky) // sy + 1, (padded.shape[2] - kx) // sx + 1
    word = next(kind for kind in (np.uint64, np.uint32, np.uint8) if padded.shape[3] % np.dtype(kind).itemsize == 0)
    out = np.empty((len(padded), rows, columns, padded.shape[3]), np.uint8)
    kernels.pool_bits(padded.view(word), (ky, kx), (sy, sx), out.view(word))
    return Bits(out, x.channels)


def shuffle(operation: Operation, x: Bits) -> Bits:
    """Return signs with their channels shuffled."""
    out = np.zeros_like(x.data)
    flat, to = x.data.reshape(-1, x.data.shape[-1]), out.reshape(-1, out.shape[-1])
    kernels.shuffle_bits(flat, operation.attributes["groups"], x.channels, to)
    return Bits(out, x.channels)


class FastSteps:
    """Runs operations on bits where it can, else as numpy does."""

    def __init__(self, program: Program) -> None:
        self._fast = [prepare(operation) for operation in program.operations]

    def __call__(self, index: int, operation: Operation, inputs: list[Any]) -> Any:
        """Run one operation, given its number."""
        first, fast = inputs[0], self._fast[index]
        if operation.kind == "sign" and not isinstance(first, Bits):
            return pack(first.real())
        if isinstance(first, Bits):
            if operation.kind == "max_pool":
                return pool(operation, first)
            if operation.kind == "shuffle":
                return shuffle(operation, first)
            if isinstance(fast, BinaryConv) and operation.kind == "conv":
                assert operation.weight is not None
                unit = np.float32(np.abs(operation.weight).max())
                return scaled(fast.sums(first) * unit, operation, Value(np.zeros(0, np.int8), 1.0))
            if fast is not None:
                return fast(first)
        plain = [item.value() if isinstance(item, Bits) else item for item in inputs]
        out = RUN[operation.kind](operation, *plain)
        return pack(out.data) if operation.kind == "threshold" else out
