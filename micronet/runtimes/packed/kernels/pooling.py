"""Max pools (of signs: the OR of their bits) and average pools."""

from functools import partial
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from micronet.runtimes.packed.kernels.cpu import BITS, FLOAT32, UINT8
from micronet.runtimes.packed.kernels.kernel_cache import jit
from micronet.runtimes.packed.kernels.llvm import F32, I8, I32, I64, load, make_intrinsic, store

VECTOR_BYTES = 32
ITEMS = {BITS: (I32, 4), UINT8: (I8, 1), FLOAT32: (F32, 4)}  # element type -> LLVM type of an item, its bytes


def _kernel(dtype: int, lanes: int) -> Any:
    """Return the intrinsic that takes the maximum of ``count`` places: (out, first place, size, step, count).

    Places are ``size`` bytes each, at least those of ``lanes`` items, and ``step`` bytes apart.
    """
    return make_intrinsic(types.void, [types.intp] * 5, partial(_emit_maximum, dtype, lanes))


def _emit_maximum(dtype: int, lanes: int, builder: Any, out: Any, start: Any, size: Any, step: Any, count: Any) -> None:
    number, zero = partial(ir.Constant, I64), ir.Constant(I64, 0)
    item, width = ITEMS[dtype]
    vector = ir.VectorType(item, lanes)
    last = builder.sub(size, number(width * lanes))
    entry = builder.block
    next_vector, next_place, end_vector, end = map(builder.append_basic_block, ("across", "over", "turn", "after"))
    builder.branch(next_vector)
    builder.position_at_end(next_vector)
    offset = builder.phi(I64)
    first = load(builder, vector, builder.add(start, offset))
    builder.branch(next_place)
    builder.position_at_end(next_place)
    place, before = builder.phi(I64), builder.phi(vector)
    value = load(builder, vector, builder.add(builder.add(start, offset), builder.mul(place, step)))
    maximum = _maximum(builder, dtype, value, before)
    place_after = builder.add(place, number(1))
    builder.cbranch(builder.icmp_signed("<", place_after, count), next_place, end_vector)
    builder.position_at_end(end_vector)
    store(builder, maximum, builder.add(out, offset))
    further = builder.add(offset, number(width * lanes))
    offset_after = builder.select(builder.icmp_signed("<", further, last), further, last)
    builder.cbranch(builder.icmp_signed("<", offset, last), next_vector, end)
    for phi, initial, after, blocks in (
        (offset, zero, offset_after, (entry, end_vector)),
        (place, zero, place_after, (next_vector, next_place)),
        (before, first, maximum, (next_vector, next_place)),
    ):
        phi.add_incoming(initial, blocks[0])
        phi.add_incoming(after, blocks[1])
    builder.position_at_end(end)


def _maximum(builder: Any, dtype: int, value: Any, before: Any) -> Any:
    if dtype == BITS:
        return builder.or_(before, value)
    larger = (builder.icmp_unsigned if dtype == UINT8 else builder.fcmp_ordered)(">", value, before)
    if dtype == FLOAT32:  # NaN wins, as in numpy
        larger = builder.or_(larger, builder.fcmp_unordered("uno", value, value))
    return builder.select(larger, value, before)


_bits8, _uint32, _floats8 = (_kernel(dtype, VECTOR_BYTES // ITEMS[dtype][1]) for dtype in (BITS, UINT8, FLOAT32))
_bits1, _uint1, _floats1 = (_kernel(dtype, 1) for dtype in (BITS, UINT8, FLOAT32))


@jit
def _take_maximum(dtype, out, start, size, step, count):  # type: ignore[no-untyped-def]
    """Take the maximum of places by element type; see ``_kernel``."""
    arguments = (out, start, size, step, count)
    if dtype == BITS:
        if size < VECTOR_BYTES:
            _bits1(*arguments)
        else:
            _bits8(*arguments)
    elif dtype == UINT8:
        if size < VECTOR_BYTES:
            _uint1(*arguments)
        else:
            _uint32(*arguments)
    elif size < VECTOR_BYTES:
        _floats1(*arguments)
    else:
        _floats8(*arguments)


@jit
def run_max_pool(step, x, out, row, memory, scratch):  # type: ignore[no-untyped-def]
    """Run one row of a max pool; padding never wins. scratch: room for a row of the input (bytes).

    The rows of all windows are reduced first, then each window's columns.
    """
    start, reduced, pixel = np.int64(memory.ctypes.data), np.int64(scratch.ctypes.data), step.x_pixel
    top = row * step.stride_y - step.pad_top
    first, end = max(0, -top), min(step.kernel_y, step.x_rows - top)
    _take_maximum(step.x_dtype, reduced, start + x + (first - step.pad_top) * step.x_row, step.x_columns * pixel,
                  step.x_row, end - first)  # fmt: skip
    for column in range(step.columns):
        left = column * step.stride_x - step.pad_left
        first, end = max(0, left), min(left + step.kernel_x, step.x_columns)
        _take_maximum(step.x_dtype, start + out + column * step.out_pixel, reduced + first * pixel, pixel, pixel,
                      end - first)  # fmt: skip


@jit
def run_average_pool(step, x, out, row, floats):  # type: ignore[no-untyped-def]
    """Run one row of an average pool of floats."""
    top, channels = row * step.stride_y - step.pad_top, step.channels
    for column in range(step.columns):
        left, place, count = column * step.stride_x - step.pad_left, (out + column * step.out_pixel) // 4, 0
        total = floats[place : place + channels]
        total[:] = 0
        for i in range(max(0, -top), min(step.kernel_y, step.x_rows - top)):
            for j in range(max(0, -left), min(step.kernel_x, step.x_columns - left)):
                at = (x + (i - step.pad_top) * step.x_row + (left + j) * step.x_pixel) // 4
                count += 1
                total += floats[at : at + channels]
        total /= np.float32(step.kernel_y * step.kernel_x if step.count_pads else count)
