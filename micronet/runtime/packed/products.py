"""The inner loops of convolutions: sums of products of packed items, compiled by numba for the processor at hand.

An item is 32 bits of a pixel: 32 signs as bits, whole numbers, or one float. Sixteen output channels lie beside one
another in a vector; four pixels share the weights in registers. Of signs x and weights w the sum of K products is
K - 2 m, m the number of bits that differ. Three ways, by what the processor has:

- ``avx512``: bits by xor and VPOPCNTD, four 8-bit integers an item by VPDPBUSD;
- ``avx2``: bits by weights as nibbles, looked up (VPSHUFB) in the table of differences that the image's byte selects,
  128 products in two instructions; two 16-bit integers an item by VPMADDWD;
- ``portable``: the same by what LLVM makes of population counts and products on any processor.
"""

import os
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import njit, types
from numba.extending import intrinsic

LANES = 16  # output channels of a vector
PIXELS = 4  # that share the weights in registers
ITEM = 4  # bytes
BITS, INTEGERS, FLOATS = range(3)  # what a tensor holds
FLUSH = 7  # items whose differing bits, 8 a byte at most, a uint8 holds
I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
INTS, REALS = ir.VectorType(I32, LANES), ir.VectorType(F32, LANES)
BYTES, WIDE = ir.VectorType(I8, 32), ir.VectorType(I32, 32)


def way() -> str:
    """Return which way this process takes; the variable MICRONET_KERNEL names another one."""
    asked = os.environ.get("MICRONET_KERNEL")
    if asked:
        return asked
    features = binding.get_host_cpu_features()
    if all(features.get(name) for name in ("avx512vpopcntdq", "avx512vnni", "avx512bw")):
        return "avx512"
    return "avx2" if features.get("avx2") else "portable"


WAY = way()
COMPILED = {"nogil": True, "error_model": "numpy", "cache": "MICRONET_KERNEL" not in os.environ}
BYTEWISE = WAY != "avx512"  # bits are counted by the byte
NIBBLES = 2 if WAY == "avx2" else 1  # bytes in memory of eight weights
INTEGER = np.uint8 if WAY == "avx512" else np.int16  # a whole number of an item; uint8 as it is, int16 centred
WORDS = np.dtype(INTEGER).itemsize  # its bytes
FEWEST = 2 if BYTEWISE else 1  # vectors a block of binary weights is a multiple of
MOST_BITS, MOST = 4, 1 if BYTEWISE else 4  # vectors that the registers hold, of bits and of others
DEPOSITS = bool(binding.get_host_cpu_features().get("bmi2")) and WAY != "portable"
TABLE = np.array(
    [[bin(i ^ half).count("1") for half in (byte & 15, byte >> 4) for i in range(16)] for byte in range(256)], np.uint8
)


def _load(builder: Any, kind: Any, address: Any, offset: int = 0) -> Any:
    place = builder.add(address, ir.Constant(I64, offset)) if offset else address
    return builder.load(builder.inttoptr(place, kind.as_pointer()), align=1)


def _store(builder: Any, value: Any, address: Any, offset: int = 0) -> None:
    place = builder.add(address, ir.Constant(I64, offset)) if offset else address
    builder.store(value, builder.inttoptr(place, value.type.as_pointer()), align=1)


def _spread(builder: Any, value: Any, lanes: int) -> Any:
    """Return a vector that holds one value in every lane."""
    kind = ir.VectorType(value.type, lanes)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(I32, 0))
    return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(I32, lanes), [0] * lanes))


def _call(builder: Any, name: str, result: Any, *args: Any) -> Any:
    function = builder.module.declare_intrinsic(name, (), ir.FunctionType(result, [arg.type for arg in args]))
    return builder.call(function, args)


def _add_bits(builder: Any, total: Any, x: Any, weight: Any) -> Any:
    return builder.add(total, _call(builder, "llvm.ctpop.v16i32", INTS, builder.xor(x, weight)))


def _add_floats(builder: Any, total: Any, x: Any, weight: Any) -> Any:
    return _call(builder, "llvm.fmuladd.v16f32", REALS, x, weight, total)


def _add_integers(builder: Any, total: Any, x: Any, weight: Any) -> Any:
    if WAY == "avx512":
        return _call(builder, "llvm.x86.avx512.vpdpbusd.512", INTS, total, x, weight)
    if WAY == "avx2":
        halves, pairs = [], ir.VectorType(I16, 16)
        for start in (0, 8):
            lanes = ir.Constant(ir.VectorType(I32, 8), [*range(start, start + 8)])
            sides = [builder.bitcast(builder.shuffle_vector(side, side, lanes), pairs) for side in (x, weight)]
            halves.append(_call(builder, "llvm.x86.avx2.pmadd.wd", ir.VectorType(I32, 8), *sides))
        return builder.add(
            total, builder.shuffle_vector(*halves, ir.Constant(ir.VectorType(I32, LANES), [*range(LANES)]))
        )
    half = ir.Constant(INTS, [16] * LANES)
    for shifted in (lambda side: builder.shl(side, half), lambda side: side):
        products = [builder.ashr(shifted(side), half) for side in (x, weight)]
        total = builder.add(total, builder.mul(*products))
    return total


ADD = {BITS: (_add_bits, INTS), INTEGERS: (_add_integers, INTS), FLOATS: (_add_floats, REALS)}


def _product(kind: int, vectors: int) -> Any:
    """Return the intrinsic that sums a block's products: to ``sums`` (PIXELS, vectors, LANES), 32 bits each, or as signs.

    x: address of the first pixel; step: bytes to the next one; runs: address of ``count`` offsets (int64), at each of
    which ``length`` items lie; weights: address, by run, item, vector, lane. sums: 0 where the sums shall be compared
    instead; ``places`` then holds for each pixel the address of its limits, and of where its signs go.
    """

    def typer(
        context: Any, x: Any, step: Any, runs: Any, count: Any, length: Any, weights: Any, sums: Any, places: Any
    ) -> Any:
        signature = types.void(*[types.intp] * 8)

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _emit_product(builder, kind, vectors, *args)
            return context.get_dummy_value()

        return signature, codegen

    return intrinsic(typer)


def _emit_product(
    builder: Any, kind: int, vectors: int, x: Any, step: Any, runs: Any, count: Any, length: Any, weights: Any, to: Any,
    places: Any,
) -> None:  # fmt: skip
    add, lanes = ADD[kind]
    entry = builder.block
    outer, inner, turn, after, keep, compare, end = (
        builder.append_basic_block(name) for name in ("run", "item", "turn", "after", "keep", "compare", "end")
    )
    block = [(pixel, vector) for pixel in range(PIXELS) for vector in range(vectors)]
    started = [ir.Constant(lanes, [0] * LANES)] * len(block)
    builder.branch(outer)

    builder.position_at_end(outer)
    run, at, *totals = [builder.phi(kind) for kind in (I64, I64, *[lanes] * len(block))]
    offset = _load(builder, I64, builder.add(runs, builder.mul(run, ir.Constant(I64, 8))))
    first = builder.add(x, offset)
    pixels = [builder.add(first, builder.mul(step, ir.Constant(I64, pixel))) for pixel in range(PIXELS)]
    builder.branch(inner)

    builder.position_at_end(inner)
    item, weight, *sums = [builder.phi(kind) for kind in (I64, I64, *[lanes] * len(block))]
    own = [_load(builder, lanes, weight, vector * LANES * 4) for vector in range(vectors)]
    grown = []
    for pixel in range(PIXELS):
        value = _load(builder, F32 if kind == FLOATS else I32, builder.add(pixels[pixel], item))
        spread = _spread(builder, value, LANES)
        for vector in range(vectors):
            grown.append(add(builder, sums[pixel * vectors + vector], spread, own[vector]))
    next_item = builder.add(item, ir.Constant(I64, ITEM))
    next_weight = builder.add(weight, ir.Constant(I64, vectors * LANES * 4))
    bytes_long = builder.mul(length, ir.Constant(I64, ITEM))
    builder.cbranch(builder.icmp_signed("<", next_item, bytes_long), inner, turn)

    builder.position_at_end(turn)
    next_run = builder.add(run, ir.Constant(I64, 1))
    builder.cbranch(builder.icmp_signed("<", next_run, count), outer, after)

    for phi, value in zip([run, at, *totals], [ir.Constant(I64, 0), weights, *started], strict=True):
        phi.add_incoming(value, entry)
    for phi, value in zip([run, at, *totals], [next_run, next_weight, *grown], strict=True):
        phi.add_incoming(value, turn)
    for phi, value in zip([item, weight, *sums], [ir.Constant(I64, 0), at, *totals], strict=True):
        phi.add_incoming(value, outer)
    for phi, value in zip([item, weight, *sums], [next_item, next_weight, *grown], strict=True):
        phi.add_incoming(value, inner)
    builder.position_at_end(after)
    builder.cbranch(builder.icmp_signed("!=", to, ir.Constant(I64, 0)), keep, compare)
    builder.position_at_end(keep)
    for number, value in enumerate(grown):
        _store(builder, value, to, number * LANES * 4)
    builder.branch(end)
    builder.position_at_end(compare)
    ends = [[_load(builder, I64, places, (pixel * 2 + which) * 8) for which in (0, 1)] for pixel in range(PIXELS)]
    for (pixel, vector), value in zip(block, grown, strict=True):
        limits = _load(builder, lanes, ends[pixel][0], vector * LANES * 4)
        _store(builder, _compared(builder, kind, value, limits), ends[pixel][1], vector * 2)
    builder.branch(end)
    builder.position_at_end(end)


def _compared(builder: Any, kind: int, sums: Any, limits: Any) -> Any:
    """Return one bit a lane: of differing bits at most, of other sums at least so many."""
    if kind == FLOATS:
        found = builder.fcmp_ordered(">=", sums, limits)
    else:
        found = builder.icmp_signed("<=" if kind == BITS else ">=", sums, limits)
    return builder.bitcast(found, I16)


def _bytewise(pairs: int) -> Any:
    """Return the intrinsic that adds the differing bits of ``length`` bytes to ``sums`` (PIXELS, pairs, 32) int32."""

    def typer(context: Any, x: Any, step: Any, length: Any, weights: Any, table: Any, sums: Any) -> Any:
        signature = types.void(*[types.intp] * 6)

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _emit_bytewise(builder, pairs, *args)
            return context.get_dummy_value()

        return signature, codegen

    return intrinsic(typer)


def _emit_bytewise(builder: Any, pairs: int, x: Any, step: Any, length: Any, weights: Any, table: Any, to: Any) -> None:
    entry = builder.block
    block, after = builder.append_basic_block("bytes"), builder.append_basic_block("widen")
    builder.branch(block)
    builder.position_at_end(block)
    index, *sums = [builder.phi(kind) for kind in (I64, *[BYTES] * PIXELS * pairs)]
    size = pairs * 32 * NIBBLES
    row = builder.add(weights, builder.mul(index, ir.Constant(I64, size)))
    own = [[_load(builder, BYTES, row, (pair * NIBBLES + half) * 32) for half in range(NIBBLES)]
           for pair in range(pairs)]  # fmt: skip
    grown = []
    for pixel in range(PIXELS):
        place = builder.add(builder.add(x, builder.mul(step, ir.Constant(I64, pixel))), index)
        byte = _load(builder, I8, place)
        grown += _differences(builder, byte, table, own, sums[pixel * pairs : (pixel + 1) * pairs])
    following = builder.add(index, ir.Constant(I64, 1))
    builder.cbranch(builder.icmp_signed("<", following, length), block, after)
    for phi, value in zip([index, *sums], [ir.Constant(I64, 0), *[ir.Constant(BYTES, [0] * 32)] * len(sums)],
                          strict=True):  # fmt: skip
        phi.add_incoming(value, entry)
    for phi, value in zip([index, *sums], [following, *grown], strict=True):
        phi.add_incoming(value, block)
    builder.position_at_end(after)
    for number, value in enumerate(grown):
        before = _load(builder, WIDE, to, number * 32 * 4)
        _store(builder, builder.add(before, builder.zext(value, WIDE)), to, number * 32 * 4)


def _differences(builder: Any, byte: Any, table: Any, own: Any, sums: Any) -> list[Any]:
    """Return sums, each with the bits added in which a byte differs from each of 32 weights."""
    if WAY != "avx2":
        spread = _spread(builder, byte, 32)
        return [
            builder.add(total, _call(builder, "llvm.ctpop.v32i8", BYTES, builder.xor(spread, weights[0])))
            for total, weights in zip(sums, own, strict=True)
        ]
    row = builder.add(table, builder.mul(builder.zext(byte, I64), ir.Constant(I64, 32)))
    twice, half = ir.Constant(ir.VectorType(I32, 32), [*range(16), *range(16)]), ir.VectorType(I8, 16)
    tables = []
    for start in (0, 16):
        loaded = _load(builder, half, row, start)
        tables.append(builder.shuffle_vector(loaded, ir.Constant(half, ir.Undefined), twice))
    found = []
    for total, weights in zip(sums, own, strict=True):
        for known, nibbles in zip(tables, weights, strict=True):
            total = builder.add(total, _call(builder, "llvm.x86.avx2.pshuf.b", BYTES, known, nibbles))
        found.append(total)
    return found


@intrinsic
def _compare_counts(context: Any, sums: Any, limits: Any, to: Any) -> Any:
    """Store the signs of 16 counts of differing bits, all given by their addresses."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        counts, most = (_load(builder, INTS, address) for address in args[:2])
        _store(builder, _compared(builder, BITS, counts, most), args[2])
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), codegen


def _finish(source: Any, out: int) -> Any:
    """Return the intrinsic that turns sums (pixels, vectors, LANES) into what a map holds: scaled, clipped, rounded.

    Of each pixel ``count`` vectors: ((base + factor * sums) * unit + bias), between least and most, over scale, between
    low and top, rounded half to even, plus zero; floats have no base, and as ``out`` end at most. places: address of
    (pixels, 2) int64, where a pixel's base lies and where its values go. sums, unit, bias: addresses.
    """

    def typer(
        context: Any, places: Any, pixels: Any, vectors: Any, count: Any, sums: Any, unit: Any, bias: Any, factor: Any,
        least: Any, most: Any, scale: Any, low: Any, top: Any, zero: Any,
    ) -> Any:  # fmt: skip
        signature = types.void(*[types.intp] * 7, types.int32, *[types.float32] * 5, types.int32)

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _emit_finish(builder, source, out, *args)
            return context.get_dummy_value()

        return signature, codegen

    return intrinsic(typer)


def _emit_finish(
    builder: Any, source: Any, out: int, places: Any, pixels: Any, vectors: Any, count: Any, sums: Any, unit: Any,
    bias: Any, *ends: Any,
) -> None:  # fmt: skip
    factor, least, most, scale, low, top, zero = (_spread(builder, end, LANES) for end in ends)
    zero64, one64 = ir.Constant(I64, 0), ir.Constant(I64, 1)
    entry = builder.block
    outer, block, turn, after = (builder.append_basic_block(name) for name in ("pixel", "vector", "turn", "done"))
    builder.branch(outer)

    builder.position_at_end(outer)
    pixel = builder.phi(I64)
    place = builder.add(places, builder.mul(pixel, ir.Constant(I64, 16)))
    base, to = _load(builder, I64, place), _load(builder, I64, place, 8)
    own = builder.add(sums, builder.mul(builder.mul(pixel, vectors), ir.Constant(I64, LANES * 4)))
    builder.branch(block)

    builder.position_at_end(block)
    index = builder.phi(I64)
    at = builder.mul(index, ir.Constant(I64, LANES * 4))
    value = _load(builder, source, builder.add(own, at))
    if source is INTS:
        whole = builder.add(_load(builder, INTS, builder.add(base, at)), builder.mul(factor, value))
        value = builder.sitofp(whole, REALS)
    value = builder.fmul(value, _load(builder, REALS, builder.add(unit, at)))
    value = builder.fadd(value, _load(builder, REALS, builder.add(bias, at)))
    value = _between(builder, value, least, most)
    size = 4
    if out == INTEGERS:
        scaled = _between(builder, builder.fdiv(value, scale), low, top)
        whole = builder.add(builder.fptosi(_call(builder, "llvm.rint.v16f32", REALS, scaled), INTS), zero)
        value, size = builder.trunc(whole, ir.VectorType(I8 if WORDS == 1 else I16, LANES)), WORDS
    _store(builder, value, builder.add(to, builder.mul(index, ir.Constant(I64, LANES * size))))
    following = builder.add(index, one64)
    builder.cbranch(builder.icmp_signed("<", following, count), block, turn)

    builder.position_at_end(turn)
    next_pixel = builder.add(pixel, one64)
    builder.cbranch(builder.icmp_signed("<", next_pixel, pixels), outer, after)
    for phi, first, then, last in (
        (pixel, zero64, next_pixel, (entry, turn)),
        (index, zero64, following, (outer, block)),
    ):
        phi.add_incoming(first, last[0])
        phi.add_incoming(then, last[1])
    builder.position_at_end(after)


def _between(builder: Any, value: Any, low: Any, high: Any) -> Any:
    for end, compared in ((low, ">"), (high, "<")):
        value = builder.select(builder.fcmp_unordered(compared, value, end), value, end)
    return value


@intrinsic
def signs_of(context: Any, values: Any) -> Any:
    """Return one bit for each of 16 floats, given their address: whether it is at least 0."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = _load(builder, REALS, args[0])
        found = builder.fcmp_ordered(">=", value, ir.Constant(REALS, [0.0] * LANES))
        return builder.zext(builder.bitcast(found, I16), I64)

    return types.intp(types.intp), codegen


@intrinsic
def deposit(context: Any, place: Any, shift: Any, mask: Any) -> Any:
    """Return the bits that lie ``shift`` bits behind an address, each at the next 1 of a mask (PDEP)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = builder.lshr(_load(builder, I64, args[0]), args[1])
        return _call(builder, "llvm.x86.bmi.pdep.64", I64, bits, args[2])

    return types.int64(types.intp, types.int64, types.int64), codegen


@intrinsic
def put_word(context: Any, word: Any, place: Any) -> Any:
    """Store 64 bits at an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _store(builder, *args)
        return context.get_dummy_value()

    return types.void(types.int64, types.intp), codegen


@intrinsic
def _move(context: Any, sums: Any, to: Any) -> Any:
    """Copy 16 sums, given by their addresses."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _store(builder, _load(builder, INTS, args[0]), args[1])
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), codegen


@intrinsic
def arrive(context: Any, counter: Any, amount: Any) -> Any:
    """Add to a counter (int64, its address) that threads share, and return what it was before."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", builder.inttoptr(args[0], I64.as_pointer()), args[1], "seq_cst")

    return types.intp(types.intp, types.intp), codegen


_floats1, _floats2, _floats4 = (_product(FLOATS, vectors) for vectors in (1, 2, 4))
_integers1, _integers2, _integers4 = (_product(INTEGERS, vectors) for vectors in (1, 2, 4))
_bits1, _bits2, _bits4 = (_product(BITS, vectors) for vectors in (1, 2, 4))
_bytes1, _bytes2 = _bytewise(1), _bytewise(2)
integers_to_floats, integers_to_integers = _finish(INTS, FLOATS), _finish(INTS, INTEGERS)
floats_to_floats, floats_to_integers = _finish(REALS, FLOATS), _finish(REALS, INTEGERS)


@njit(**COMPILED)  # type: ignore[untyped-decorator, unused-ignore]
def accumulate(kind, vectors, x, step, offsets, length, weights, sums, places, table):  # type: ignore[no-untyped-def]
    """Sum the products of a block of pixels and channels; see ``_product``. Return the address of the next weights.

    offsets: int64, one a run of items. places: int64 (PIXELS, 2). table: ``TABLE``. The others: addresses and sizes.
    """
    runs, count, ends = offsets.ctypes.data, len(offsets), places.ctypes.data
    if kind == BITS:
        if BYTEWISE:
            _accumulate_bytes(vectors, x, step, offsets, length, weights, sums, places, table)
            return weights + count * length * vectors * LANES * ITEM * NIBBLES
        if vectors == 4:
            _bits4(x, step, runs, count, length, weights, sums, ends)
        elif vectors == 2:
            _bits2(x, step, runs, count, length, weights, sums, ends)
        else:
            _bits1(x, step, runs, count, length, weights, sums, ends)
    elif kind == INTEGERS:
        if BYTEWISE or vectors == 1:
            _integers1(x, step, runs, count, length, weights, sums, ends)
        elif vectors == 2:
            _integers2(x, step, runs, count, length, weights, sums, ends)
        else:
            _integers4(x, step, runs, count, length, weights, sums, ends)
    elif BYTEWISE or vectors == 1:
        _floats1(x, step, runs, count, length, weights, sums, ends)
    elif vectors == 2:
        _floats2(x, step, runs, count, length, weights, sums, ends)
    else:
        _floats4(x, step, runs, count, length, weights, sums, ends)
    return weights + count * length * vectors * LANES * ITEM


@njit(**COMPILED)  # type: ignore[untyped-decorator, unused-ignore]
def _accumulate_bytes(vectors, x, step, offsets, length, weights, sums, places, table):  # type: ignore[no-untyped-def]
    counts = np.zeros(PIXELS * vectors * LANES, np.int32)
    to = counts.ctypes.data
    for offset in offsets:
        done = 0
        while done < length:
            part = min(FLUSH, length - done)
            if vectors == 4:
                _bytes2(x + offset + done * ITEM, step, part * ITEM, weights, table.ctypes.data, to)
            else:
                _bytes1(x + offset + done * ITEM, step, part * ITEM, weights, table.ctypes.data, to)
            weights += part * ITEM * vectors * LANES * NIBBLES
            done += part
    for pixel in range(PIXELS):
        for vector in range(vectors):
            own = (pixel * vectors + vector) * LANES * 4
            if sums:
                _move(to + own, sums + own)
            else:
                _compare_counts(to + own, places[pixel, 0] + vector * LANES * 4, places[pixel, 1] + vector * 2)
