"""Weights in the order and width in which the kernels read them.

Weights are (outputs, kernel rows, kernel columns, inputs of a group) throughout.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from micronet.packed.levels import find_levels

Array = NDArray[Any]
BIT_LANES, LANES = 8, 16  # outputs side by side, as in kernels/lanes.h
MAX_WORDS = 4095  # whose differing bits 16-bit counters hold
DENSE_LEVELS = 64  # from 7 bits on, int8 is as small and faster
MAX_SUM = 2**31 - 1
LAYER_KERNELS = (
    "conv_bits", "conv_bytes", "conv_levels", "conv_wide", "conv_floats", "depthwise_bytes", "depthwise_floats"
)  # fmt: skip


class Stored(NamedTuple):
    """A weight as a kernel reads it.

    kernel: its name. table: the numbers. width: bits of a level, planes of signs, or bytes of a wide weight.
    factor, offset: weight = offset + factor * stored. largest: a bound of the sums' absolute values. centre: what is
    added to each output's weights.
    """

    kernel: str
    table: Array
    width: int
    factor: int
    offset: int
    largest: int
    centre: Array | None = None


def store_signs(weight: Array, groups: int) -> Stored | None:
    """Store weights of signs, if they are binary or ternary: by group, block of outputs, word, plane, output."""
    factor = int(np.abs(weight).max(initial=0)) or 1
    outputs, size = len(weight), weight[0].size
    planes = 1 if (weight != 0).all() else 2
    if (
        not np.isin(weight, (-factor, 0, factor)).all()
        or -(-size // 64) * planes > MAX_WORDS
        or factor * size > MAX_SUM
    ):
        return None
    rows = weight.reshape(outputs, size)
    bits = np.stack([rows > 0] if planes == 1 else [rows >= 0, rows > 0], 1)  # (outputs, planes, size)
    bits = np.pad(bits, ((0, 0), (0, 0), (0, -size % 64)))
    words = np.packbits(bits, axis=-1, bitorder="little").view("<u8").astype(np.uint64)
    table = _blocks(words.transpose(2, 1, 0), groups, BIT_LANES)
    return Stored("conv_bits", table, planes, factor, 0, factor * size)


def store_floats(weight: Array, groups: int) -> Stored:
    """Store float weights: by group, block of outputs, value, output."""
    rows = weight.astype(np.float32).reshape(len(weight), -1)
    return Stored("conv_floats", _blocks(rows.T, groups, LANES), 0, 1, 0, 0)


def store_integers(weight: Array, groups: int) -> Stored:
    """Store weights of uint8 values: dense levels, int8, or wide ones."""
    rows = weight.reshape(len(weight), -1).astype(np.int64)
    found, size = find_levels(rows), rows.shape[1]
    largest = int(np.abs(rows).sum(1).max()) * 255
    width = max(1, (found.number - 1).bit_length())
    parts = (found.number * found.step + abs(found.offset)) * 255 * size
    small = rows.min() >= -128 and rows.max() <= 127
    if found.number <= (DENSE_LEVELS if small else 256) and parts <= MAX_SUM:
        levels = np.pad((rows - found.offset) // found.step, ((0, 0), (0, -size % 8)))
        bits = (levels[..., None] >> np.arange(width)) & 1
        table = np.packbits(bits.reshape(len(rows), -1).astype(np.uint8), axis=-1, bitorder="little")
        return Stored("conv_levels", table, width, found.step, found.offset, largest)
    lows, highs = rows.min(1), rows.max(1)
    centre = np.zeros_like(lows) if small else (lows + highs + 1) // 2
    if (highs - lows).max() <= 255 and largest + int(np.abs(centre).max()) * 255 * size <= MAX_SUM:
        fours = np.pad(rows - centre[:, None], ((0, 0), (0, -size % 4))).reshape(len(rows), -1, 4)
        table = _blocks(fours.transpose(1, 2, 0), groups, LANES, each_last=True).astype(np.int8)
        return Stored("conv_bytes", table, 1, 1, 0, largest, centre.astype(np.int16) if centre.any() else None)
    return store_wide(weight)


def store_wide(weight: Array) -> Stored:
    """Store weights of any integers, for sums of 64 bits."""
    width = next(each for each in (1, 2, 4) if np.abs(weight.astype(np.int64)).max() < 2 ** (8 * each - 1))
    kind = {1: np.int8, 2: np.int16, 4: np.int32}[width]
    rows = weight.reshape(len(weight), -1).astype(np.int64)
    return Stored("conv_wide", rows.astype(kind), width, 1, 0, int(np.abs(rows).sum(1).max()))


def store_depthwise(weight: Array, floats: bool) -> Stored | None:
    """Store depthwise weights as (kernel rows, kernel columns, channels): float32, or int8 if they fit."""
    table = weight[..., 0].transpose(1, 2, 0)
    if floats:
        return Stored("depthwise_floats", table.astype(np.float32), 0, 1, 0, 0)
    largest = int(np.abs(weight.astype(np.int64)).sum((1, 2, 3)).max()) * 255
    if weight.min() < -128 or weight.max() > 127 or largest > MAX_SUM:
        return None
    return Stored("depthwise_bytes", table.astype(np.int8), 1, 1, 0, largest)


def _blocks(table: Array, groups: int, most: int, *, each_last: bool = False) -> Array:
    """Return (..., outputs) by group and by blocks of at most ``most`` outputs; or (..., few, outputs) the same way.

    each_last: the few values of an output lie side by side.
    """
    each = table.shape[-1] // groups
    starts = [
        (group * each + first, min(most, each - first)) for group in range(groups) for first in range(0, each, most)
    ]
    blocks = [table[..., start : start + width] for start, width in starts]
    return np.concatenate([(each.swapaxes(-1, -2) if each_last else each).ravel() for each in blocks])
