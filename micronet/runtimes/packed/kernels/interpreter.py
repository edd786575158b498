"""A packed network's steps, compiled: a table of them runs from the images to the scores without Python between."""

from collections import namedtuple

import numpy as np

from micronet.runtimes.packed.kernels.convolution import accumulate
from micronet.runtimes.packed.kernels.cpu import (
    BITS,
    BYTEWISE,
    FLOATS,
    INTEGERS,
    LANES,
    MOST,
    MOST_BITS,
    NIBBLES,
    PIXELS,
    compiled,
)
from micronet.runtimes.packed.kernels.elementwise import (
    put_signs,
    run_align,
    run_map,
    run_mean,
    run_planes,
    run_shuffle,
)
from micronet.runtimes.packed.kernels.epilogue import (
    arrive,
    floats_to_floats,
    floats_to_integers,
    give_way,
    integers_to_floats,
    integers_to_integers,
)
from micronet.runtimes.packed.kernels.instructions import CONV, MAP, MEAN, PLANES, POOL, SHUFFLE
from micronet.runtimes.packed.kernels.pooling import run_pool
from micronet.runtimes.packed.weight_layout import block_size, even_share

_block_size, _even_share = compiled(block_size), compiled(even_share)
STRIPE = 32  # pixels whose sums are kept until they are finished
PATIENCE = 200  # turns to wait for another thread before the core is offered to it


# Addresses. spare: of values of no pixel, or of a last vector. kept: of wide sums.
Places = namedtuple("Places", "memory weights ints offsets reals table sums spare kept")


@compiled
def _address(array):  # type: ignore[no-untyped-def]
    return np.int64(array.ctypes.data)


@compiled
def execute(steps, images, memory, constants, table, thread, threads, counter):  # type: ignore[no-untyped-def]
    """Run steps on ``images`` images whose input is in ``memory`` (uint8).

    constants: (uint8, int32, int64, float32) arrays. table: ``emit.TABLE``. thread of threads: which share of each
    step's rows is done here; ``counter`` (int64, one of 0) makes the threads wait for each other.
    """
    floats = memory.view(np.float32)
    room = max(LANES * MOST_BITS, steps["at_hand"].max() + LANES)
    values, second = np.empty(room, np.float32), np.empty(room, np.float32)
    pooled = np.empty((steps["wide"] * steps["x_pixel"]).max(), np.uint8)
    sums, kept = np.empty(STRIPE * MOST_BITS * LANES, np.int32), np.empty(PIXELS * MOST_BITS * LANES, np.int32)
    weights, ints, offsets, reals = constants
    places = Places(_address(memory), _address(weights), _address(ints), _address(offsets), _address(reals),
                    _address(table), _address(sums), _address(values), _address(kept))  # fmt: skip
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
                _convolve(step, x, out, row, memory, ints, values, places)
            elif step.step == MAP:
                y = step.y_buffer * images + image * step.y_size + step.y + row * step.y_row
                run_map(step, x, y, out, memory, floats, reals, values, second)
            elif step.step == POOL:
                run_pool(step, x, out, row, memory, pooled)
            elif step.step == MEAN:
                run_mean(step, x, out, row, floats)
            elif step.step == SHUFFLE:
                run_shuffle(step, x, out, memory, floats)
            elif step.step == PLANES:
                run_planes(step, x, out, memory, floats, values)
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
    return sums.size + kept.size  # numba lets go of an array after its last use, and an address is none


@compiled
def _convolve(step, x, out, row, memory, ints, values, places):  # type: ignore[no-untyped-def]
    """Run a row of a convolution, then the signs of its sums, or their scale and what else follows."""
    here, runs = places.memory, places.offsets + 8 * step.runs
    signs = step.limits >= 0
    size = 0 if step.out_kind == BITS else 1 if step.out_kind == INTEGERS else 4
    bits = step.product == BITS
    most = MOST_BITS if bits else MOST
    limit = (2 if step.unwidened else 1) if BYTEWISE and signs and bits else 4  # bytes
    numbers = places.ints + 4 * (step.limits if signs else step.base) + ints[step.row_class + row]
    weights, skip = places.weights + step.weights, step.stride_x * step.x_pixel
    size_of_lane = step.run_count * step.length * (NIBBLES if bits else 1)
    stripe = _even_share(step.columns, STRIPE)
    block = 0
    while block < step.vectors:
        vectors = _block_size(step.vectors - block, most)
        channel = block * LANES
        whole = vectors if signs else min(vectors, (step.channels - channel) // LANES)
        first = out + (channel // 8 if step.out_kind == BITS else channel * size)
        for column in range(0, step.columns, stripe):
            columns, to = min(stripe, step.columns - column), first + column * step.out_pixel
            classes, own = places.ints + 4 * (step.column_class + column), numbers + limit * channel
            accumulate(
                step.product, vectors, here + x + column * skip, skip, columns, runs, step.run_count, step.length,
                step.unwidened, weights, 0 if signs else places.sums, classes, own, here + to, step.out_pixel,
                places.spare, places.kept, places.table,
            )  # fmt: skip
            if signs:
                continue
            if size and whole:
                _finish(step, channel, classes, own, here + to, columns, vectors, whole, places.sums, places)
            done = whole if size else 0
            if done == vectors:
                continue
            left = min(vectors * LANES, step.channels - channel) - done * LANES
            for pixel in range(columns):
                place = to + pixel * step.out_pixel + done * LANES * size
                sums = places.sums + 4 * LANES * (pixel * vectors + done)
                _finish(step, channel + done * LANES, classes + 4 * pixel, own + 4 * done * LANES, places.spare, 1,
                        vectors, vectors - done, sums, places)  # fmt: skip
                if size:
                    memory[place : place + left * size] = values.view(np.uint8)[: left * size]
                else:
                    put_signs(values, left, place, memory)
        weights += vectors * LANES * size_of_lane
        block += vectors


@compiled
def _finish(step, channel, classes, base, to, pixels, vectors, count, sums, places):  # type: ignore[no-untyped-def]
    """Turn sums into what the step's output holds, as ``finishes._finish`` does; signs begin as floats."""
    unit, bias = places.reals + 4 * (step.unit + channel), places.reals + 4 * (step.bias + channel)
    factor, zero, further = np.int32(step.factor), np.int32(step.out_zero), step.out_pixel
    least, most, scale, low, top = step.least, step.most, step.out_scale, step.low, step.top_level
    if step.out_kind == INTEGERS:
        if step.product == FLOATS:
            floats_to_integers(classes, base, to, further, pixels, vectors, count, sums, unit, bias, factor,
                               least, most, scale, low, top, zero)  # fmt: skip
        else:
            integers_to_integers(classes, base, to, further, pixels, vectors, count, sums, unit, bias, factor,
                                 least, most, scale, low, top, zero)  # fmt: skip
    elif step.product == FLOATS:
        floats_to_floats(classes, base, to, further, pixels, vectors, count, sums, unit, bias, factor,
                         least, most, scale, low, top, zero)  # fmt: skip
    else:
        integers_to_floats(classes, base, to, further, pixels, vectors, count, sums, unit, bias, factor,
                           least, most, scale, low, top, zero)  # fmt: skip
