"""Binary convolutions on packed bits, compiled by numba for the processor at hand.

Both the images' and the weights' signs are bits; a sum of K products of signs is K - 2 m, m the number of bits that
differ, so y >= t is m <= (K - t) / 2. Thirty-two output channels lie beside one another in a vector, four pixels share
each weight that is loaded, and three ways count the differing bits of a byte:

- ``popcount``: xor, then a popcount of every byte, where the processor has one (AVX-512 BITALG, ARM's NEON);
- ``lookup``: weights as nibbles, looked up (vpshufb) in the table of differences that the image's byte selects: 128
  products in two instructions, the fastest on AVX2;
- ``portable``: as the first, whatever LLVM makes of it.

Zero padding counts as -1 in the sums; what that is off by depends on which rows and columns of the kernel lie outside
alone, so each such class has limits of its own, made at load.
"""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import njit, types
from numba.extending import intrinsic

LANES = 32  # output channels of a vector
PIXELS = 4  # that share the weights in registers
FLUSH = 31  # bytes whose differences, 8 at most each, a uint8 holds
I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
BYTES, HALVES = ir.VectorType(I8, LANES), ir.VectorType(I16, LANES)


def way() -> str:
    """Return how differing bits are counted here; the variable MICRONET_KERNEL names another way."""
    asked = os.environ.get("MICRONET_KERNEL")
    if asked:
        return asked
    features = binding.get_host_cpu_features()
    if features.get("avx512bitalg") or features.get("neon"):
        return "popcount"
    return "lookup" if features.get("avx2") else "portable"


WAY = way()
WEIGHT_BYTES = 2 if WAY == "lookup" else 1  # in memory, of eight weights
TABLE = np.array(
    [[bin(i ^ half).count("1") for half in (byte & 15, byte >> 4) for i in range(16)] for byte in range(256)], np.uint8
)


def _counter(vectors: int) -> Callable[..., Any]:
    """Return the intrinsic that adds the differing bits of four pixels to ``vectors`` times 32 channels' counts."""

    def typer(context: Any, x: Any, step: Any, length: Any, weights: Any, table: Any, counts: Any) -> Any:
        signature = types.void(types.uintp, types.intp, types.intp, types.uintp, types.uintp, types.uintp)

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _emit_counter(builder, vectors, *args)
            return context.get_dummy_value()

        return signature, codegen

    return typer


def _emit_counter(
    builder: Any, vectors: int, x: Any, step: Any, length: Any, weights: Any, table: Any, to: Any
) -> None:
    block = builder.append_basic_block("bytes")
    after = builder.append_basic_block("widen")
    entry = builder.block
    builder.branch(block)
    builder.position_at_end(block)
    index = builder.phi(I64)
    index.add_incoming(ir.Constant(I64, 0), entry)
    zero = ir.Constant(BYTES, [0] * LANES)
    sums = [[builder.phi(BYTES) for _ in range(vectors)] for _ in range(PIXELS)]
    for row in sums:
        for phi in row:
            phi.add_incoming(zero, entry)
    size = LANES * WEIGHT_BYTES
    own = [
        [_load(builder, BYTES, weights, index, vectors * size, vector * size + half * LANES)
         for half in range(WEIGHT_BYTES)]
        for vector in range(vectors)
    ]  # fmt: skip
    grown = []
    for pixel, row in enumerate(sums):
        at = builder.add(builder.mul(step, ir.Constant(I64, pixel)), index)
        byte = builder.load(builder.inttoptr(builder.add(x, at), I8.as_pointer()))
        grown.append(_differences(builder, byte, table, own, row))
    following = builder.add(index, ir.Constant(I64, 1))
    index.add_incoming(following, builder.block)
    for row, new in zip(sums, grown, strict=True):
        for phi, value in zip(row, new, strict=True):
            phi.add_incoming(value, builder.block)
    builder.cbranch(builder.icmp_signed("<", following, length), block, after)
    builder.position_at_end(after)
    for pixel, row in enumerate(grown):
        for vector, value in enumerate(row):
            place = ir.Constant(I64, (pixel * vectors + vector) * LANES * 2)
            pointer = builder.inttoptr(builder.add(to, place), HALVES.as_pointer())
            before = builder.load(pointer, align=2)
            builder.store(builder.add(before, builder.zext(value, HALVES)), pointer, align=2)


def _load(builder: Any, kind: Any, base: Any, index: Any, stride: int, offset: int) -> Any:
    at = builder.add(builder.mul(index, ir.Constant(I64, stride)), ir.Constant(I64, offset))
    return builder.load(builder.inttoptr(builder.add(base, at), kind.as_pointer()), align=1)


def _differences(builder: Any, byte: Any, table: Any, own: Any, sums: Any) -> list[Any]:
    if WAY == "lookup":
        row = builder.add(table, builder.mul(builder.zext(byte, I64), ir.Constant(I64, 32)))
        twice = ir.Constant(ir.VectorType(I32, LANES), [*range(16), *range(16)])
        half = ir.VectorType(I8, 16)
        tables = []
        for start in (0, 16):
            pointer = builder.inttoptr(builder.add(row, ir.Constant(I64, start)), half.as_pointer())
            loaded = builder.load(pointer, align=16)
            tables.append(builder.shuffle_vector(loaded, ir.Constant(half, ir.Undefined), twice))
        look = builder.module.declare_intrinsic("llvm.x86.avx2.pshuf.b", (), ir.FunctionType(BYTES, [BYTES, BYTES]))
        found = []
        for total, weights in zip(sums, own, strict=True):
            for known, nibbles in zip(tables, weights, strict=True):
                total = builder.add(total, builder.call(look, [known, nibbles]))
            found.append(total)
        return found
    splat = builder.insert_element(ir.Constant(BYTES, ir.Undefined), byte, ir.Constant(I32, 0))
    spread = builder.shuffle_vector(splat, splat, ir.Constant(ir.VectorType(I32, LANES), [0] * LANES))
    count = builder.module.declare_intrinsic("llvm.ctpop.v32i8", (), ir.FunctionType(BYTES, [BYTES]))
    return [
        builder.add(total, builder.call(count, [builder.xor(spread, weights[0])]))
        for total, weights in zip(sums, own, strict=True)
    ]


_count1 = intrinsic(_counter(1))
_count2 = intrinsic(_counter(2))


@intrinsic
def _at_most(context: Any, counts: Any, limits: Any, to: Any) -> Any:
    """Store one bit a channel: whether its count is at most its limit; 32 channels."""
    signature = types.void(types.uintp, types.uintp, types.uintp)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        counted, most = (
            builder.load(builder.inttoptr(pointer, HALVES.as_pointer()), align=2) for pointer in args[:2]
        )  # fmt: skip
        bits = builder.bitcast(builder.icmp_signed("<=", counted, most), I32)
        builder.store(bits, builder.inttoptr(args[2], I32.as_pointer()), align=1)
        return context.get_dummy_value()

    return signature, codegen


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator, unused-ignore]
def conv_bits(x, weights, limits, row_class, column_class, table, geometry, out, differing):  # type: ignore[no-untyped-def]
    """Convolve bits: x (N, H, W, bytes) uint8, padded with 0, -> out (N, H', W', bytes) uint8.

    Where ``differing`` (N, H', W', channels) int16 is not empty, the counts themselves go there and out stays as it is.

    weights: uint8, by block of channels, plane, row, column, byte. limits: (row classes, column classes, channels)
    int16. geometry: kernel height, width, strides, dilations, bytes read of a pixel, planes.
    """
    height, width, sy, sx, dy, dx, length, planes = geometry
    vectors = limits.shape[2] // LANES
    counts = np.zeros(PIXELS * 2 * LANES, np.int16)
    line = x.strides[1]
    pixel = x.strides[2]
    spare = np.zeros(2 * LANES // 8, np.uint8)
    for image in range(x.shape[0]):
        for oy in range(out.shape[1]):
            for start in range(0, out.shape[2], PIXELS):
                ox = max(0, min(start, out.shape[2] - PIXELS))
                vector = 0
                at = weights.ctypes.data
                while vector < vectors:
                    wide = 2 if vectors - vector >= 2 else 1
                    counts[:] = 0
                    for _plane in range(planes):
                        for i in range(height):
                            for j in range(width):
                                base = x.ctypes.data + image * x.strides[0] + (oy * sy + i * dy) * line
                                base += (ox * sx + j * dx) * pixel
                                done = 0
                                while done < length:
                                    part = min(FLUSH, length - done)
                                    if wide == 2:
                                        _count2(
                                            base + done, sx * pixel, part, at, table.ctypes.data, counts.ctypes.data
                                        )
                                    else:
                                        _count1(
                                            base + done, sx * pixel, part, at, table.ctypes.data, counts.ctypes.data
                                        )
                                    at += part * wide * LANES * WEIGHT_BYTES
                                    done += part
                    for p in range(PIXELS):
                        for v in range(wide):
                            inside = ox + p < out.shape[2]
                            if differing.size:
                                if inside:
                                    first = (vector + v) * LANES
                                    for lane in range(LANES):
                                        differing[image, oy, ox + p, first + lane] = counts[
                                            (p * wide + v) * LANES + lane
                                        ]
                                continue
                            most = limits[
                                row_class[oy], column_class[min(ox + p, out.shape[2] - 1)], (vector + v) * LANES :
                            ]
                            to = out[image, oy, ox + p, (vector + v) * LANES // 8 :] if inside else spare
                            _at_most(counts[(p * wide + v) * LANES :].ctypes.data, most.ctypes.data, to.ctypes.data)
                    vector += wide


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator, unused-ignore]
def pool_bits(x, kernel, stride, out):  # type: ignore[no-untyped-def]
    """Take the maximum of signs, which is the or of bits: x (N, H, W, bytes), padded with 0, -> out."""
    for image in range(out.shape[0]):
        for oy in range(out.shape[1]):
            for ox in range(out.shape[2]):
                for b in range(out.shape[3]):
                    value = x[image, oy * stride[0], ox * stride[1], b]
                    for i in range(kernel[0]):
                        for j in range(kernel[1]):
                            value |= x[image, oy * stride[0] + i, ox * stride[1] + j, b]
                    out[image, oy, ox, b] = value


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator, unused-ignore]
def shuffle_bits(x, groups, channels, out):  # type: ignore[no-untyped-def]
    """Shuffle the channels of bits: x (pixels, bytes) -> out (pixels, bytes), zero before."""
    each = channels // groups
    for pixel in range(x.shape[0]):
        for channel in range(channels):
            source = (channel % groups) * each + channel // groups
            bit = (x[pixel, source >> 3] >> (source & 7)) & 1
            out[pixel, channel >> 3] |= bit << (channel & 7)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator, unused-ignore]
def pack_signs(x, out):  # type: ignore[no-untyped-def]
    """Store x >= 0 as bits: x (pixels, C) float32 -> out (pixels, bytes) uint8."""
    for pixel in range(x.shape[0]):
        for b in range((x.shape[1] + 7) // 8):
            byte = 0
            for bit in range(min(8, x.shape[1] - 8 * b)):
                byte |= (x[pixel, 8 * b + bit] >= 0) << bit
            out[pixel, b] = byte
