"""Integers at the width that their levels need: 1 bit for two levels, five per byte for three, else n bits.

Evenly spaced integers ``offset + step * level`` are stored as levels, so binary weights {-1, 1} and DoReFa's odd grid
take no more bits than their number of levels needs.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

TRITS = 5  # ternary levels per byte, which use 3^5 = 243 of its 256 values
POWERS = 3 ** np.arange(TRITS, dtype=np.int64)


class Levels(NamedTuple):
    """Integers ``offset + step * level`` for levels 0 to ``number - 1``."""

    offset: int
    step: int
    number: int


def find_levels(values: NDArray[np.integer]) -> Levels:
    """Return the fewest evenly spaced levels that represent integers."""
    low, high = int(values.min()), int(values.max())
    step = int(np.gcd.reduce(np.unique(values.astype(np.int64) - low))) or 1
    return Levels(low, step, (high - low) // step + 1)


def packed_bytes(count: int, levels: int) -> int:
    """Return how many bytes ``count`` integers with this number of levels take."""
    if levels == 3:
        return -(-count // TRITS)
    return -(-count * _bits(levels) // 8)


def pack(values: NDArray[np.integer], levels: Levels) -> NDArray[np.uint8]:
    """Pack integers of any shape into bytes; the last byte is padded with level 0."""
    flat = (values.astype(np.int64).ravel() - levels.offset) // levels.step
    if levels.number == 3:
        padded = np.zeros(packed_bytes(len(flat), 3) * TRITS, np.int64)
        padded[: len(flat)] = flat
        return (padded.reshape(-1, TRITS) @ POWERS).astype(np.uint8)
    bits = (flat[:, None] >> np.arange(_bits(levels.number))) & 1
    return np.packbits(bits.astype(np.uint8).ravel(), bitorder="little")


def unpack(data: NDArray[np.uint8], levels: Levels, shape: tuple[int, ...]) -> NDArray[np.int32]:
    """Return the integers that were packed. Raises ValueError if a byte is not valid."""
    count = int(np.prod(shape))
    if levels.number == 3:
        flat = (data.astype(np.int64)[:, None] // POWERS % 3).ravel()[:count]
        if data.size and int(data.max()) >= 3**TRITS:
            raise ValueError("a byte of ternary weights is larger than 242")
    else:
        width = _bits(levels.number)
        bits = np.unpackbits(data, count=count * width, bitorder="little").reshape(count, width)
        flat = bits.astype(np.int64) @ (1 << np.arange(width, dtype=np.int64))
    if flat.size and int(flat.max()) >= levels.number:
        raise ValueError(f"a packed integer does not match any of the {levels.number} levels")
    return (flat * levels.step + levels.offset).astype(np.int32).reshape(shape)


def _bits(levels: int) -> int:
    return max(1, (levels - 1).bit_length())
