"""The inner loops of convolutions: sums of products of packed items.

Items of 32 bits hold 32 signs, four uint8 values, or one float32. Output channels lie side by side in vectors; four
pixels share the weights in registers. ``accumulators`` defines what happens to one item.
"""

from functools import partial
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from micronet.runtimes.packed.kernels.accumulators import (
    Accumulator,
    ByteCountAccumulator,
    FloatAccumulator,
    IntegerAccumulator,
    MaddAccumulator,
    MaddubsAccumulator,
    WidenedByteCountAccumulator,
    WordPopcountAccumulator,
)
from micronet.runtimes.packed.kernels.cpu import (
    BITS,
    BLOCK_PIXELS,
    COUNTS_BYTES,
    HAS_MADDUBS,
    INSTRUCTION_SET,
    LANES,
    UINT8,
)
from micronet.runtimes.packed.kernels.kernel_cache import jit
from micronet.runtimes.packed.kernels.llvm import I8, I32, I64, load, make_intrinsic, store


def _kernel(accumulator: Accumulator) -> Any:
    """Return the intrinsic that accumulates one row of pixels for one block of channels.

    It writes 32-bit sums to ``sums`` (pixels, at least BLOCK_PIXELS; vectors; LANES), or signs to ``out`` if that is 0.
    All arguments are addresses or byte counts, unless they say otherwise:
        x: the first pixel; x_step: from one pixel to the next; columns: the number of pixels.
        runs: ``count`` offsets (int64) from a pixel to a run of ``length`` bytes.
        widen_after: after how many bytes narrow sums are widened.
        weights: by run, item, vector, lane.
        classes: per pixel, the offset (int32) of its border class in ``limits``.
        out: the first pixel's signs; out_step: from one pixel's to the next one's.
        unused: where signs beyond the last pixel go; wide: room for widened sums; table: ``cpu.DIFFERENCE_TABLE``.
    """
    return make_intrinsic(types.void, [types.intp] * 16, partial(_emit_kernel, accumulator))


def _emit_kernel(
    accumulator: Accumulator, builder: Any, x: Any, x_step: Any, columns: Any, runs: Any, count: Any, length: Any,
    widen_after: Any, weights: Any, sums_out: Any, classes: Any, limits: Any, out: Any, out_step: Any, unused: Any,
    wide: Any, table: Any,
) -> None:  # fmt: skip
    number, zero = partial(ir.Constant, I64), ir.Constant(I64, 0)
    entry = builder.block
    next_columns, next_run, begin_run, next_item, end_run, finish, write_sums, write_signs, end_columns, end = map(
        builder.append_basic_block,
        ("columns", "run", "begin", "item", "turn", "after", "keep", "compare", "ended", "end"),
    )
    vector = accumulator.vector_type
    nothing = [ir.Constant(vector, [0] * vector.count)] * (BLOCK_PIXELS * accumulator.parts)
    wide_zeros = zero
    if accumulator.wide_type:
        wide_zeros = _zeros(builder, BLOCK_PIXELS * accumulator.parts * accumulator.wide_parts * 32)
    distance = builder.sub(columns, number(BLOCK_PIXELS))
    last = builder.select(builder.icmp_signed(">", distance, zero), distance, zero)
    builder.branch(next_columns)

    builder.position_at_end(next_columns)  # a block of pixels; the last block may overlap the one before
    column = builder.phi(I64)
    left = builder.add(x, builder.mul(column, x_step))
    builder.branch(next_run)

    builder.position_at_end(next_run)
    state = [builder.phi(kind) for kind in (I64, I64, I64, I64, *[vector] * len(nothing))]
    run, weight_start, since_widened, wide_before, *totals = state
    first = builder.add(left, load(builder, I64, builder.add(runs, builder.mul(run, number(8)))))
    pixels = [builder.add(first, builder.mul(x_step, number(pixel))) for pixel in range(BLOCK_PIXELS)]
    since = builder.add(since_widened, length)

    builder.position_at_end(begin_run)
    begun = [builder.phi(kind) for kind in (I64, I64, *[vector] * len(nothing))]
    _add_incoming(begun, [since, wide_before, *totals], next_run)
    builder.position_at_end(next_run)
    if accumulator.wide_type is None:
        builder.branch(begin_run)
    else:
        widen = builder.append_basic_block("full")
        builder.cbranch(builder.icmp_signed(">", since, widen_after), widen, begin_run)
        builder.position_at_end(widen)
        for index, total in enumerate(_widened(accumulator, builder, totals, wide_before)):
            store(builder, total, wide, index * 32)
        builder.branch(begin_run)
        _add_incoming(begun, [length, wide, *nothing], widen)
    builder.position_at_end(begin_run)
    builder.branch(next_item)

    builder.position_at_end(next_item)
    inside = [builder.phi(kind) for kind in (I64, I64, *[vector] * len(nothing))]
    item, weight, *sums = inside
    places = [builder.add(pixel, item) for pixel in pixels]
    grown = [total for each in accumulator.add(builder, places, weight, table, _by_pixel(sums)) for total in each]
    item_after = builder.add(item, number(accumulator.step_bytes))
    weight_after = builder.add(weight, number(accumulator.weight_bytes))
    builder.cbranch(builder.icmp_signed("<", item_after, length), next_item, end_run)
    _add_incoming(inside, [zero, weight_start, *begun[2:]], begin_run)
    _add_incoming(inside, [item_after, weight_after, *grown], next_item)

    builder.position_at_end(end_run)
    run_after = builder.add(run, number(1))
    builder.cbranch(builder.icmp_signed("<", run_after, count), next_run, finish)
    _add_incoming(state, [zero, weights, zero, wide_zeros, *nothing], next_columns)
    _add_incoming(state, [run_after, weight_after, *begun[:2], *grown], end_run)

    builder.position_at_end(finish)
    found = _by_pixel(_widened(accumulator, builder, grown, begun[1]) if accumulator.wide_type else grown)
    builder.cbranch(builder.icmp_signed("!=", sums_out, zero), write_sums, write_signs)
    builder.position_at_end(write_sums)
    place = builder.add(sums_out, builder.mul(column, number(accumulator.vectors * LANES * 4)))
    for index, total in enumerate(total for sums in found for total in accumulator.as_int32(builder, sums)):
        store(builder, total, place, index * LANES * 4)
    builder.branch(end_columns)
    builder.position_at_end(write_signs)
    _emit_signs(accumulator, builder, found, column, columns, classes, limits, out, out_step, unused)
    builder.branch(end_columns)

    builder.position_at_end(end_columns)
    further = builder.add(column, number(BLOCK_PIXELS))
    column_after = builder.select(builder.icmp_signed("<", further, last), further, last)
    builder.cbranch(builder.icmp_signed("<", column, last), next_columns, end)
    _add_incoming([column], [zero], entry)
    _add_incoming([column], [column_after], end_columns)
    builder.position_at_end(end)


def _emit_signs(
    accumulator: Accumulator, builder: Any, sums: list[list[Any]], column: Any, columns: Any, classes: Any,
    limits: Any, out: Any, out_step: Any, unused: Any,
) -> None:  # fmt: skip
    """Compare each pixel's sums with its limits and store the signs; those beyond the last column go to ``unused``."""
    number = partial(ir.Constant, I64)
    for pixel, totals in enumerate(sums):
        here = builder.add(column, number(pixel))
        exists = builder.icmp_signed("<", here, columns)
        known = builder.select(exists, here, column)
        offset = load(builder, I32, builder.add(classes, builder.mul(known, number(4))))
        own_limits = builder.add(limits, builder.sext(offset, I64))
        target = builder.select(exists, builder.add(out, builder.mul(here, out_step)), unused)
        for index, signs in enumerate(accumulator.signs(builder, totals, own_limits)):
            store(builder, signs, target, index * signs.type.width // 8)


def _zeros(builder: Any, size: int) -> Any:
    """Return the address of ``size`` zero bytes."""
    untyped: Any = cgutils
    zeros = ir.Constant(ir.ArrayType(I8, size), bytearray(size))
    return builder.ptrtoint(untyped.global_constant(builder.module, f"micronet.zeros.{size}", zeros), I64)


def _widened(accumulator: Accumulator, builder: Any, sums: list[Any], before: Any) -> list[Any]:
    """Return narrow sums widened, plus the wide sums at address ``before``."""
    found = [wide for total in sums for wide in accumulator.widen(builder, total)]
    return [
        builder.add(wide, load(builder, accumulator.wide_type, before, index * 32)) for index, wide in enumerate(found)
    ]


def _by_pixel(sums: list[Any]) -> list[list[Any]]:
    """Return a flat list of sums as one list per pixel."""
    each = len(sums) // BLOCK_PIXELS
    return [sums[pixel * each : (pixel + 1) * each] for pixel in range(BLOCK_PIXELS)]


def _add_incoming(phis: list[Any], values: list[Any], block: Any) -> None:
    """Give each phi node its value for control flow from ``block``."""
    for phi, value in zip(phis, values, strict=True):
        phi.add_incoming(value, block)


_integer_class = MaddAccumulator if INSTRUCTION_SET == "avx2" else IntegerAccumulator
_float1, _float2, _float4 = (_kernel(FloatAccumulator(vectors)) for vectors in (1, 2, 4))
_integer1, _integer2, _integer4 = (_kernel(_integer_class(vectors)) for vectors in (1, 2, 4))
_maddubs1 = _kernel(MaddubsAccumulator(1))
_word1, _word2, _word4 = (_kernel(WordPopcountAccumulator(vectors)) for vectors in (1, 2, 4))
_byte2, _byte4, _byte6 = (_kernel(ByteCountAccumulator(vectors)) for vectors in (2, 4, 6))
_wide2, _wide4, _wide6 = (_kernel(WidenedByteCountAccumulator(vectors)) for vectors in (2, 4, 6))


@jit
def accumulate(arithmetic, vectors, widen_after, arguments):  # type: ignore[no-untyped-def]
    """Accumulate one row of pixels for one block of channels; ``_kernel`` lists the arguments."""
    if arithmetic == BITS and COUNTS_BYTES and widen_after:
        if vectors == 6:
            _wide6(*arguments)
        elif vectors == 4:
            _wide4(*arguments)
        else:
            _wide2(*arguments)
    elif arithmetic == BITS and COUNTS_BYTES:
        if vectors == 6:
            _byte6(*arguments)
        elif vectors == 4:
            _byte4(*arguments)
        else:
            _byte2(*arguments)
    elif arithmetic == BITS:
        if vectors == 4:
            _word4(*arguments)
        elif vectors == 2:
            _word2(*arguments)
        else:
            _word1(*arguments)
    elif arithmetic == UINT8 and HAS_MADDUBS and widen_after:
        _maddubs1(*arguments)
    elif arithmetic == UINT8:
        if COUNTS_BYTES or vectors == 1:
            _integer1(*arguments)
        elif vectors == 2:
            _integer2(*arguments)
        else:
            _integer4(*arguments)
    elif COUNTS_BYTES or vectors == 1:
        _float1(*arguments)
    elif vectors == 2:
        _float2(*arguments)
    else:
        _float4(*arguments)
