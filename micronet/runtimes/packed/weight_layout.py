"""How kernels expect weights and limits in memory."""

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from micronet.runtimes.packed.kernels import cpu

Array = NDArray[Any]
MIN_MADDUBS_ITEMS = 8  # between two widenings; with fewer, VPMADDUBSW is not faster
MAX_COUNTED_BYTES = 31  # their differing bits, at most 8 each, fit in a uint8
MAX_DIFFERING = 2**15 - 2 if cpu.COUNTS_BYTES else 2**31 - 1  # bits per sum: an int16 holds that number and one more
ITEM_VALUES = {cpu.BITS: 8 * cpu.ITEM_BYTES, cpu.UINT8: cpu.ITEM_BYTES, cpu.FLOAT32: 1}


def vector_count(arithmetic: int, outputs: int) -> int:
    """Return how many vectors hold a layer's output channels."""
    multiple = cpu.BIT_VECTOR_MULTIPLE if arithmetic == cpu.BITS else 1
    return -(-outputs // (cpu.LANES * multiple)) * multiple


def plane_count(weight: Array, arithmetic: int) -> int:
    """Return how many planes ``weight_planes`` makes of weights."""
    if arithmetic == cpu.BITS:
        return 1 if np.abs(weight).min() else 2
    return 1 if arithmetic == cpu.FLOAT32 else max(1, -(-int(np.abs(weight).max()) // 127))


def weight_planes(weight: Array, arithmetic: int) -> list[Array]:
    """Split weights into planes whose products are added: a ternary one into two signs, a wide one into int8 values."""
    if arithmetic == cpu.BITS:
        return [weight > 0] if plane_count(weight, cpu.BITS) == 1 else [weight >= 0, weight > 0]
    if arithmetic == cpu.FLOAT32:
        return [weight]
    planes = []
    for _ in range(plane_count(weight, arithmetic)):
        planes.append(weight.clip(-127, 127))
        weight = weight - planes[-1]
    return planes


def max_differing(weight: Array) -> int:
    """Return how many bits of binary or ternary weights can differ from signs in one sum, over all planes."""
    zeros = (weight == 0).any()
    return int((weight[0].size + zeros * (weight != 0).reshape(len(weight), -1).sum(1)).max())


def pack_weights(weight: Array, arithmetic: int, runs: int) -> NDArray[np.uint8]:
    """Return weights (outputs, kernel rows, kernel columns, inputs) in the order in which ``accumulate`` reads them.

    runs: how many runs of items each pixel is read in; a run is a row of the kernel, or one position in it.
    """
    outputs = len(weight)
    vectors = vector_count(arithmetic, outputs)
    planes = []
    for plane in weight_planes(weight, arithmetic):
        padded = np.zeros((vectors * cpu.LANES, runs, weight[0].size // runs), plane.dtype)
        padded[:outputs] = plane.reshape(outputs, runs, -1)
        planes.append(_items(padded, arithmetic))
    most = cpu.MAX_BIT_VECTORS if arithmetic == cpu.BITS else cpu.MAX_VECTORS
    ends = np.cumsum([0, *_block_sizes(vectors, most)]) * cpu.LANES
    blocks = [_block(plane[first:end], arithmetic) for first, end in pairwise(ends) for plane in planes]
    return np.concatenate(blocks)


def pack_depthwise(weight: Array) -> NDArray[np.uint8]:
    """Return weights (channels, kernel rows, kernel columns, 1) as int32 by vector, tap and lane."""
    vectors, taps = vector_count(cpu.UINT8, len(weight)), weight[0].size
    padded = np.zeros((vectors * cpu.LANES, taps), np.int32)
    padded[: len(weight)] = weight.reshape(len(weight), taps)
    lanes = padded.reshape(vectors, cpu.LANES, taps).swapaxes(1, 2)
    return np.ascontiguousarray(lanes).view(np.uint8).ravel()


def block_size(left: int, most: int) -> int:
    """Return how many of the remaining vectors the next block takes: 4, 2 or 1, or when counting bytes 6, 4 or 2."""
    if left == 8 and most == 6:
        return 4  # two blocks of 4 are faster than 6 and 2
    return 2 if min(most, left) == 3 else min(most, left)


def even_share(count: int, most: int) -> int:
    """Return the largest part of ``count`` things, split evenly into as few parts of at most ``most`` as possible."""
    parts = -(-count // most)
    return -(-count // parts)


def widen_interval(weight: Array, arithmetic: int) -> int:
    """Return after how many bytes of a pixel narrow sums must be widened; 0 if never."""
    if arithmetic == cpu.BITS and cpu.COUNTS_BYTES:
        _, rows, columns, inputs = weight.shape
        size = plane_count(weight, arithmetic) * rows * columns * -(-inputs // ITEM_VALUES[cpu.BITS]) * cpu.ITEM_BYTES
        return MAX_COUNTED_BYTES if size > MAX_COUNTED_BYTES else 0
    if arithmetic == cpu.UINT8 and cpu.INSTRUCTION_SET == "avx2":
        items = (2**15 - 1) // (2 * 255 * max(1, int(np.abs(weight).max())))  # int16 sums of two products
        return items * cpu.ITEM_BYTES if items >= MIN_MADDUBS_ITEMS else 0
    return 0


def split_runs(offsets: list[int], length: int, most: int) -> tuple[list[int], int]:
    """Split runs of ``length`` bytes into equal ones of at most ``most``: their offsets and their length."""
    step = cpu.ITEM_BYTES if most % cpu.ITEM_BYTES == 0 else 1  # kernels that widen every 31 bytes read single bytes
    fitting = next(size for size in range(min(length, most or length), 0, -step) if length % size == 0)
    return [offset + at for offset in offsets for at in range(0, length, fitting)], fitting


def limit_bytes(weight: Array, arithmetic: int) -> int:
    """Return the bytes per limit that sums are compared with."""
    if arithmetic != cpu.BITS or not cpu.COUNTS_BYTES:
        return 4
    return 2 if widen_interval(weight, arithmetic) else 1


def strict_limits(limits: Array, size: int) -> Array:
    """Turn the most differing bits that still give +1 into limits of ``size`` bytes that counts must be below.

    limits: (..., channels). Of two bytes, each 32 channels' even limits precede the odd ones.
    """
    *rest, channels = limits.shape
    if size == 1:
        return (limits + 1).clip(0, 255).astype(np.uint8).view(np.int32)
    below = (limits + 1).clip(0, 2**15 - 1).astype(np.int16).reshape(*rest, channels // 32, 16, 2)
    return np.ascontiguousarray(below.swapaxes(-1, -2)).reshape(*rest, channels).view(np.int32)


def _block_sizes(vectors: int, most: int) -> list[int]:
    found = []
    while vectors:
        found.append(block_size(vectors, most))
        vectors -= found[-1]
    return found


def _items(weight: Array, arithmetic: int) -> Array:
    """Pack (outputs, runs, values) into (outputs, runs, bytes of items), uint8."""
    outputs, runs, values = weight.shape
    per_item = ITEM_VALUES[arithmetic]
    padded = np.zeros((outputs, runs, -(-values // per_item) * per_item), weight.dtype)
    padded[..., :values] = weight
    if arithmetic == cpu.BITS:
        return np.packbits(padded, axis=-1, bitorder="little")
    return np.ascontiguousarray(padded.astype(np.float32 if arithmetic == cpu.FLOAT32 else np.int8)).view(np.uint8)


def _block(items: Array, arithmetic: int) -> NDArray[np.uint8]:
    """Interleave the channels of a block: 16 items per vector, or 32 bytes of bits."""
    outputs, runs, size = items.shape
    if arithmetic == cpu.BITS and cpu.COUNTS_BYTES:
        vectors = items.reshape(outputs // 32, 32, runs, size).transpose(2, 3, 0, 1)
        if cpu.WEIGHT_EXPANSION == 2:
            vectors = np.stack([vectors & 15, vectors >> 4], -3)
        return np.ascontiguousarray(vectors).ravel()
    vectors = items.reshape(outputs // cpu.LANES, cpu.LANES, runs, size // cpu.ITEM_BYTES, cpu.ITEM_BYTES)
    return np.ascontiguousarray(vectors.transpose(2, 3, 0, 1, 4)).ravel()
