"""The steps that are no convolution or maximum pool: value by value, means, shuffles."""

import numpy as np

from micronet.runtimes.packed.kernels.cpu import BITS, DEPOSITS, FLOATS, INTEGERS, LANES, compiled
from micronet.runtimes.packed.kernels.epilogue import deposit, put_word, signs_of
from micronet.runtimes.packed.kernels.instructions import ADD, MULTIPLY, SCALE

ROUND = np.float32(12582912)  # 1.5 * 2^23: added and taken away again, it leaves a float32 rounded half to even


@compiled
def put_signs(values, count, place, memory):  # type: ignore[no-untyped-def]
    """Store ``count`` values' signs as bits; ``values`` goes on to a whole vector."""
    for first in range(0, count, LANES):
        bits = signs_of(values.ctypes.data + 4 * first)
        left = count - first
        if left < LANES:
            bits &= (1 << left) - 1
        memory[place + first // 8] = bits & 255
        if left > 8:
            memory[place + first // 8 + 1] = bits >> 8


@compiled
def run_planes(step, x, out, memory, floats, values):  # type: ignore[no-untyped-def]
    """Run a row of an image: (channels, rows, columns) -> (rows, columns, channels)."""
    channels, columns = step.channels, step.columns
    for channel in range(channels):
        plane = (x + channel * step.rows * step.x_row) // 4
        for column in range(columns):
            values[column * channels + channel] = floats[plane + column]
    together = 1 if step.out_kind == BITS and channels % 32 else columns
    for column in range(0, columns, together):
        _put(step, values[column * channels :], together * channels, out + column * step.out_pixel, memory,
             floats)  # fmt: skip


@compiled
def _put(step, values, count, place, memory, floats):  # type: ignore[no-untyped-def]
    """Store a pixel's ``count`` values as what the step's output holds."""
    least, most = step.least, step.most
    if step.out_kind == FLOATS:
        real = floats[place // 4 : place // 4 + count]
        for lane in range(count):
            real[lane] = min(max(values[lane], least), most)
    elif step.out_kind == INTEGERS:
        scale, low, top_level, zero = step.out_scale, step.low, step.top_level, np.int32(step.out_zero)
        whole = memory[place : place + count]
        for lane in range(count):
            scaled = min(max(values[lane], least), most) / scale
            whole[lane] = np.int32((min(max(scaled, low), top_level) + ROUND) - ROUND) + zero
    else:
        for lane in range(count):
            values[lane] = min(max(values[lane], least), most)
        put_signs(values, count, place, memory)


@compiled
def run_map(step, x, y, out, memory, floats, reals, values, second):  # type: ignore[no-untyped-def]
    """Run a row of what is done value by value."""
    channels = step.channels
    for column in range(step.columns):
        _take(step.x_kind, step.x_zero, step.x_scale, channels, x + column * step.x_pixel, memory, floats,
              values)  # fmt: skip
        if step.operation == ADD or step.operation == MULTIPLY:
            _take(step.y_kind, step.y_zero, step.y_scale, channels, y + column * step.y_pixel, memory, floats,
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
        _put(step, values, channels, out + column * step.out_pixel, memory, floats)


@compiled
def _take(kind, zero, scale, count, place, memory, floats, values):  # type: ignore[no-untyped-def]
    """Read a pixel's values."""
    if kind == FLOATS:
        values[:count] = floats[place // 4 : place // 4 + count]
    elif kind == INTEGERS:
        whole, middle = memory[place : place + count], np.int32(zero)
        for lane in range(count):
            values[lane] = np.float32(np.int32(whole[lane]) - middle) * scale
    else:
        for lane in range(count):
            values[lane] = np.float32(1) if memory[place + (lane >> 3)] >> (lane & 7) & 1 else np.float32(-1)


@compiled
def run_mean(step, x, out, row, floats):  # type: ignore[no-untyped-def]
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


@compiled
def run_shuffle(step, x, out, memory, floats):  # type: ignore[no-untyped-def]
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
                    memory[place + target] = memory[at + source]
                else:
                    floats[place // 4 + target] = floats[at // 4 + source]
                source += 1
                target += groups


@compiled
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


@compiled
def run_align(step, x, out, memory):  # type: ignore[no-untyped-def]
    """Run a row of bits so that each group's begin a word: (groups of whole bytes) -> (groups of whole words)."""
    own = step.channels // step.groups // 8
    room = (own + 3) // 4 * 4
    for column in range(step.columns):
        at, place = x + column * step.x_pixel, out + column * step.out_pixel
        for group in range(step.groups):
            for byte in range(own):
                memory[place + group * room + byte] = memory[at + group * own + byte]
