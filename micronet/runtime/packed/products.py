"""The inner loops of convolutions: sums of products of packed items, compiled by numba for the processor at hand.

An item is 32 bits of a pixel: 32 signs as bits, whole numbers, or one float. Sixteen output channels lie beside one
another in a vector; four pixels share the weights in registers. Of signs x and weights w the sum of K products is
K - 2 m, m the number of bits that differ. Three ways, by what the processor has:

- ``avx512``: bits by xor and VPOPCNTD, four 8-bit integers an item by VPDPBUSD;
- ``avx2``: bits by weights as nibbles, looked up (VPSHUFB) in the table of differences that the image's byte selects,
  128 products in two instructions; two 16-bit integers an item by VPMADDWD;
- ``portable``: the same by what LLVM makes of population counts and products on any processor.
"""

from functools import partial
from typing import Any

from llvmlite import ir
from numba import types

from micronet.runtime.packed.bytewise import accumulate_bytes
from micronet.runtime.packed.emit import (
    BITS,
    BYTEWISE,
    F32,
    FLOATS,
    I16,
    I32,
    I64,
    INTEGERS,
    INTS,
    ITEM,
    LANES,
    NIBBLES,
    PIXELS,
    REALS,
    WAY,
    call,
    compiled,
    load,
    primitive,
    spread,
    store,
)


def _add_bits(builder: Any, total: Any, x: Any, weight: Any) -> Any:
    return builder.add(total, call(builder, "llvm.ctpop.v16i32", INTS, builder.xor(x, weight)))


def _add_floats(builder: Any, total: Any, x: Any, weight: Any) -> Any:
    return call(builder, "llvm.fmuladd.v16f32", REALS, x, weight, total)


def _add_integers(builder: Any, total: Any, x: Any, weight: Any) -> Any:
    if WAY == "avx512":
        return call(builder, "llvm.x86.avx512.vpdpbusd.512", INTS, total, x, weight)
    if WAY == "avx2":
        halves, pairs = [], ir.VectorType(I16, 16)
        for start in (0, 8):
            lanes = ir.Constant(ir.VectorType(I32, 8), [*range(start, start + 8)])
            sides = [builder.bitcast(builder.shuffle_vector(side, side, lanes), pairs) for side in (x, weight)]
            halves.append(call(builder, "llvm.x86.avx2.pmadd.wd", ir.VectorType(I32, 8), *sides))
        return builder.add(
            total, builder.shuffle_vector(*halves, ir.Constant(ir.VectorType(I32, LANES), [*range(LANES)]))
        )
    half = ir.Constant(INTS, [16] * LANES)
    for sides in ([builder.shl(side, half) for side in (x, weight)], [x, weight]):
        total = builder.add(total, builder.mul(*(builder.ashr(side, half) for side in sides)))
    return total


ADD = {BITS: (_add_bits, INTS), INTEGERS: (_add_integers, INTS), FLOATS: (_add_floats, REALS)}


def _product(kind: int, vectors: int) -> Any:
    """Return the primitive that sums a block's products, to ``sums`` (PIXELS, vectors, LANES) of 32 bits, or as signs.

    Its arguments are sizes and addresses: x, the first pixel; step, bytes to the next one; runs, ``count`` offsets
    (int64), at each of which ``length`` items lie; weights, by run, item, vector, lane. sums: 0 where the sums shall be
    compared instead; ``places`` then holds for each pixel the address of its limits, and of where its signs go.
    """
    return primitive(types.void, [types.intp] * 8, partial(_emit_product, kind, vectors))


def _emit_product(
    kind: int, vectors: int, builder: Any, x: Any, step: Any, runs: Any, count: Any, length: Any, weights: Any, to: Any,
    places: Any,
) -> None:  # fmt: skip
    add, lanes = ADD[kind]
    entry = builder.block
    outer, inner, turn, after, keep, compare, end = (
        builder.append_basic_block(name) for name in ("run", "item", "turn", "after", "keep", "compare", "end")
    )
    block = [(pixel, vector) for pixel in range(PIXELS) for vector in range(vectors)]
    started = [ir.Constant(lanes, [0] * LANES)] * len(block)
    builder.branch(outer)

    builder.position_at_end(outer)
    run, at, *totals = [builder.phi(kind) for kind in (I64, I64, *[lanes] * len(block))]
    offset = load(builder, I64, builder.add(runs, builder.mul(run, ir.Constant(I64, 8))))
    first = builder.add(x, offset)
    pixels = [builder.add(first, builder.mul(step, ir.Constant(I64, pixel))) for pixel in range(PIXELS)]
    builder.branch(inner)

    builder.position_at_end(inner)
    item, weight, *sums = [builder.phi(kind) for kind in (I64, I64, *[lanes] * len(block))]
    own = [load(builder, lanes, weight, vector * LANES * 4) for vector in range(vectors)]
    grown = []
    for pixel in range(PIXELS):
        value = load(builder, F32 if kind == FLOATS else I32, builder.add(pixels[pixel], item))
        same = spread(builder, value, LANES)
        for vector in range(vectors):
            grown.append(add(builder, sums[pixel * vectors + vector], same, own[vector]))
    next_item = builder.add(item, ir.Constant(I64, ITEM))
    next_weight = builder.add(weight, ir.Constant(I64, vectors * LANES * 4))
    bytes_long = builder.mul(length, ir.Constant(I64, ITEM))
    builder.cbranch(builder.icmp_signed("<", next_item, bytes_long), inner, turn)

    builder.position_at_end(turn)
    next_run = builder.add(run, ir.Constant(I64, 1))
    builder.cbranch(builder.icmp_signed("<", next_run, count), outer, after)

    for phi, value in zip([run, at, *totals], [ir.Constant(I64, 0), weights, *started], strict=True):
        phi.add_incoming(value, entry)
    for phi, value in zip([run, at, *totals], [next_run, next_weight, *grown], strict=True):
        phi.add_incoming(value, turn)
    for phi, value in zip([item, weight, *sums], [ir.Constant(I64, 0), at, *totals], strict=True):
        phi.add_incoming(value, outer)
    for phi, value in zip([item, weight, *sums], [next_item, next_weight, *grown], strict=True):
        phi.add_incoming(value, inner)
    builder.position_at_end(after)
    builder.cbranch(builder.icmp_signed("!=", to, ir.Constant(I64, 0)), keep, compare)
    builder.position_at_end(keep)
    for number, value in enumerate(grown):
        store(builder, value, to, number * LANES * 4)
    builder.branch(end)
    builder.position_at_end(compare)
    ends = [[load(builder, I64, places, (pixel * 2 + which) * 8) for which in (0, 1)] for pixel in range(PIXELS)]
    for (pixel, vector), value in zip(block, grown, strict=True):
        limits = load(builder, lanes, ends[pixel][0], vector * LANES * 4)
        store(builder, _compared(builder, kind, value, limits), ends[pixel][1], vector * 2)
    builder.branch(end)
    builder.position_at_end(end)


def _compared(builder: Any, kind: int, sums: Any, limits: Any) -> Any:
    """Return one bit a lane: of differing bits at most, of other sums at least so many."""
    if kind == FLOATS:
        found = builder.fcmp_ordered(">=", sums, limits)
    else:
        found = builder.icmp_signed("<=" if kind == BITS else ">=", sums, limits)
    return builder.bitcast(found, I16)


_floats1, _floats2, _floats4 = (_product(FLOATS, vectors) for vectors in (1, 2, 4))
_integers1, _integers2, _integers4 = (_product(INTEGERS, vectors) for vectors in (1, 2, 4))
_bits1, _bits2, _bits4 = (_product(BITS, vectors) for vectors in (1, 2, 4))


@compiled
def accumulate(kind, vectors, x, step, offsets, length, weights, sums, places, table):  # type: ignore[no-untyped-def]
    """Sum the products of a block of pixels and channels; see ``_product``. Return the address of the next weights.

    offsets: int64, one a run of items. places: int64 (PIXELS, 2). table: ``TABLE``. The others: addresses and sizes.
    """
    runs, count, ends = offsets.ctypes.data, len(offsets), places.ctypes.data
    if kind == BITS:
        if BYTEWISE:
            accumulate_bytes(vectors, x, step, offsets, length, weights, sums, places, table)
            return weights + count * length * vectors * LANES * ITEM * NIBBLES
        if vectors == 4:
            _bits4(x, step, runs, count, length, weights, sums, ends)
        elif vectors == 2:
            _bits2(x, step, runs, count, length, weights, sums, ends)
        else:
            _bits1(x, step, runs, count, length, weights, sums, ends)
    elif kind == INTEGERS:
        if BYTEWISE or vectors == 1:
            _integers1(x, step, runs, count, length, weights, sums, ends)
        elif vectors == 2:
            _integers2(x, step, runs, count, length, weights, sums, ends)
        else:
            _integers4(x, step, runs, count, length, weights, sums, ends)
    elif BYTEWISE or vectors == 1:
        _floats1(x, step, runs, count, length, weights, sums, ends)
    elif vectors == 2:
        _floats2(x, step, runs, count, length, weights, sums, ends)
    else:
        _floats4(x, step, runs, count, length, weights, sums, ends)
    return weights + count * length * vectors * LANES * ITEM
