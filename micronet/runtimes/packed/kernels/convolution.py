"""The inner loops of convolutions: sums of products of packed items, compiled by numba for the processor at hand.

Items of 32 bits hold 32 signs, four whole numbers as uint8, or one float. Output channels lie beside one another in
vectors; four pixels share the weights in registers. ``sums`` has what is done with an item, or a byte of one.
"""

from functools import partial
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from micronet.runtimes.packed.kernels.accumulators import (
    BitSum,
    FewSum,
    FloatSum,
    IntegerSum,
    ManySum,
    PairSum,
    Sum,
    WordSum,
)
from micronet.runtimes.packed.kernels.cpu import (
    BITS,
    BYTEWISE,
    I8,
    I32,
    I64,
    INTEGERS,
    LANES,
    PAIRS,
    PIXELS,
    WAY,
    compiled,
    load,
    primitive,
    store,
)


def _product(own: Sum) -> Any:
    """Return the primitive that sums the products of a row's pixels and a block's channels.

    Sums go to ``sums`` (columns, at least PIXELS; vectors, LANES) of 32 bits; where that is 0, their signs to ``out``.
    Its arguments are sizes and addresses: x, the first pixel; step, bytes to the next one; columns; runs, ``count``
    offsets (int64), at each of which ``length`` bytes lie; most, the bytes that are summed before sums are widened;
    weights, by run, item, vector, lane; limits, a pixel's ``classes`` (int32) bytes on; out, the first pixel's signs;
    out_step, bytes to the next one's; spare, room for those of none; kept, for wide sums; table: ``TABLE``.
    """
    return primitive(types.void, [types.intp] * 16, partial(_emit_product, own))


def _emit_product(
    own: Sum, builder: Any, x: Any, step: Any, columns: Any, runs: Any, count: Any, length: Any, most: Any,
    weights: Any, to: Any, classes: Any, limits: Any, out: Any, out_step: Any, spare: Any, kept: Any, table: Any,
) -> None:  # fmt: skip
    number, zero = partial(ir.Constant, I64), ir.Constant(I64, 0)
    entry = builder.block
    across, outer, begin, inner, turn, after, keep, compare, ended, end = map(
        builder.append_basic_block,
        ("columns", "run", "begin", "item", "turn", "after", "keep", "compare", "ended", "end"),
    )
    nothing = [ir.Constant(own.lanes, [0] * own.lanes.count)] * (PIXELS * own.parts)
    none = _zeros(builder, PIXELS * own.parts * own.spread_over * 32) if own.wide else zero
    distance = builder.sub(columns, number(PIXELS))
    last = builder.select(builder.icmp_signed(">", distance, zero), distance, zero)
    builder.branch(across)

    builder.position_at_end(across)
    column = builder.phi(I64)
    left = builder.add(x, builder.mul(column, step))
    builder.branch(outer)

    builder.position_at_end(outer)
    state = [builder.phi(kind) for kind in (I64, I64, I64, I64, *[own.lanes] * len(nothing))]
    run, at, since, before, *totals = state
    first = builder.add(left, load(builder, I64, builder.add(runs, builder.mul(run, number(8)))))
    pixels = [builder.add(first, builder.mul(step, number(pixel))) for pixel in range(PIXELS)]
    grown_since = builder.add(since, length)

    builder.position_at_end(begin)
    begun = [builder.phi(kind) for kind in (I64, I64, *[own.lanes] * len(nothing))]
    _hand_on(begun, [grown_since, before, *totals], outer)
    builder.position_at_end(outer)
    if own.wide is None:
        builder.branch(begin)
    else:
        full = builder.append_basic_block("full")
        builder.cbranch(builder.icmp_signed(">", grown_since, most), full, begin)
        builder.position_at_end(full)
        for place, wide in enumerate(_widened(own, builder, totals, before)):
            store(builder, wide, kept, place * 32)
        builder.branch(begin)
        _hand_on(begun, [length, kept, *nothing], full)
    builder.position_at_end(begin)
    builder.branch(inner)

    builder.position_at_end(inner)
    inside = [builder.phi(kind) for kind in (I64, I64, *[own.lanes] * len(nothing))]
    item, weight, *sums = inside
    places = [builder.add(pixel, item) for pixel in pixels]
    grown = [total for each in own.add(builder, places, weight, table, _parted(sums)) for total in each]
    next_item, next_weight = builder.add(item, number(own.turn)), builder.add(weight, number(own.row))
    builder.cbranch(builder.icmp_signed("<", next_item, length), inner, turn)
    _hand_on(inside, [zero, at, *begun[2:]], begin)
    _hand_on(inside, [next_item, next_weight, *grown], inner)

    builder.position_at_end(turn)
    next_run = builder.add(run, number(1))
    builder.cbranch(builder.icmp_signed("<", next_run, count), outer, after)
    _hand_on(state, [zero, weights, zero, none, *nothing], across)
    _hand_on(state, [next_run, next_weight, *begun[:2], *grown], turn)

    builder.position_at_end(after)
    found = _parted(_widened(own, builder, grown, begun[1]) if own.wide else grown)
    builder.cbranch(builder.icmp_signed("!=", to, zero), keep, compare)
    builder.position_at_end(keep)
    place = builder.add(to, builder.mul(column, number(own.vectors * LANES * 4)))
    for index, total in enumerate(total for sums in found for total in own.whole(builder, sums)):
        store(builder, total, place, index * LANES * 4)
    builder.branch(ended)
    builder.position_at_end(compare)
    for pixel, sums in enumerate(found):
        here = builder.add(column, number(pixel))
        exists = builder.icmp_signed("<", here, columns)
        known = builder.select(exists, here, column)
        of_class = load(builder, I32, builder.add(classes, builder.mul(known, number(4))))
        own_limits = builder.add(limits, builder.sext(of_class, I64))
        target = builder.select(exists, builder.add(out, builder.mul(here, out_step)), spare)
        for index, signs in enumerate(own.signs(builder, sums, own_limits)):
            store(builder, signs, target, index * signs.type.width // 8)
    builder.branch(ended)

    builder.position_at_end(ended)
    further = builder.add(column, number(PIXELS))
    following = builder.select(builder.icmp_signed("<", further, last), further, last)
    builder.cbranch(builder.icmp_signed("<", column, last), across, end)
    _hand_on([column], [zero], entry)
    _hand_on([column], [following], ended)
    builder.position_at_end(end)


def _zeros(builder: Any, size: int) -> Any:
    """Return the address of so many zeros."""
    words: Any = cgutils
    zeros = ir.Constant(ir.ArrayType(I8, size), bytearray(size))
    return builder.ptrtoint(words.global_constant(builder.module, f"micronet.zeros.{size}", zeros), I64)


def _widened(own: Sum, builder: Any, sums: list[Any], before: Any) -> list[Any]:
    """Return sums as wide ones, with those added that lie at an address."""
    found = [wide for total in sums for wide in own.widen(builder, total)]
    return [builder.add(wide, load(builder, own.wide, before, at * 32)) for at, wide in enumerate(found)]


def _parted(sums: list[Any]) -> list[list[Any]]:
    """Return the sums of each pixel."""
    each = len(sums) // PIXELS
    return [sums[pixel * each : (pixel + 1) * each] for pixel in range(PIXELS)]


def _hand_on(phis: list[Any], values: list[Any], block: Any) -> None:
    """Give values to what a block that leads here hands on."""
    for phi, value in zip(phis, values, strict=True):
        phi.add_incoming(value, block)


_floats1, _floats2, _floats4 = (_product(FloatSum(vectors)) for vectors in (1, 2, 4))
_integer_sum = WordSum if WAY == "avx2" else IntegerSum
_integers1, _integers2, _integers4 = (_product(_integer_sum(vectors)) for vectors in (1, 2, 4))
_pairs1 = _product(PairSum(1))
_bits1, _bits2, _bits4 = (_product(BitSum(vectors)) for vectors in (1, 2, 4))
_few2, _few4, _few6 = (_product(FewSum(vectors)) for vectors in (2, 4, 6))
_many2, _many4, _many6 = (_product(ManySum(vectors)) for vectors in (2, 4, 6))


@compiled
def accumulate(  # type: ignore[no-untyped-def]
    kind, vectors, x, step, columns, runs, count, length, most, weights, sums, classes, limits, out,
    out_step, spare, kept, table,
):  # fmt: skip
    """Sum the products of a row's pixels and a block's channels; see ``_product``."""
    if kind == BITS and BYTEWISE and most:
        if vectors == 6:
            _many6(x, step, columns, runs, count, length, most, weights, sums, classes, limits, out,
                   out_step, spare, kept, table)  # fmt: skip
        elif vectors == 4:
            _many4(x, step, columns, runs, count, length, most, weights, sums, classes, limits, out,
                   out_step, spare, kept, table)  # fmt: skip
        else:
            _many2(x, step, columns, runs, count, length, most, weights, sums, classes, limits, out,
                   out_step, spare, kept, table)  # fmt: skip
    elif kind == BITS and BYTEWISE:
        if vectors == 6:
            _few6(x, step, columns, runs, count, length, most, weights, sums, classes, limits, out,
                  out_step, spare, kept, table)  # fmt: skip
        elif vectors == 4:
            _few4(x, step, columns, runs, count, length, most, weights, sums, classes, limits, out,
                  out_step, spare, kept, table)  # fmt: skip
        else:
            _few2(x, step, columns, runs, count, length, most, weights, sums, classes, limits, out,
                  out_step, spare, kept, table)  # fmt: skip
    elif kind == BITS:
        if vectors == 4:
            _bits4(x, step, columns, runs, count, length, most, weights, sums, classes, limits, out,
                   out_step, spare, kept, table)  # fmt: skip
        elif vectors == 2:
            _bits2(x, step, columns, runs, count, length, most, weights, sums, classes, limits, out,
                   out_step, spare, kept, table)  # fmt: skip
        else:
            _bits1(x, step, columns, runs, count, length, most, weights, sums, classes, limits, out,
                   out_step, spare, kept, table)  # fmt: skip
    elif kind == INTEGERS and PAIRS and most:
        _pairs1(x, step, columns, runs, count, length, most, weights, sums, classes, limits, out,
                out_step, spare, kept, table)  # fmt: skip
    elif kind == INTEGERS:
        if BYTEWISE or vectors == 1:
            _integers1(x, step, columns, runs, count, length, most, weights, sums, classes, limits, out,
                       out_step, spare, kept, table)  # fmt: skip
        elif vectors == 2:
            _integers2(x, step, columns, runs, count, length, most, weights, sums, classes, limits, out,
                       out_step, spare, kept, table)  # fmt: skip
        else:
            _integers4(x, step, columns, runs, count, length, most, weights, sums, classes, limits, out,
                       out_step, spare, kept, table)  # fmt: skip
    elif BYTEWISE or vectors == 1:
        _floats1(x, step, columns, runs, count, length, most, weights, sums, classes, limits, out,
                 out_step, spare, kept, table)  # fmt: skip
    elif vectors == 2:
        _floats2(x, step, columns, runs, count, length, most, weights, sums, classes, limits, out,
                 out_step, spare, kept, table)  # fmt: skip
    else:
        _floats4(x, step, columns, runs, count, length, most, weights, sums, classes, limits, out,
                 out_step, spare, kept, table)  # fmt: skip
