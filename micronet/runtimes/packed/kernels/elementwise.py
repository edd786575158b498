"""Instructions on single pixels: elementwise arithmetic with clipping and quantization, and moving values.

Values are moved from NCHW to NHWC, by channel shuffles, and to align channel groups.
"""

import numpy as np

from micronet.runtimes.packed.kernels.activation import activate
from micronet.runtimes.packed.kernels.cpu import BITS, FLOAT32, HAS_PDEP, LANES, UINT8
from micronet.runtimes.packed.kernels.instructions import ADD, MULTIPLY, SCALE
from micronet.runtimes.packed.kernels.kernel_cache import jit
from micronet.runtimes.packed.kernels.llvm import deposit_bits, sign_bits, store_word

ROUND = np.float32(12582912)  # 1.5 * 2^23: adding and subtracting it rounds a float32 half to even


@jit
def store_signs(values, count, place, memory):  # type: ignore[no-untyped-def]
    """Store the signs of ``count`` floats as bits at ``memory[place]``; ``values`` has room for a whole vector more."""
    for first in range(0, count, LANES):
        bits = sign_bits(values.ctypes.data + 4 * first)
        left = count - first
        if left < LANES:
            bits &= (1 << left) - 1
        memory[place + first // 8] = bits & 255
        if left > 8:
            memory[place + first // 8 + 1] = bits >> 8


@jit
def store_values(step, values, count, place, memory, floats):  # type: ignore[no-untyped-def]
    """Clip ``count`` floats and store them as the instruction's output type at byte ``place``."""
    low, high = step.clip_low, step.clip_high
    if step.out_dtype == FLOAT32:
        real = floats[place // 4 : place // 4 + count]
        for lane in range(count):
            real[lane] = min(max(values[lane], low), high)
    elif step.out_dtype == UINT8:
        scale, level_low, level_high = step.out_scale, step.level_low, step.level_high
        zero_point, integers = np.int32(step.out_zero_point), memory[place : place + count]
        for lane in range(count):
            level = min(max(values[lane], low), high) / scale
            integers[lane] = np.int32((min(max(level, level_low), level_high) + ROUND) - ROUND) + zero_point
    else:
        for lane in range(count):
            values[lane] = min(max(values[lane], low), high)
        store_signs(values, count, place, memory)


@jit
def run_elementwise(step, x, y, out, memory, floats, reals, values, second):  # type: ignore[no-untyped-def]
    """Run one row of an elementwise instruction. reals: float32 constants; values, second: scratch."""
    channels = step.channels
    for column in range(step.columns):
        load_values(step.x_dtype, step.x_zero_point, step.x_scale, channels, x + column * step.x_pixel, memory, floats,
                     values)  # fmt: skip
        if step.function == ADD or step.function == MULTIPLY:
            load_values(step.y_dtype, step.y_zero_point, step.y_scale, channels, y + column * step.y_pixel, memory,
                         floats, second)  # fmt: skip
            if step.function == ADD:
                for lane in range(channels):
                    values[lane] += second[lane]
            else:
                for lane in range(channels):
                    values[lane] *= second[lane]
        elif step.function == SCALE:
            scale, bias = reals[step.scale : step.scale + channels], reals[step.bias : step.bias + channels]
            for lane in range(channels):
                values[lane] = values[lane] * scale[lane] + bias[lane]
        if step.activation:
            activate(step.activation, values.ctypes.data, (channels + LANES - 1) // LANES, step.alpha, step.beta)
        store_values(step, values, channels, out + column * step.out_pixel, memory, floats)


@jit
def load_values(dtype, zero_point, scale, count, place, memory, floats, values):  # type: ignore[no-untyped-def]
    """Load ``count`` values from byte ``place`` as floats."""
    if dtype == FLOAT32:
        values[:count] = floats[place // 4 : place // 4 + count]
    elif dtype == UINT8:
        integers, zero = memory[place : place + count], np.int32(zero_point)
        for lane in range(count):
            values[lane] = np.float32(np.int32(integers[lane]) - zero) * scale
    else:
        for lane in range(count):
            values[lane] = np.float32(1) if memory[place + (lane >> 3)] >> (lane & 7) & 1 else np.float32(-1)


@jit
def run_to_nhwc(step, x, out, memory, floats, values):  # type: ignore[no-untyped-def]
    """Run one row of the images: (channels, rows, columns) -> (rows, columns, channels)."""
    channels, columns = step.channels, step.columns
    for channel in range(channels):
        plane = (x + channel * step.rows * step.x_row) // 4
        for column in range(columns):
            values[column * channels + channel] = floats[plane + column]
    pixels = 1 if step.out_dtype == BITS and channels % 32 else columns  # stored at once
    for column in range(0, columns, pixels):
        store_values(step, values[column * channels :], pixels * channels, out + column * step.out_pixel, memory,
                     floats)  # fmt: skip


@jit
def run_shuffle(step, x, out, memory, floats):  # type: ignore[no-untyped-def]
    """Run one row of a channel shuffle: (groups, channels per group) -> (channels per group, groups)."""
    groups, each = step.groups, step.channels // step.groups
    for column in range(step.columns):
        at, place = x + column * step.x_pixel, out + column * step.out_pixel
        if step.x_dtype == BITS and HAS_PDEP and 64 % groups == 0 and step.channels % 64 == 0:
            _shuffle_words(step, memory.ctypes.data + at, memory.ctypes.data + place)
            continue
        if step.x_dtype == BITS:
            memory[place : place + step.out_pixel] = 0
        for group in range(groups):
            source, target = group * each, group
            for _ in range(each):
                if step.x_dtype == BITS:
                    bit = memory[at + (source >> 3)] >> (source & 7) & 1
                    memory[place + (target >> 3)] |= bit << (target & 7)
                elif step.x_dtype == UINT8:
                    memory[place + target] = memory[at + source]
                else:
                    floats[place // 4 + target] = floats[at // 4 + source]
                source += 1
                target += groups


@jit
def _shuffle_words(step, x, out):  # type: ignore[no-untyped-def]
    """Shuffle a pixel's bits by words of 64, each filled with 64 / groups bits of every group. x, out: addresses."""
    each, share = step.channels // step.groups, 64 // step.groups
    mask = 0
    for place in range(0, 64, step.groups):
        mask |= 1 << place
    for word in range(step.channels // 64):
        shuffled = 0
        for group in range(step.groups):
            first = group * each + word * share
            shuffled |= deposit_bits(x + (first >> 3), first & 7, mask << group)
        store_word(shuffled, out + 8 * word)


@jit
def run_align(step, x, out, memory):  # type: ignore[no-untyped-def]
    """Run one row of bits: move each channel group, a whole number of bytes, to the start of a 32-bit word."""
    size = step.channels // step.groups // 8
    aligned = (size + 3) // 4 * 4
    for column in range(step.columns):
        at, place = x + column * step.x_pixel, out + column * step.out_pixel
        for group in range(step.groups):
            for byte in range(size):
                memory[place + group * aligned + byte] = memory[at + group * size + byte]
