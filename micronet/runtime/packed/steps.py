"""A packed network's steps, compiled: a table of them runs from the images to the scores without Python between.

Maps lie in one block of memory, image by image, row by row, pixel by pixel, channels side by side: signs as bits in
words of 32, whole numbers as ``INTEGER`` or float32, with room around them for the padding of the convolutions that
read them. ``plan`` makes the tables.
"""

import numpy as np
from numba import njit

from micronet.runtime.packed.products import (
    BITS,
    COMPILED,
    DEPOSITS,
    FLOATS,
    INTEGER,
    INTEGERS,
    LANES,
    MOST,
    MOST_BITS,
    PIXELS,
    WORDS,
    accumulate,
    arrive,
    deposit,
    floats_to_floats,
    floats_to_integers,
    integers_to_floats,
    integers_to_integers,
    put_word,
    signs_of,
)

CONV, MAP, POOL, MEAN, SHUFFLE, ALIGN = range(6)  # kinds of step
COPY, ADD, MULTIPLY, SCALE = range(4)  # what a MAP step does
ROUND = np.float32(12582912)  # 1.5 * 2^23: added and taken away again, it leaves a float32 rounded half to even
SIDES = ("x", "y", "out")  # the maps that a step reads and writes

_MAPS = [
    (f"{side}{part}", np.int64) for side in SIDES for part in ("", "_buffer", "_size", "_row", "_pixel", "_kind")
]  # fmt: skip
STEP = np.dtype(
    [
        ("step", np.int64), ("operation", np.int64), ("wait", np.int64), *_MAPS,
        # the output's, and for pools and shuffles the input's
        ("rows", np.int64), ("columns", np.int64), ("channels", np.int64), ("high", np.int64), ("wide", np.int64),
        ("stride_y", np.int64), ("stride_x", np.int64), ("kernel_y", np.int64), ("kernel_x", np.int64),
        ("top", np.int64), ("left", np.int64), ("groups", np.int64), ("count_pads", np.int64),
        # a convolution's, places in the constants
        ("product", np.int64), ("vectors", np.int64), ("length", np.int64),
        ("runs", np.int64), ("run_count", np.int64), ("weights", np.int64), ("limits", np.int64), ("base", np.int64),
        ("row_class", np.int64), ("column_class", np.int64), ("column_classes", np.int64), ("factor", np.int64),
        ("unit", np.int64), ("bias", np.int64),
        # whole numbers: zero is where 0 lies; low and high, the ends of what a value may be before it is stored
        ("x_zero", np.int64), ("y_zero", np.int64), ("out_zero", np.int64),
        ("x_scale", np.float32), ("y_scale", np.float32), ("out_scale", np.float32),
        ("least", np.float32), ("most", np.float32), ("low", np.float32), ("top_level", np.float32),
    ],
    align=True,
)  # fmt: skip


@njit(**COMPILED)  # type: ignore[untyped-decorator, unused-ignore]
def execute(steps, images, memory, constants, table, thread, threads, counter):  # type: ignore[no-untyped-def]
    """Run steps on ``images`` images whose input is in ``memory`` (uint8).

    constants: (uint8, int32, int64, float32) arrays. table: ``products.TABLE``. thread of threads: which share of each
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
                _map(step, x, y, out, memory, integers, floats, constants[3], values, second)
            elif step.step == POOL:
                _pool(step, x, out, row, memory, integers, floats)
            elif step.step == MEAN:
                _mean(step, x, out, row, floats)
            elif step.step == SHUFFLE:
                _shuffle(step, x, out, memory, integers, floats)
            else:
                _align(step, x, out, memory)
        if threads > 1 and step.wait:
            waited += 1
            arrive(counter.ctypes.data, 1)
            while arrive(counter.ctypes.data, 0) < waited * threads:
                pass


@njit(**COMPILED)  # type: ignore[untyped-decorator, unused-ignore]
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
        vectors = min(most, step.vectors - block)
        if vectors == 3:
            vectors = 2
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
                        _put_signs(values, left, place, memory)
        block += vectors


@njit(**COMPILED)  # type: ignore[untyped-decorator, unused-ignore]
def _finish(step, channel, pixels, vectors, count, sums, places, constants):  # type: ignore[no-untyped-def]
    """Turn sums into what the step's output holds, as ``products._finish`` does; signs begin as floats."""
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


@njit(**COMPILED)  # type: ignore[untyped-decorator, unused-ignore]
def _put_signs(values, count, place, memory):  # type: ignore[no-untyped-def]
    """Store ``count`` values' signs as bits; ``values`` goes on to a whole vector."""
    for first in range(0, count, LANES):
        bits = signs_of(values.ctypes.data + 4 * first)
        left = count - first
        if left < LANES:
            bits &= (1 << left) - 1
        memory[place + first // 8] = bits & 255
        if left > 8:
            memory[place + first // 8 + 1] = bits >> 8


@njit(**COMPILED)  # type: ignore[untyped-decorator, unused-ignore]
def _put(step, values, count, place, memory, integers, floats):  # type: ignore[no-untyped-def]
    """Store a pixel's ``count`` values as what the step's output holds."""
    least, most = step.least, step.most
    if step.out_kind == FLOATS:
        real = floats[place // 4 : place // 4 + count]
        for lane in range(count):
            real[lane] = min(max(values[lane], least), most)
    elif step.out_kind == INTEGERS:
        scale, low, top_level, zero = step.out_scale, step.low, step.top_level, np.int32(step.out_zero)
        whole = integers[place // WORDS : place // WORDS + count]
        for lane in range(count):
            scaled = min(max(values[lane], least), most) / scale
            whole[lane] = np.int32((min(max(scaled, low), top_level) + ROUND) - ROUND) + zero
    else:
        for lane in range(count):
            values[lane] = min(max(values[lane], least), most)
        _put_signs(values, count, place, memory)


@njit(**COMPILED)  # type: ignore[untyped-decorator, unused-ignore]
def _map(step, x, y, out, memory, integers, floats, reals, values, second):  # type: ignore[no-untyped-def]
    """Run a row of what is done value by value."""
    channels = step.channels
    for column in range(step.columns):
        _take(step.x_kind, step.x_zero, step.x_scale, channels, x + column * step.x_pixel, memory, integers, floats,
              values)  # fmt: skip
        if step.operation == ADD or step.operation == MULTIPLY:
            _take(step.y_kind, step.y_zero, step.y_scale, channels, y + column * step.y_pixel, memory, integers, floats,
                  second)  # fmt: skip
            if step.operation == ADD:
                for lane in range(channels):
                    values[lane] += second[lane]
            else:
                for lane in range(channels):
                    values[lane] *= second[lane]
        elif step.operation == SCALE:
            unit, bias = reals[step.unit : step.unit + channels], reals[step.bias : step.bias + channels]
            for lane in range(channels):
                values[lane] = values[lane] * unit[lane] + bias[lane]
        _put(step, values, channels, out + column * step.out_pixel, memory, integers, floats)


@njit(**COMPILED)  # type: ignore[untyped-decorator, unused-ignore]
def _take(kind, zero, scale, count, place, memory, integers, floats, values):  # type: ignore[no-untyped-def]
    """Read a pixel's values."""
    if kind == FLOATS:
        values[:count] = floats[place // 4 : place // 4 + count]
    elif kind == INTEGERS:
        whole, middle = integers[place // WORDS : place // WORDS + count], np.int32(zero)
        for lane in range(count):
            values[lane] = np.float32(np.int32(whole[lane]) - middle) * scale
    else:
        for lane in range(count):
            values[lane] = np.float32(1) if memory[place + (lane >> 3)] >> (lane & 7) & 1 else np.float32(-1)


@njit(**COMPILED)  # type: ignore[untyped-decorator, unused-ignore]
def _pool(step, x, out, row, memory, integers, floats):  # type: ignore[no-untyped-def]
    """Run a row of a maximum pool; of signs it is the or of bits. What lies outside the map counts nothing."""
    for column in range(step.columns):
        place = out + column * step.out_pixel
        if step.x_kind == BITS:
            _most_bits(step, x, place, row, column, memory)
        elif step.x_kind == INTEGERS:
            _most(step, x, place, row, column, integers, WORDS)
        else:
            _most(step, x, place, row, column, floats, 4)


@njit(**COMPILED)  # type: ignore[untyped-decorator, unused-ignore]
def _most(step, x, place, row, column, held, size):  # type: ignore[no-untyped-def]
    """Put the maximum of a window in its place."""
    top, left, count = row * step.stride_y - step.top, column * step.stride_x - step.left, step.channels
    found, fresh = held[place // size : place // size + count], True
    for i in range(max(0, -top), min(step.kernel_y, step.high - top)):
        for j in range(max(0, -left), min(step.kernel_x, step.wide - left)):
            at = (x + (i - step.top) * step.x_row + (left + j) * step.x_pixel) // size
            seen = held[at : at + count]
            if fresh:
                found[:] = seen
            else:
                for c in range(count):
                    found[c] = max(found[c], seen[c])
            fresh = False


@njit(**COMPILED)  # type: ignore[untyped-decorator, unused-ignore]
def _most_bits(step, x, place, row, column, memory):  # type: ignore[no-untyped-def]
    """Put the or of a window in its place."""
    top, left, count = row * step.stride_y - step.top, column * step.stride_x - step.left, step.out_pixel
    found = memory[place : place + count]
    found[:] = 0
    for i in range(max(0, -top), min(step.kernel_y, step.high - top)):
        for j in range(max(0, -left), min(step.kernel_x, step.wide - left)):
            at = x + (i - step.top) * step.x_row + (left + j) * step.x_pixel
            seen = memory[at : at + count]
            for c in range(count):
                found[c] |= seen[c]


@njit(**COMPILED)  # type: ignore[untyped-decorator, unused-ignore]
def _mean(step, x, out, row, floats):  # type: ignore[no-untyped-def]
    """Run a row of an average pool of floats."""
    top, count = row * step.stride_y - step.top, step.channels
    for column in range(step.columns):
        left, place, seen = column * step.stride_x - step.left, (out + column * step.out_pixel) // 4, 0
        total = floats[place : place + count]
        total[:] = 0
        for i in range(max(0, -top), min(step.kernel_y, step.high - top)):
            for j in range(max(0, -left), min(step.kernel_x, step.wide - left)):
                at = (x + (i - step.top) * step.x_row + (left + j) * step.x_pixel) // 4
                seen += 1
                total += floats[at : at + count]
        total /= np.float32(step.kernel_y * step.kernel_x if step.count_pads else seen)


@njit(**COMPILED)  # type: ignore[untyped-decorator, unused-ignore]
def _shuffle(step, x, out, memory, integers, floats):  # type: ignore[no-untyped-def]
    """Run a row of a channel shuffle: (groups, each) -> (each, groups)."""
    groups, each = step.groups, step.channels // step.groups
    for column in range(step.columns):
        at, place = x + column * step.x_pixel, out + column * step.out_pixel
        if step.x_kind == BITS and DEPOSITS and 64 % groups == 0 and step.channels % 64 == 0:
            _deposit_bits(step, memory.ctypes.data + at, memory.ctypes.data + place)
            continue
        if step.x_kind == BITS:
            memory[place : place + step.out_pixel] = 0
        for group in range(groups):
            source, target = group * each, group
            for _ in range(each):
                if step.x_kind == BITS:
                    bit = memory[at + (source >> 3)] >> (source & 7) & 1
                    memory[place + (target >> 3)] |= bit << (target & 7)
                elif step.x_kind == INTEGERS:
                    integers[place // WORDS + target] = integers[at // WORDS + source]
                else:
                    floats[place // 4 + target] = floats[at // 4 + source]
                source += 1
                target += groups


@njit(**COMPILED)  # type: ignore[untyped-decorator, unused-ignore]
def _deposit_bits(step, x, out):  # type: ignore[no-untyped-def]
    """Shuffle a pixel's bits, 64 at a time: so many of each group in turn."""
    each, share = step.channels // step.groups, 64 // step.groups
    mask = 0
    for place in range(0, 64, step.groups):
        mask |= 1 << place
    for word in range(step.channels // 64):
        found = 0
        for group in range(step.groups):
            first = group * each + word * share
            found |= deposit(x + (first >> 3), first & 7, mask << group)
        put_word(found, out + 8 * word)


@njit(**COMPILED)  # type: ignore[untyped-decorator, unused-ignore]
def _align(step, x, out, memory):  # type: ignore[no-untyped-def]
    """Run a row of bits so that each group's begin a word: (groups of whole bytes) -> (groups of whole words)."""
    own = step.channels // step.groups // 8
    room = (own + 3) // 4 * 4
    for column in range(step.columns):
        at, place = x + column * step.x_pixel, out + column * step.out_pixel
        for group in range(step.groups):
            for byte in range(own):
                memory[place + group * room + byte] = memory[at + group * own + byte]
