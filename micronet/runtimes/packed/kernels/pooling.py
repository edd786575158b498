"""Max pools (of signs: the OR of their bits) and average pools."""

from functools import partial
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from micronet.runtimes.packed.kernels.cpu import BITS, FLOAT32, UINT8
from micronet.runtimes.packed.kernels.kernel_cache import jit
from micronet.runtimes.packed.kernels.llvm import F32, I8, I32, I64, Builder, make_intrinsic

BLOCK_BYTES = 32
ITEMS = {BITS: (I32, 4), UINT8: (I8, 1), FLOAT32: (F32, 4)}  # element type -> LLVM type of an item, its bytes


def _emit_take_maximum(builder: Builder, dtype: Any, size: Any, *arguments: Any) -> None:
    """Emit a loop for each element type, over blocks of bytes, or for places that are smaller over single items."""
    in_blocks = builder.zext(builder.icmp_signed(">=", size, ir.Constant(I64, BLOCK_BYTES)), I64)
    cases = {}
    for case, (_, width) in ITEMS.items():
        cases[case] = partial(_emit_maximum, builder, case, width, size, *arguments)
        cases[case + 4] = partial(_emit_maximum, builder, case, BLOCK_BYTES, size, *arguments)
    builder.emit_cases(builder.at(dtype, in_blocks, 4), cases)


def _emit_maximum(
    builder: Builder, dtype: int, block: int, size: Any, out: Any, start: Any, step: Any, count: Any
) -> None:
    item, width = ITEMS[dtype]
    vector = ir.VectorType(item, block // width)
    with builder.loop_blocks(size, block) as offset:
        first = builder.add(start, offset)
        maximum = builder.variable(builder.read(vector, first))
        with builder.loop(count) as place:
            value = builder.read(vector, builder.at(first, place, step))
            builder.store(_maximum(builder, dtype, value, builder.load(maximum)), maximum)
        builder.write(builder.load(maximum), builder.add(out, offset))


def _maximum(builder: Builder, dtype: int, value: Any, before: Any) -> Any:
    if dtype == BITS:
        return builder.or_(before, value)
    larger = (builder.icmp_unsigned if dtype == UINT8 else builder.fcmp_ordered)(">", value, before)
    if dtype == FLOAT32:  # NaN wins, as in numpy
        larger = builder.or_(larger, builder.fcmp_unordered("uno", value, value))
    return builder.select(larger, value, before)


# (element type, size, out, first place, step, count): addresses, byte counts and the number of places
_take_maximum = make_intrinsic(types.void, [types.intp] * 6, _emit_take_maximum)


@jit
def run_max_pool(step, x, out, row, memory, scratch):  # type: ignore[no-untyped-def]
    """Run one row of a max pool; padding never wins. scratch: room for a row of the input (bytes).

    The rows of all windows are reduced first, then each window's columns.
    """
    start, reduced, pixel = np.int64(memory.ctypes.data), np.int64(scratch.ctypes.data), step.x_pixel
    top = row * step.stride_y - step.pad_top
    first, end = max(0, -top), min(step.kernel_y, step.x_rows - top)
    source = start + x + (first - step.pad_top) * step.x_row
    _take_maximum(step.x_dtype, step.x_columns * pixel, reduced, source, step.x_row, end - first)
    for column in range(step.columns):
        left = column * step.stride_x - step.pad_left
        first, end = max(0, left), min(left + step.kernel_x, step.x_columns)
        target = start + out + column * step.out_pixel
        _take_maximum(step.x_dtype, pixel, target, reduced + first * pixel, pixel, end - first)


@jit
def run_average_pool(step, x, out, row, memory, floats):  # type: ignore[no-untyped-def]
    """Run one row of an average pool of floats, or of integers, whose sums are exact and scaled after the division."""
    top, channels = row * step.stride_y - step.pad_top, step.channels
    zero_point = np.float32(step.x_zero_point)
    for column in range(step.columns):
        left, place = column * step.stride_x - step.pad_left, (out + column * step.out_pixel) // 4
        rows = min(step.kernel_y, step.x_rows - top) - max(0, -top)
        columns = min(step.kernel_x, step.x_columns - left) - max(0, -left)
        total, count = floats[place : place + channels], rows * columns
        total[:] = 0
        for i in range(max(0, -top), min(step.kernel_y, step.x_rows - top)):
            for j in range(max(0, -left), min(step.kernel_x, step.x_columns - left)):
                at = x + (i - step.pad_top) * step.x_row + (left + j) * step.x_pixel
                if step.x_dtype == UINT8:
                    integers = memory[at : at + channels]
                    for lane in range(channels):
                        total[lane] += np.float32(integers[lane]) - zero_point
                else:
                    total += floats[at // 4 : at // 4 + channels]
        if step.count_pads:
            rows, columns = (min(step.kernel_y, step.x_rows + step.pad_bottom - top),
                             min(step.kernel_x, step.x_columns + step.pad_right - left))  # fmt: skip
            count = rows * columns
        divisor, scale = np.float32(count), step.x_scale
        if step.x_dtype == UINT8:
            for lane in range(channels):
                total[lane] = total[lane] / divisor * scale
        else:
            total /= divisor
