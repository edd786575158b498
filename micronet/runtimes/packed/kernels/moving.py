"""Instructions that move pixels, look integers up in a table, or interpolate between pixels."""

import numpy as np

from micronet.runtimes.packed.kernels.activation import activate
from micronet.runtimes.packed.kernels.cpu import LANES
from micronet.runtimes.packed.kernels.elementwise import load_values, store_values
from micronet.runtimes.packed.kernels.kernel_cache import jit


@jit
def run_move(step, x, out, row, memory, offsets):  # type: ignore[no-untyped-def]
    """Run one row of a move: each pixel is ``move_bytes`` bytes, whose places are the sum of a row's and a column's."""
    first, columns, size = x + offsets[step.places + row], step.places + step.rows, step.move_bytes
    for column in range(step.columns):
        at, place = first + offsets[columns + column], out + column * step.out_pixel
        for byte in range(size):
            memory[place + byte] = memory[at + byte]


@jit
def run_table(step, x, out, memory, weights):  # type: ignore[no-untyped-def]
    """Run one row of a function of integers: a table of its 256 values."""
    table, count = weights[step.table : step.table + 256], step.columns * step.channels
    source, target = memory[x : x + count], memory[out : out + count]
    for place in range(count):
        target[place] = table[source[place]]


@jit
def run_interpolate(step, x, out, row, memory, floats, offsets, reals, values, second):  # type: ignore[no-untyped-def]
    """Run one row of a bilinear resize: between two rows first, then between two columns of the result.

    places: first rows, second rows, first columns, second columns; rows in bytes, columns in values. shares: of the
    second row and column.
    """
    channels, width, one = step.channels, step.x_columns * step.channels, np.float32(1)
    places, shares = step.places + row, reals[step.shares + row]
    for number in range(2):
        load_values(step.x_dtype, step.x_zero_point, step.x_scale, width, x + offsets[places + number * step.rows],
                    memory, floats, values if number == 0 else second)  # fmt: skip
    rest = one - shares
    for lane in range(width):
        values[lane] = values[lane] * rest + second[lane] * shares
    columns = step.places + 2 * step.rows
    for column in range(step.columns):
        share = reals[step.shares + step.rows + column]
        rest = one - share
        left, right = offsets[columns + column], offsets[columns + step.columns + column]
        for lane in range(channels):
            second[lane] = values[left + lane] * rest + values[right + lane] * share
        if step.activation:
            activate(step.activation, second.ctypes.data, (channels + LANES - 1) // LANES, step.alpha, step.beta)
        store_values(step, second, channels, out + column * step.out_pixel, memory, floats)
