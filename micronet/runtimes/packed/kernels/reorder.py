"""Instructions that only move values: NCHW to NHWC, channel shuffles, alignment of channel groups."""

from micronet.runtimes.packed.kernels.cpu import BITS, HAS_PDEP, UINT8
from micronet.runtimes.packed.kernels.elementwise import store_values
from micronet.runtimes.packed.kernels.intrinsics import deposit_bits, store_word
from micronet.runtimes.packed.kernels.kernel_cache import jit


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
