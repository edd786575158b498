"""The inner loops of convolutions: sums of products of packed items.

Items of 32 bits hold 32 signs, four uint8 values, or one float32. Output channels lie side by side in vectors; four
pixels share the weights in registers. ``accumulators`` defines what happens to one item.
"""

import itertools
from collections import namedtuple
from functools import partial
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from micronet.runtimes.packed.kernels.accumulators import ACCUMULATORS, Accumulator, Sums, accumulator_key
from micronet.runtimes.packed.kernels.cpu import BLOCK_PIXELS
from micronet.runtimes.packed.kernels.kernel_cache import jit
from micronet.runtimes.packed.kernels.llvm import I8, I32, I64, VECTOR_BYTES, Builder, make_intrinsic, splat

_accumulator_key = jit(accumulator_key)


class Arguments(namedtuple("Arguments", "x x_step columns runs count length widen_after weights sums classes limits "
                           "out out_step unused wide table")):  # fmt: skip
    """What a kernel needs to accumulate one row of pixels for one block of channels: addresses and byte counts.

    It writes 32-bit sums to ``sums`` (pixels, at least BLOCK_PIXELS; vectors; LANES), or signs to ``out`` if that is 0.
    x: the first pixel. x_step: from one pixel to the next. columns: the number of pixels.
    runs: ``count`` offsets (int64) from a pixel to a run of ``length`` bytes.
    widen_after: after how many bytes narrow sums are widened.
    weights: by run, item, vector, lane.
    classes: per pixel, the offset (int32) of its border class in ``limits``.
    out: the first pixel's signs. out_step: from one pixel's to the next one's.
    unused: where signs beyond the last pixel go. wide: room for widened sums. table: ``cpu.DIFFERENCE_TABLE``.
    """


def _emit_accumulate(builder: Builder, key: Any, *arguments: Any) -> None:
    given = Arguments(*arguments)
    builder.emit_cases(key, {each: partial(_emit_kernel, kind, builder, given) for each, kind in ACCUMULATORS.items()})


def _emit_kernel(accumulator: Accumulator, builder: Builder, given: Arguments) -> None:
    with builder.loop_blocks(given.columns, BLOCK_PIXELS) as column:
        found = _emit_sums(accumulator, builder, given, column)
        writes_sums = builder.icmp_signed("!=", given.sums, ir.Constant(I64, 0))
        with builder.if_else(writes_sums) as (write_sums, write_signs):
            with write_sums:
                place = builder.at(given.sums, column, accumulator.vectors * VECTOR_BYTES)
                vectors = [total for pixel in found for total in accumulator.as_int32(builder, pixel)]
                for index, total in enumerate(vectors):
                    builder.write(total, builder.at(place, index, VECTOR_BYTES))
            with write_signs:
                _emit_signs(accumulator, builder, given, column, found)


def _emit_sums(accumulator: Accumulator, builder: Builder, given: Arguments, column: Any) -> Sums:
    """Return a list of sums for each of BLOCK_PIXELS pixels from ``column`` on."""
    nothing = splat(accumulator.vector_type, 0)
    totals = [builder.variable(nothing) for _ in range(BLOCK_PIXELS * accumulator.parts)]
    weights = builder.variable(given.weights)
    since_widened = builder.variable(ir.Constant(I64, 0))
    wide_before = builder.variable(_zeros(builder, len(totals) * accumulator.wide_parts * 32))
    left = builder.at(given.x, column, given.x_step)
    with builder.loop(given.count) as run:
        if accumulator.wide_type:
            since = builder.add(builder.load(since_widened), given.length)
            builder.store(since, since_widened)
            with builder.if_then(builder.icmp_signed(">", since, given.widen_after)):
                for index, total in enumerate(_widened(accumulator, builder, totals, wide_before)):
                    builder.write(total, builder.at(given.wide, index, 32))
                for total in totals:
                    builder.store(nothing, total)
                builder.store(given.length, since_widened)
                builder.store(given.wide, wide_before)
        first = builder.add(left, builder.read(I64, builder.at(given.runs, run, 8)))
        pixels = [builder.at(first, given.x_step, pixel) for pixel in range(BLOCK_PIXELS)]
        with builder.loop(given.length, accumulator.step_bytes) as item:
            places, weight = [builder.add(pixel, item) for pixel in pixels], builder.load(weights)
            before = _by_pixel([builder.load(total) for total in totals])
            after = accumulator.add(builder, places, weight, given.table, before)
            for total, value in zip(totals, itertools.chain(*after), strict=True):
                builder.store(value, total)
            builder.store(builder.at(weight, accumulator.weight_bytes), weights)
    if accumulator.wide_type:
        return _by_pixel(_widened(accumulator, builder, totals, wide_before))
    return _by_pixel([builder.load(total) for total in totals])


def _emit_signs(accumulator: Accumulator, builder: Builder, given: Arguments, column: Any, sums: Sums) -> None:
    """Compare each pixel's sums with its limits and store the signs; those beyond the last column go to ``unused``."""
    for pixel, totals in enumerate(sums):
        here = builder.at(column, pixel)
        exists = builder.icmp_signed("<", here, given.columns)
        known = builder.select(exists, here, column)
        offset = builder.read(I32, builder.at(given.classes, known, 4))
        limits = builder.add(given.limits, builder.sext(offset, I64))
        target = builder.select(exists, builder.at(given.out, here, given.out_step), given.unused)
        for index, signs in enumerate(accumulator.signs(builder, totals, limits)):
            builder.write(signs, builder.at(target, index, signs.type.width // 8))


def _zeros(builder: Builder, size: int) -> Any:
    """Return the address of ``size`` zero bytes."""
    untyped: Any = cgutils
    zeros = ir.Constant(ir.ArrayType(I8, size), bytearray(size))
    return builder.ptrtoint(untyped.global_constant(builder.module, f"micronet.zeros.{size}", zeros), I64)


def _widened(accumulator: Accumulator, builder: Builder, totals: list[Any], before: Any) -> list[Any]:
    """Return narrow sums widened, plus the wide sums at the address in ``before``."""
    address = builder.load(before)
    found = [wide for total in totals for wide in accumulator.widen(builder, builder.load(total))]
    earlier = [builder.read(accumulator.wide_type, builder.at(address, index, 32)) for index in range(len(found))]
    return [builder.add(*pair) for pair in zip(found, earlier, strict=True)]


def _by_pixel(sums: list[Any]) -> Sums:
    each = len(sums) // BLOCK_PIXELS
    return [sums[pixel * each : (pixel + 1) * each] for pixel in range(BLOCK_PIXELS)]


_accumulate = make_intrinsic(types.void, [types.intp] * (1 + len(Arguments._fields)), _emit_accumulate)


@jit
def accumulate(arithmetic, vectors, widen_after, arguments):  # type: ignore[no-untyped-def]
    """Accumulate one row of pixels for one block of channels. arguments: a tuple, in the order of ``Arguments``."""
    _accumulate(_accumulator_key(arithmetic, vectors, widen_after), *arguments)
