"""What follows a convolution's sums, vector by vector, and what moves bits and holds threads together."""

import os
from functools import partial
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from micronet.runtimes.packed.kernels.cpu import (
    FLOATS,
    I8,
    I16,
    I32,
    I64,
    INTEGERS,
    INTS,
    LANES,
    REALS,
    call,
    load,
    primitive,
    spread,
    store,
)


def _finish(source: Any, out: int) -> Any:
    """Return the primitive that turns sums (pixels, vectors, LANES) into what a map holds: scaled, clipped, rounded.

    Of each pixel ``count`` vectors: ((base + factor * sums) * unit + bias), between least and most, over scale, between
    low and top, rounded half to even, plus zero; floats have no base, and as ``out`` end at most. Addresses: base, a
    pixel's ``classes`` (int32) bytes on; to, where the first pixel's values go, the next one's ``to_step`` bytes on;
    sums, unit, bias. The arguments' order is that of ``_emit_finish``.
    """
    kinds = [*[types.intp] * 10, types.int32, *[types.float32] * 5, types.int32]
    return primitive(types.void, kinds, partial(_emit_finish, source, out))


def _emit_finish(
    source: Any, out: int, builder: Any, classes: Any, bases: Any, first: Any, to_step: Any,
    pixels: Any, vectors: Any, count: Any, sums: Any, unit: Any, bias: Any, *ends: Any,
) -> None:  # fmt: skip
    factor, least, most, scale, low, top, zero = (spread(builder, end, LANES) for end in ends)
    zero64, one64 = ir.Constant(I64, 0), ir.Constant(I64, 1)
    entry = builder.block
    outer, block, turn, after = (builder.append_basic_block(name) for name in ("pixel", "vector", "turn", "done"))
    builder.branch(outer)

    builder.position_at_end(outer)
    pixel = builder.phi(I64)
    of_class = load(builder, I32, builder.add(classes, builder.mul(pixel, ir.Constant(I64, 4))))
    base = builder.add(bases, builder.sext(of_class, I64))
    to = builder.add(first, builder.mul(pixel, to_step))
    own = builder.add(sums, builder.mul(builder.mul(pixel, vectors), ir.Constant(I64, LANES * 4)))
    builder.branch(block)

    builder.position_at_end(block)
    index = builder.phi(I64)
    at = builder.mul(index, ir.Constant(I64, LANES * 4))
    value = load(builder, source, builder.add(own, at))
    if source is INTS:
        whole = builder.add(load(builder, INTS, builder.add(base, at)), builder.mul(factor, value))
        value = builder.sitofp(whole, REALS)
    value = builder.fmul(value, load(builder, REALS, builder.add(unit, at)))
    value = builder.fadd(value, load(builder, REALS, builder.add(bias, at)))
    value = _between(builder, value, least, most)
    size = 4
    if out == INTEGERS:
        scaled = _between(builder, builder.fdiv(value, scale), low, top)
        whole = builder.add(builder.fptosi(call(builder, "llvm.rint.v16f32", REALS, scaled), INTS), zero)
        value, size = builder.trunc(whole, ir.VectorType(I8, LANES)), 1
    store(builder, value, builder.add(to, builder.mul(index, ir.Constant(I64, LANES * size))))
    following = builder.add(index, one64)
    builder.cbranch(builder.icmp_signed("<", following, count), block, turn)

    builder.position_at_end(turn)
    next_pixel = builder.add(pixel, one64)
    builder.cbranch(builder.icmp_signed("<", next_pixel, pixels), outer, after)
    for phi, start, then, last in (
        (pixel, zero64, next_pixel, (entry, turn)),
        (index, zero64, following, (outer, block)),
    ):
        phi.add_incoming(start, last[0])
        phi.add_incoming(then, last[1])
    builder.position_at_end(after)


def _between(builder: Any, value: Any, low: Any, high: Any) -> Any:
    for end, compared in ((low, ">"), (high, "<")):
        value = builder.select(builder.fcmp_unordered(compared, value, end), value, end)
    return value


def _emit_signs(builder: Any, values: Any) -> Any:
    """Return one bit for each of 16 floats, given their address: whether it is at least 0."""
    found = builder.fcmp_ordered(">=", load(builder, REALS, values), ir.Constant(REALS, [0.0] * LANES))
    return builder.zext(builder.bitcast(found, I16), I64)


def _emit_deposit(builder: Any, place: Any, shift: Any, mask: Any) -> Any:
    """Return the bits that lie ``shift`` bits behind an address, each at the next 1 of a mask (PDEP)."""
    return call(builder, "llvm.x86.bmi.pdep.64", I64, builder.lshr(load(builder, I64, place), shift), mask)


def _emit_arrive(builder: Any, counter: Any, amount: Any) -> Any:
    """Add to a counter (int64, its address) that threads share, and return what it was before."""
    return builder.atomic_rmw("add", builder.inttoptr(counter, I64.as_pointer()), amount, "seq_cst")


def _emit_way(builder: Any) -> None:
    """Let another thread have the core, where the system has a word for that."""
    if os.name == "posix":
        function: Any = cgutils.get_or_insert_function
        builder.call(function(builder.module, ir.FunctionType(I32, []), "sched_yield"), [])


integers_to_floats, integers_to_integers = _finish(INTS, FLOATS), _finish(INTS, INTEGERS)
floats_to_floats, floats_to_integers = _finish(REALS, FLOATS), _finish(REALS, INTEGERS)
signs_of = primitive(types.intp, [types.intp], _emit_signs)
deposit = primitive(types.int64, [types.intp, types.int64, types.int64], _emit_deposit)
put_word = primitive(types.void, [types.int64, types.intp], store)
arrive = primitive(types.intp, [types.intp] * 2, _emit_arrive)
give_way = primitive(types.void, [], _emit_way)
