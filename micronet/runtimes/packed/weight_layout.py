"""How weights lie in memory for the compiled steps, and what the padding of binary convolutions is off by."""

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from micronet.runtimes.packed.kernels.cpu import (
    BITS,
    BYTEWISE,
    FEWEST,
    FLOATS,
    INTEGERS,
    ITEM,
    LANES,
    MOST,
    MOST_BITS,
    NIBBLES,
    PAIRS,
)

Array = NDArray[Any]
WORTH_PAIRS = 8  # items between two widenings
MOST_COUNTED = 31  # bytes whose differing bits, 8 each at most, a uint8 holds
MOST_DIFFERING = 2**15 - 2 if BYTEWISE else 2**31 - 1  # of a sum: an int16 holds them, and a limit above them
HELD = {BITS: 8 * ITEM, INTEGERS: ITEM, FLOATS: 1}  # values of an item


def vectors_of(product: int, outs: int) -> int:
    """Return how many vectors hold a layer's output channels."""
    fewest = FEWEST if product == BITS else 1
    return -(-outs // (LANES * fewest)) * fewest


def planes_of(weight: Array, product: int) -> list[Array]:
    """Return weights as what is added up: a ternary weight is the mean of two signs, a wide one a sum of int8."""
    if product == BITS:
        return [weight > 0] if np.abs(weight).min() else [weight >= 0, weight > 0]
    if product == FLOATS:
        return [weight]
    parts: list[Array] = []
    left = weight
    while not parts or left.any():
        parts.append(left.clip(-127, 127))
        left = left - parts[-1]
    return parts


def most_differing(weight: Array) -> int:
    """Return how many bits of binary or ternary weights can differ from signs, over all planes."""
    zeros = (weight == 0).any()
    return int((weight[0].size + zeros * (weight != 0).reshape(len(weight), -1).sum(1)).max())


def laid_out(weight: Array, product: int, runs: int) -> NDArray[np.uint8]:
    """Return weights (outputs, rows, columns, inputs) as ``products.accumulate`` reads them, flat.

    runs: how many runs of items a pixel's products are read in, each a row of the kernel, or a place of it.
    """
    outs = len(weight)
    room = vectors_of(product, outs) * LANES
    parts = []
    for plane in planes_of(weight, product):
        padded = np.zeros((room, runs, weight[0].size // runs), plane.dtype)
        padded[:outs] = plane.reshape(outs, runs, -1)
        parts.append(_items(padded, product))
    ends = np.cumsum([0, *_blocks(room // LANES, MOST_BITS if product == BITS else MOST)]) * LANES
    blocks = [_block(part[first:end], product) for first, end in pairwise(ends) for part in parts]
    return np.concatenate(blocks)


def block_size(left: int, most: int) -> int:
    """Return how many of the vectors that are left a block takes: 4, 2 or 1, of bytewise sums 6, 4 or 2."""
    if left == 8 and most == 6:
        return 4  # and 4 are faster than 6 and 2
    return 2 if min(most, left) == 3 else min(most, left)


def even_share(count: int, most: int) -> int:
    """Return how many of some things, at most so many, each of as few parts as can be holds."""
    parts = -(-count // most)
    return -(-count // parts)


def most_bytes(weight: Array, product: int) -> int:
    """Return how many bytes of a pixel are summed before the sums need to be widened; 0: all."""
    if product == BITS and BYTEWISE:
        _, high, wide, inner = weight.shape
        size = len(planes_of(weight, product)) * high * wide * -(-inner // HELD[BITS]) * ITEM
        return MOST_COUNTED if size > MOST_COUNTED else 0
    if product == INTEGERS and PAIRS:
        items = (2**15 - 1) // (2 * 255 * max(1, int(np.abs(weight).max())))  # sums of pairs, int16
        return items * ITEM if items >= WORTH_PAIRS else 0
    return 0


def cut(offsets: list[int], length: int, most: int) -> tuple[list[int], int]:
    """Cut runs of so many bytes into equal ones of at most ``most``: their offsets and their length."""
    step = ITEM if most % ITEM == 0 else 1  # where 31 fit, bytes are taken one by one
    fitting = next(size for size in range(min(length, most or length), 0, -step) if length % size == 0)
    return [offset + at for offset in offsets for at in range(0, length, fitting)], fitting


def limit_bytes(weight: Array, product: int) -> int:
    """Return the bytes of a limit that sums are compared with."""
    if product == BITS and BYTEWISE:
        return 2 if most_bytes(weight, product) else 1
    return 4


def below(limits: Array, size: int) -> Array:
    """Return the most differing bits (..., channels) of a +1 as limits of ``size`` bytes that counts are to be below.

    Of two bytes, 32 channels' even ones lie before the odd ones. As int32 (..., channels * size / 4).
    """
    *rest, channels = limits.shape
    if size == 1:
        return (limits + 1).clip(0, 255).astype(np.uint8).view(np.int32)
    less = (limits + 1).clip(0, 2**15 - 1).astype(np.int16).reshape(*rest, channels // 32, 16, 2)
    return np.ascontiguousarray(less.swapaxes(-1, -2)).reshape(*rest, channels).view(np.int32)


def _blocks(vectors: int, most: int) -> list[int]:
    """Return the sizes of the blocks that a layer's vectors are taken in."""
    found = []
    while vectors:
        found.append(block_size(vectors, most))
        vectors -= found[-1]
    return found


def _items(weight: Array, product: int) -> Array:
    """(outputs, runs, values) -> (outputs, runs, items' bytes), uint8."""
    outs, runs, values = weight.shape
    padded = np.zeros((outs, runs, -(-values // HELD[product]) * HELD[product]), weight.dtype)
    padded[..., :values] = weight
    if product == BITS:
        return np.packbits(padded, axis=-1, bitorder="little")
    kind = np.float32 if product == FLOATS else np.int8
    return np.ascontiguousarray(padded.astype(kind)).view(np.uint8)


def _block(items: Array, product: int) -> NDArray[np.uint8]:
    """Lay the channels of a block side by side: 16 items a vector, or 32 bytes of bits."""
    outs, runs, size = items.shape
    if product == BITS and BYTEWISE:
        vectors = items.reshape(outs // 32, 32, runs, size).transpose(2, 3, 0, 1)
        if NIBBLES == 2:
            vectors = np.stack([vectors & 15, vectors >> 4], -3)
        return np.ascontiguousarray(vectors).ravel()
    vectors = items.reshape(outs // LANES, LANES, runs, size // ITEM, ITEM).transpose(2, 3, 0, 1, 4)
    return np.ascontiguousarray(vectors).ravel()


def border_classes(count: int, stride: int, dilation: int, kernel: int, pad: int, size: int) -> tuple[Array, Array]:
    """Return for each output place its class, and for each class which places of the kernel lie in the map."""
    places = np.arange(count)[:, None] * stride - pad + np.arange(kernel) * dilation
    masks, classes = np.unique((places >= 0) & (places < size), axis=0, return_inverse=True)
    return classes.reshape(-1), masks


def border_sums(weight: Array, rows: Array, columns: Array) -> Array:
    """Return the sums of weights (outputs, rows, columns, inputs) inside the map: (row, column classes, outputs)."""
    places = weight.sum(3).astype(np.int64)
    found: Array = np.einsum("ohw,rh,cw->rco", places, rows.astype(np.int64), columns.astype(np.int64))
    return found
