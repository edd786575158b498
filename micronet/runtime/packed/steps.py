"""A packed network's steps, compiled: a table of them runs from the images to the scores without Python between."""

import numpy as np

from micronet.runtime.packed.emit import (
    BITS,
    FLOATS,
    INTEGER,
    INTEGERS,
    LANES,
    MOST,
    MOST_BITS,
    PIXELS,
    WORDS,
    compiled,
)
from micronet.runtime.packed.finishes import (
    arrive,
    floats_to_floats,
    floats_to_integers,
    give_way,
    integers_to_floats,
    integers_to_integers,
)
from micronet.runtime.packed.layout import block_size
from micronet.runtime.packed.products import accumulate
from micronet.runtime.packed.table import CONV, MAP, MEAN, POOL, SHUFFLE
from micronet.runtime.packed.values import put_signs, run_align, run_map, run_mean, run_pool, run_shuffle

_block_size = compiled(block_size)
PATIENCE = 200  # turns to wait for another thread before the core is offered to it


@compiled
def execute(steps, images, memory, constants, table, thread, threads, counter):  # type: ignore[no-untyped-def]
    """Run steps on ``images`` images whose input is in ``memory`` (uint8).

    constants: (uint8, int32, int64, float32) arrays. table: ``emit.TABLE``. thread of threads: which share of each
    step's rows is done here; ``counter`` (int64, one of 0) makes the threads wait for each other.
    """
    integers, floats = memory.view(INTEGER), memory.view(np.float32)
    sums = np.empty(PIXELS * MOST_BITS * LANES, np.int32)
    room = max(LANES * MOST_BITS, steps["channels"].max() + LANES)
    values, second = np.empty(room, np.float32), np.empty(room, np.float32)
    places = np.empty((PIXELS, 2), np.int64)
    waited = 0
    for index in range(len(steps)):
        step = steps[index]
        units = images * step.rows
        first, last = units * thread // threads, units * (thread + 1) // threads
        for unit in range(first, last):
            image, row = unit // step.rows, unit % step.rows
            x = step.x_buffer * images + image * step.x_size + step.x + row * step.stride_y * step.x_row
            out = step.out_buffer * images + image * step.out_size + step.out + row * step.out_row
            if step.step == CONV:
                _convolve(step, x, out, row, memory, constants, sums, places, values, table)
            elif step.step == MAP:
                y = step.y_buffer * images + image * step.y_size + step.y + row * step.y_row
                run_map(step, x, y, out, memory, integers, floats, constants[3], values, second)
            elif step.step == POOL:
                run_pool(step, x, out, row, memory, integers, floats)
            elif step.step == MEAN:
                run_mean(step, x, out, row, floats)
            elif step.step == SHUFFLE:
                run_shuffle(step, x, out, memory, integers, floats)
            else:
                run_align(step, x, out, memory)
        if threads > 1 and step.wait:
            waited += 1
            arrive(counter.ctypes.data, 1)
            turns = 0
            while arrive(counter.ctypes.data, 0) < waited * threads:
                turns += 1
                if turns > PATIENCE:
                    give_way()


@compiled
def _convolve(step, x, out, row, memory, constants, sums, places, values, table):  # type: ignore[no-untyped-def]
    """Run a row of a convolution, then the signs of its sums, or their scale and what else follows."""
    _, ints, longs, _ = constants
    runs = longs[step.runs : step.runs + step.run_count]
    column_class = ints[step.column_class : step.column_class + step.columns]
    row_class = ints[step.row_class + row] * step.column_classes
    lanes, signs = step.vectors * LANES, step.limits >= 0
    size = 0 if step.out_kind == BITS else WORDS if step.out_kind == INTEGERS else 4
    pixels, skip = memory.ctypes.data + x, step.stride_x * step.x_pixel
    most = MOST_BITS if step.product == BITS else MOST
    following, spare = constants[0].ctypes.data + step.weights, values.ctypes.data
    block = 0
    while block < step.vectors:
        vectors = _block_size(step.vectors - block, most)
        weights, channel = following, block * LANES
        numbers = constants[1].ctypes.data + 4 * ((step.limits if signs else step.base) + channel)
        to = memory.ctypes.data + out + (channel // 8 if step.out_kind == BITS else channel * size)
        whole = vectors if signs else min(vectors, (step.channels - channel) // LANES)
        for start in range(0, step.columns, PIXELS):
            column = max(0, min(start, step.columns - PIXELS))
            inside = min(PIXELS, step.columns - column)
            for pixel in range(inside):
                places[pixel, 0] = numbers + 4 * (row_class + column_class[column + pixel]) * lanes
                places[pixel, 1] = to + (column + pixel) * step.out_pixel
            for pixel in range(inside, PIXELS):
                places[pixel, 0], places[pixel, 1] = numbers, spare
            following = accumulate(
                step.product, vectors, pixels + column * skip, skip, runs, step.length, weights,
                0 if signs else sums.ctypes.data, places, table,
            )  # fmt: skip
            if signs:
                continue
            if size and whole:
                _finish(step, channel, inside, vectors, whole, sums.ctypes.data, places, constants)
            if not size or whole < vectors:
                done = whole if size else 0
                left = min(vectors * LANES, step.channels - channel) - done * LANES
                for pixel in range(inside):
                    place = places[pixel, 1] - memory.ctypes.data + done * LANES * size
                    places[0, 0], places[0, 1] = places[pixel, 0] + 4 * done * LANES, spare
                    own = sums.ctypes.data + 4 * LANES * (pixel * vectors + done)
                    _finish(step, channel + done * LANES, 1, vectors, vectors - done, own, places, constants)
                    if size:
                        memory[place : place + left * size] = values.view(np.uint8)[: left * size]
                    else:
                        put_signs(values, left, place, memory)
        block += vectors


@compiled
def _finish(step, channel, pixels, vectors, count, sums, places, constants):  # type: ignore[no-untyped-def]
    """Turn sums into what the step's output holds, as ``finishes._finish`` does; signs begin as floats."""
    unit, bias = (
        constants[3].ctypes.data + 4 * (step.unit + channel),
        constants[3].ctypes.data + 4 * (step.bias + channel),
    )
    factor, zero, at = np.int32(step.factor), np.int32(step.out_zero), places.ctypes.data
    if step.out_kind == INTEGERS:
        if step.product == FLOATS:
            floats_to_integers(at, pixels, vectors, count, sums, unit, bias, factor, step.least, step.most,
                               step.out_scale, step.low, step.top_level, zero)  # fmt: skip
        else:
            integers_to_integers(at, pixels, vectors, count, sums, unit, bias, factor, step.least, step.most,
                                 step.out_scale, step.low, step.top_level, zero)  # fmt: skip
    elif step.product == FLOATS:
        floats_to_floats(at, pixels, vectors, count, sums, unit, bias, factor, step.least, step.most, step.out_scale,
                         step.low, step.top_level, zero)  # fmt: skip
    else:
        integers_to_floats(at, pixels, vectors, count, sums, unit, bias, factor, step.least, step.most, step.out_scale,
                           step.low, step.top_level, zero)  # fmt: skip
