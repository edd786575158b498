"""Maximum pools: of signs the or of their bits."""

from functools import partial
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from micronet.runtimes.packed.kernels.cpu import (
    BITS,
    F32,
    FLOATS,
    I8,
    I32,
    I64,
    INTEGERS,
    compiled,
    load,
    primitive,
    store,
)

VECTOR = 32  # bytes
ITEMS = {BITS: (I32, 4), INTEGERS: (I8, 1), FLOATS: (F32, 4)}  # a kind of map's items, and their bytes


def _joined(kind: int, lanes: int) -> Any:
    """Return the primitive that joins ``count`` places: of each ``size`` bytes, the next place ``step`` bytes on.

    Its arguments are sizes and addresses: to, held (the first place), size, step, count. size: at least the bytes of
    as many items as lanes.
    """
    return primitive(types.void, [types.intp] * 5, partial(_emit_joined, kind, lanes))


def _emit_joined(kind: int, lanes: int, builder: Any, to: Any, held: Any, size: Any, step: Any, count: Any) -> None:
    number, zero = partial(ir.Constant, I64), ir.Constant(I64, 0)
    item, width = ITEMS[kind]
    vector = ir.VectorType(item, lanes)
    last = builder.sub(size, number(width * lanes))
    entry = builder.block
    across, over, turn, after = map(builder.append_basic_block, ("across", "over", "turn", "after"))
    builder.branch(across)
    builder.position_at_end(across)
    offset = builder.phi(I64)
    first = load(builder, vector, builder.add(held, offset))
    builder.branch(over)
    builder.position_at_end(over)
    place, found = builder.phi(I64), builder.phi(vector)
    seen = load(builder, vector, builder.add(builder.add(held, offset), builder.mul(place, step)))
    if kind == BITS:
        joined = builder.or_(found, seen)
    else:
        larger = (builder.icmp_unsigned if kind == INTEGERS else builder.fcmp_ordered)(">", seen, found)
        if kind == FLOATS:  # NaN stays, as in numpy
            larger = builder.or_(larger, builder.fcmp_unordered("uno", seen, seen))
        joined = builder.select(larger, seen, found)
    following = builder.add(place, number(1))
    builder.cbranch(builder.icmp_signed("<", following, count), over, turn)
    builder.position_at_end(turn)
    store(builder, joined, builder.add(to, offset))
    further = builder.add(offset, number(width * lanes))
    next_offset = builder.select(builder.icmp_signed("<", further, last), further, last)
    builder.cbranch(builder.icmp_signed("<", offset, last), across, after)
    for phi, start, then, blocks in (
        (offset, zero, next_offset, (entry, turn)),
        (place, zero, following, (across, over)),
        (found, first, joined, (across, over)),
    ):
        phi.add_incoming(start, blocks[0])
        phi.add_incoming(then, blocks[1])
    builder.position_at_end(after)


_bits8, _integers32, _floats8 = (_joined(kind, VECTOR // ITEMS[kind][1]) for kind in (BITS, INTEGERS, FLOATS))
_bits1, _integers1, _floats1 = (_joined(kind, 1) for kind in (BITS, INTEGERS, FLOATS))


@compiled
def _join_places(kind, to, held, size, step, count):  # type: ignore[no-untyped-def]
    """Join places by what they hold; see ``_joined``."""
    if kind == BITS:
        if size < VECTOR:
            _bits1(to, held, size, step, count)
        else:
            _bits8(to, held, size, step, count)
    elif kind == INTEGERS:
        if size < VECTOR:
            _integers1(to, held, size, step, count)
        else:
            _integers32(to, held, size, step, count)
    elif size < VECTOR:
        _floats1(to, held, size, step, count)
    else:
        _floats8(to, held, size, step, count)


@compiled
def run_pool(step, x, out, row, memory, spare):  # type: ignore[no-untyped-def]
    """Run a row of a maximum pool; what lies outside the map counts nothing. spare: room for a row of the input.

    The rows of all windows are joined first, then each window's columns.
    """
    here, joined, pixel = np.int64(memory.ctypes.data), np.int64(spare.ctypes.data), step.x_pixel
    top = row * step.stride_y - step.top
    first, beyond = max(0, -top), min(step.kernel_y, step.high - top)
    _join_places(step.x_kind, joined, here + x + (first - step.top) * step.x_row, step.wide * pixel, step.x_row,
          beyond - first)  # fmt: skip
    for column in range(step.columns):
        left = column * step.stride_x - step.left
        first, beyond = max(0, left), min(left + step.kernel_x, step.wide)
        _join_places(
            step.x_kind, here + out + column * step.out_pixel, joined + first * pixel, pixel, pixel, beyond - first
        )
