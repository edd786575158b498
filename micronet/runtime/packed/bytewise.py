"""Sums of products of signs where bits are counted by the byte: 32 output channels beside one another."""

from functools import partial
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from micronet.runtime.packed.emit import (
    BYTES,
    FLUSH,
    I8,
    I16,
    I32,
    I64,
    INTS,
    ITEM,
    LANES,
    NIBBLES,
    PIXELS,
    WAY,
    WIDE,
    call,
    compiled,
    load,
    primitive,
    spread,
    store,
)


def _bytewise(pairs: int) -> Any:
    """Return the primitive that adds the differing bits of ``length`` bytes to ``sums`` (PIXELS, pairs, 32) int32."""
    return primitive(types.void, [types.intp] * 6, partial(_emit_bytewise, pairs))


def _emit_bytewise(pairs: int, builder: Any, x: Any, step: Any, length: Any, weights: Any, table: Any, to: Any) -> None:
    entry = builder.block
    block, after = builder.append_basic_block("bytes"), builder.append_basic_block("widen")
    builder.branch(block)
    builder.position_at_end(block)
    index, *sums = [builder.phi(kind) for kind in (I64, *[BYTES] * PIXELS * pairs)]
    size = pairs * 32 * NIBBLES
    row = builder.add(weights, builder.mul(index, ir.Constant(I64, size)))
    own = [[load(builder, BYTES, row, (pair * NIBBLES + half) * 32) for half in range(NIBBLES)]
           for pair in range(pairs)]  # fmt: skip
    grown = []
    for pixel in range(PIXELS):
        place = builder.add(builder.add(x, builder.mul(step, ir.Constant(I64, pixel))), index)
        byte = load(builder, I8, place)
        grown += _differences(builder, byte, table, own, sums[pixel * pairs : (pixel + 1) * pairs])
    following = builder.add(index, ir.Constant(I64, 1))
    builder.cbranch(builder.icmp_signed("<", following, length), block, after)
    for phi, value in zip([index, *sums], [ir.Constant(I64, 0), *[ir.Constant(BYTES, [0] * 32)] * len(sums)],
                          strict=True):  # fmt: skip
        phi.add_incoming(value, entry)
    for phi, value in zip([index, *sums], [following, *grown], strict=True):
        phi.add_incoming(value, block)
    builder.position_at_end(after)
    for number, value in enumerate(grown):
        before = load(builder, WIDE, to, number * 32 * 4)
        store(builder, builder.add(before, builder.zext(value, WIDE)), to, number * 32 * 4)


def _differences(builder: Any, byte: Any, table: Any, own: Any, sums: Any) -> list[Any]:
    """Return sums, each with the bits added in which a byte differs from each of 32 weights."""
    if WAY != "avx2":
        same = spread(builder, byte, 32)
        return [
            builder.add(total, call(builder, "llvm.ctpop.v32i8", BYTES, builder.xor(same, weights[0])))
            for total, weights in zip(sums, own, strict=True)
        ]
    row = builder.add(table, builder.mul(builder.zext(byte, I64), ir.Constant(I64, 32)))
    twice, half = ir.Constant(ir.VectorType(I32, 32), [*range(16), *range(16)]), ir.VectorType(I8, 16)
    tables = []
    for start in (0, 16):
        loaded = load(builder, half, row, start)
        tables.append(builder.shuffle_vector(loaded, ir.Constant(half, ir.Undefined), twice))
    found = []
    for total, weights in zip(sums, own, strict=True):
        for known, nibbles in zip(tables, weights, strict=True):
            total = builder.add(total, call(builder, "llvm.x86.avx2.pshuf.b", BYTES, known, nibbles))
        found.append(total)
    return found


def _emit_compare(builder: Any, sums: Any, limits: Any, to: Any) -> None:
    """Store the signs of 16 counts of differing bits."""
    found = builder.icmp_signed("<=", load(builder, INTS, sums), load(builder, INTS, limits))
    store(builder, builder.bitcast(found, I16), to)


def _emit_move(builder: Any, sums: Any, to: Any) -> None:
    """Copy 16 sums."""
    store(builder, load(builder, INTS, sums), to)


_compare_counts = primitive(types.void, [types.intp] * 3, _emit_compare)
_move = primitive(types.void, [types.intp] * 2, _emit_move)
_bytes1, _bytes2 = _bytewise(1), _bytewise(2)


@compiled
def accumulate_bytes(vectors, x, step, offsets, length, weights, sums, places, table):  # type: ignore[no-untyped-def]
    """Sum products of signs as ``products.accumulate`` does."""
    counts = np.zeros(PIXELS * vectors * LANES, np.int32)
    to = counts.ctypes.data
    for offset in offsets:
        done = 0
        while done < length:
            part = min(FLUSH, length - done)
            if vectors == 4:
                _bytes2(x + offset + done * ITEM, step, part * ITEM, weights, table.ctypes.data, to)
            else:
                _bytes1(x + offset + done * ITEM, step, part * ITEM, weights, table.ctypes.data, to)
            weights += part * ITEM * vectors * LANES * NIBBLES
            done += part
    for pixel in range(PIXELS):
        for vector in range(vectors):
            own = (pixel * vectors + vector) * LANES * 4
            if sums:
                _move(to + own, sums + own)
            else:
                _compare_counts(to + own, places[pixel, 0] + vector * LANES * 4, places[pixel, 1] + vector * 2)
