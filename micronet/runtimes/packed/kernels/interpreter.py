"""The interpreter: it executes an instruction table from the images to the scores, in compiled code throughout."""

from collections import namedtuple

import numpy as np

from micronet.runtimes.packed.kernels import cpu, elementwise, moving
from micronet.runtimes.packed.kernels.convolution import accumulate
from micronet.runtimes.packed.kernels.depthwise import accumulate_depthwise
from micronet.runtimes.packed.kernels.epilogue import VALUES, apply_activation, apply_epilogue
from micronet.runtimes.packed.kernels.instructions import (
    ALIGN,
    AVERAGE_POOL,
    CONV,
    ELEMENTWISE,
    INTERPOLATE,
    MAX_POOL,
    MOVE,
    SHUFFLE,
    TO_NHWC,
)  # fmt: skip
from micronet.runtimes.packed.kernels.kernel_cache import jit
from micronet.runtimes.packed.kernels.llvm import atomic_add, yield_core
from micronet.runtimes.packed.kernels.pooling import run_average_pool, run_max_pool
from micronet.runtimes.packed.weight_layout import block_size, even_share

_block_size, _even_share = jit(block_size), jit(even_share)
STRIPE_PIXELS = 32  # pixels whose sums are held until the epilogue
SPINS = 200  # checks of the barrier before the core is offered to another thread

# values: scratch, also for the output of unused pixels and of a last, incomplete vector. wide: scratch for wide sums.
Addresses = namedtuple("Addresses", "memory weights ints offsets reals table sums values wide")


@jit
def _address(array):  # type: ignore[no-untyped-def]
    return np.int64(array.ctypes.data)


@jit
def execute(instructions, images, memory, constants, table, thread, threads, counter):  # type: ignore[no-untyped-def]
    """Execute instructions on ``images`` images, whose input is already in ``memory`` (uint8).

    constants: arrays of uint8, int32, int64 and float32. table: ``cpu.DIFFERENCE_TABLE``. This call processes share
    ``thread`` of ``threads`` of each instruction's rows; ``counter`` (one int64, initially 0) is the threads' barrier.
    """
    floats = memory.view(np.float32)
    room = max(cpu.LANES * cpu.MAX_BIT_VECTORS, instructions["scratch"].max() + cpu.LANES)
    values, second = np.empty(room, np.float32), np.empty(room, np.float32)
    pooled = np.empty((instructions["x_columns"] * instructions["x_pixel"]).max(), np.uint8)
    sums = np.empty(STRIPE_PIXELS * cpu.MAX_BIT_VECTORS * cpu.LANES, np.int32)
    wide = np.empty(cpu.BLOCK_PIXELS * cpu.MAX_BIT_VECTORS * cpu.LANES, np.int32)
    weights, ints, offsets, reals = constants
    addresses = Addresses(_address(memory), _address(weights), _address(ints), _address(offsets), _address(reals),
                          _address(table), _address(sums), _address(values), _address(wide))  # fmt: skip
    barriers = 0
    for index in range(len(instructions)):
        step = instructions[index]
        units = images * step.rows
        first, end = units * thread // threads, units * (thread + 1) // threads
        for unit in range(first, end):
            image, row = unit // step.rows, unit % step.rows
            x = step.x_buffer * images + image * step.x_image + step.x + row * step.stride_y * step.x_row
            out = step.out_buffer * images + image * step.out_image + step.out + row * step.out_row
            if step.opcode == CONV:
                _run_conv(step, x, out, row, memory, ints, values, addresses)
            elif step.opcode == ELEMENTWISE:
                y = step.y_buffer * images + image * step.y_image + step.y + row * step.y_row
                elementwise.run_elementwise(step, x, y, out, memory, floats, reals, values, second)
            elif step.opcode == MAX_POOL:
                run_max_pool(step, x, out, row, memory, pooled)
            elif step.opcode == AVERAGE_POOL:
                run_average_pool(step, x, out, row, memory, floats)
            elif step.opcode == SHUFFLE:
                elementwise.run_shuffle(step, x, out, memory, floats)
            elif step.opcode == TO_NHWC:
                elementwise.run_to_nhwc(step, x, out, memory, floats, values)
            elif step.opcode == MOVE:
                moving.run_move(step, x, out, row, memory, offsets)
            elif step.opcode == INTERPOLATE:
                moving.run_interpolate(step, x, out, row, memory, floats, offsets, reals, values, second)
            elif step.opcode == ALIGN:
                elementwise.run_align(step, x, out, memory)
            else:
                moving.run_table(step, x, out, memory, weights)
        if threads > 1 and step.barrier:
            barriers += 1
            atomic_add(counter.ctypes.data, 1)
            spins = 0
            while atomic_add(counter.ctypes.data, 0) < barriers * threads:
                spins += 1
                if spins > SPINS:
                    yield_core()
    return sums.size + wide.size  # numba frees an array after its last use, and taking its address is not a use


@jit
def _run_conv(step, x, out, row, memory, ints, values, addresses):  # type: ignore[no-untyped-def]
    """Run one row of a convolution: the signs of its sums, or its sums and their epilogue."""
    start, runs = addresses.memory, addresses.offsets + 8 * step.runs
    signs = step.limits >= 0
    size = 0 if step.out_dtype == cpu.BITS else 1 if step.out_dtype == cpu.UINT8 else 4
    bits = step.arithmetic == cpu.BITS
    most = cpu.MAX_BIT_VECTORS if bits else cpu.MAX_VECTORS
    limit_size = (2 if step.widen_after else 1) if cpu.COUNTS_BYTES and signs and bits else 4  # bytes
    numbers = addresses.ints + 4 * (step.limits if signs else step.base) + ints[step.row_class + row]
    weights, x_step = addresses.weights + step.weights, step.stride_x * step.x_pixel
    lane_bytes = step.run_count * step.run_bytes * (cpu.WEIGHT_EXPANSION if bits else 1)
    stripe = _even_share(step.columns, STRIPE_PIXELS)
    block = 0
    while block < step.vectors:
        vectors = _block_size(step.vectors - block, most)
        channel = block * cpu.LANES
        whole = min(vectors, (step.channels - channel) // cpu.LANES) if size else 0  # vectors stored in place
        first = out + (channel // 8 if step.out_dtype == cpu.BITS else channel * size)
        for column in range(0, step.columns, stripe):
            columns, to = min(stripe, step.columns - column), first + column * step.out_pixel
            classes, own = addresses.ints + 4 * (step.column_class + column), numbers + limit_size * channel
            if step.depthwise:
                accumulate_depthwise(start + x + column * x_step + channel, x_step, columns, runs, step.run_count,
                                     weights, vectors, addresses.sums)  # fmt: skip
            else:
                accumulate(step.arithmetic, vectors, step.widen_after, (
                    start + x + column * x_step, x_step, columns, runs, step.run_count, step.run_bytes,
                    step.widen_after, weights, 0 if signs else addresses.sums, classes, own, start + to,
                    step.out_pixel, addresses.values, addresses.wide, addresses.table,
                ))  # fmt: skip
            if signs:
                continue
            source = step.arithmetic
            if step.activation:
                apply_activation(step, channel, classes, own, columns, vectors, addresses.sums, addresses.reals)
                source = VALUES
            apply_epilogue(step, source, channel, classes, own, start + to, columns, vectors, whole, addresses.sums,
                           addresses.reals)  # fmt: skip
            if whole == vectors:
                continue
            done = whole * cpu.LANES
            left = min(vectors * cpu.LANES, step.channels - channel) - done
            for pixel in range(columns):
                place = to + pixel * step.out_pixel + done * size
                sums = addresses.sums + 4 * (pixel * vectors * cpu.LANES + done)
                apply_epilogue(step, source, channel + done, classes + 4 * pixel, own + 4 * done, addresses.values, 1,
                               vectors, vectors - whole, sums, addresses.reals)  # fmt: skip
                if size:
                    memory[place : place + left * size] = values.view(np.uint8)[: left * size]
                else:
                    elementwise.store_signs(values, left, place, memory)
        weights += vectors * cpu.LANES * lane_bytes
        block += vectors
