"""How products are accumulated in registers: one class per instruction set and element type.

An iteration reads a few bytes of each pixel, and the weights once for all pixels. Sums of fewer than 32 bits are
widened before they can overflow. For signs x and weights w, the sum of K products is K - 2 m, with m the number of
differing bits, so binary accumulators only count differing bits.
"""

from typing import Any

from llvmlite import binding, ir

from micronet.runtimes.packed.kernels.cpu import INSTRUCTION_SET, LANES, WEIGHT_EXPANSION
from micronet.runtimes.packed.kernels.llvm import (
    F32,
    FLOAT_VECTOR,
    I8,
    I16,
    I32,
    I64,
    INT_VECTOR,
    broadcast,
    call,
    load,
    shuffle,
)

BYTES, WORDS, HALF = ir.VectorType(I8, 32), ir.VectorType(I16, 16), ir.VectorType(I32, 8)  # 256 bits each
INT_VECTOR_32 = ir.VectorType(I32, 32)

WEIGHTS_IN_REGISTERS = 2 if WEIGHT_EXPANSION == 2 else 3  # vectors of binary weights per iteration


class Accumulator:
    """32-bit sums: one vector of LANES per pixel and per one of ``vectors``.

    load_type, step_bytes: what an iteration reads of a pixel, and how many bytes that is.
    vector_type, parts: the type and the number of the vectors that hold a pixel's sums.
    wide_type, wide_parts: the type that sums are widened to (None: never), and how many of it per narrow vector.
    weight_bytes: bytes of weights per iteration. The limits that sums are compared with have the layout of the sums.
    """

    load_type: Any = I32
    step_bytes = 4
    vector_type: Any = INT_VECTOR
    wide_type: Any = None
    wide_parts = 1

    def __init__(self, vectors: int) -> None:
        self.vectors = self.parts = vectors
        self.weight_bytes = vectors * LANES * 4

    def add(self, builder: Any, pixels: list[Any], weights: Any, table: Any, sums: list[list[Any]]) -> list[list[Any]]:
        """Return each pixel's sums plus the products of its data and the weights, both given by address."""
        rows = [load(builder, self.vector_type, weights, vector * LANES * 4) for vector in range(self.vectors)]
        results = []
        for pixel, before in zip(pixels, sums, strict=True):
            x = broadcast(builder, load(builder, self.load_type, pixel), LANES)
            results.append([self._multiply_add(builder, *pair, x) for pair in zip(before, rows, strict=True)])
        return results

    def _multiply_add(self, builder: Any, total: Any, weight: Any, x: Any) -> Any:
        raise NotImplementedError

    def widen(self, builder: Any, total: Any) -> list[Any]:
        """Return a vector of narrow sums as ``wide_parts`` vectors of wide ones."""
        raise NotImplementedError

    def as_int32(self, builder: Any, sums: list[Any]) -> list[Any]:
        """Return a pixel's sums, already widened, as vectors of LANES 32-bit numbers in channel order."""
        return sums

    def signs(self, builder: Any, sums: list[Any], limits: Any) -> list[Any]:
        """Return a pixel's signs as consecutive integers, one bit per channel. limits: an address."""
        results = []
        for part, total in enumerate(sums):
            kind, size = total.type, 64 if total.type.count == LANES else 32  # bytes
            positive = self._compare(builder, total, load(builder, kind, limits, part * size))
            results.append(builder.bitcast(positive, ir.IntType(kind.count)))
        return results

    def _compare(self, builder: Any, total: Any, limit: Any) -> Any:
        return builder.icmp_signed(">=", total, limit)


class FloatAccumulator(Accumulator):
    """float32 sums."""

    load_type, vector_type = F32, FLOAT_VECTOR

    def _multiply_add(self, builder: Any, total: Any, weight: Any, x: Any) -> Any:
        return call(builder, "llvm.fmuladd.v16f32", FLOAT_VECTOR, x, weight, total)

    def _compare(self, builder: Any, total: Any, limit: Any) -> Any:
        return builder.fcmp_ordered(">=", total, limit)


class WordPopcountAccumulator(Accumulator):
    """Counts of differing bits, 32 signs per item (VPOPCNTD)."""

    def _multiply_add(self, builder: Any, total: Any, weight: Any, x: Any) -> Any:
        return builder.add(total, call(builder, "llvm.ctpop.v16i32", INT_VECTOR, builder.xor(x, weight)))

    def _compare(self, builder: Any, total: Any, limit: Any) -> Any:
        return builder.icmp_signed("<=", total, limit)


class IntegerAccumulator(Accumulator):
    """Sums of uint8 x int8, four products per item (VPDPBUSD, or plain multiplications without it)."""

    def _multiply_add(self, builder: Any, total: Any, weight: Any, x: Any) -> Any:
        if INSTRUCTION_SET == "avx512":
            return call(builder, "llvm.x86.avx512.vpdpbusd.512", INT_VECTOR, total, x, weight)
        low, top = ir.Constant(INT_VECTOR, [255] * LANES), ir.Constant(INT_VECTOR, [24] * LANES)
        for byte in range(4):
            up, down = (ir.Constant(INT_VECTOR, [shift] * LANES) for shift in (24 - 8 * byte, 8 * byte))
            signed = builder.ashr(builder.shl(weight, up), top)
            total = builder.add(total, builder.mul(builder.and_(builder.lshr(x, down), low), signed))
        return total


class MaddAccumulator(Accumulator):
    """The same on AVX2: two 16-bit products per lane (VPMADDWD), of the even and of the odd bytes."""

    vector_type = HALF

    def __init__(self, vectors: int) -> None:
        super().__init__(vectors)
        self.parts = 2 * vectors

    def add(self, builder: Any, pixels: list[Any], weights: Any, table: Any, sums: list[list[Any]]) -> list[list[Any]]:
        """Return each pixel's sums plus the products of its data and the weights, both given by address."""
        eight = ir.Constant(WORDS, [8] * 16)
        rows = []
        for part in range(self.parts):
            both = load(builder, WORDS, weights, part * 32)
            rows.append((builder.ashr(builder.shl(both, eight), eight), builder.ashr(both, eight)))
        results = []
        for pixel, before in zip(pixels, sums, strict=True):
            both = builder.bitcast(broadcast(builder, load(builder, I32, pixel), 8), WORDS)
            halves = builder.and_(both, ir.Constant(WORDS, [255] * 16)), builder.lshr(both, eight)
            after = []
            for total, row in zip(before, rows, strict=True):
                for x, weight in zip(halves, row, strict=True):
                    total = builder.add(total, call(builder, "llvm.x86.avx2.pmadd.wd", HALF, x, weight))
                after.append(total)
            results.append(after)
        return results

    def as_int32(self, builder: Any, sums: list[Any]) -> list[Any]:
        """Return a pixel's sums as vectors of LANES 32-bit numbers."""
        return [shuffle(builder, sums[part], sums[part + 1], range(LANES)) for part in range(0, self.parts, 2)]


class MaddubsAccumulator(MaddAccumulator):
    """The same for small weights: 16-bit sums of two byte products (VPMADDUBSW)."""

    vector_type, wide_type = WORDS, HALF

    def add(self, builder: Any, pixels: list[Any], weights: Any, table: Any, sums: list[list[Any]]) -> list[list[Any]]:
        """Return each pixel's sums plus the products of its data and the weights, both given by address."""
        rows = [load(builder, BYTES, weights, part * 32) for part in range(self.parts)]
        results = []
        for pixel, before in zip(pixels, sums, strict=True):
            x = builder.bitcast(broadcast(builder, load(builder, I32, pixel), 8), BYTES)
            results.append([
                builder.add(total, call(builder, "llvm.x86.avx2.pmadd.ub.sw", WORDS, x, weight))
                for total, weight in zip(before, rows, strict=True)
            ])  # fmt: skip
        return results

    def widen(self, builder: Any, total: Any) -> list[Any]:
        """Return a vector of narrow sums as ``wide_parts`` vectors of wide ones."""
        return [call(builder, "llvm.x86.avx2.pmadd.wd", HALF, total, ir.Constant(WORDS, [1] * 16))]


class ByteCountAccumulator(Accumulator):
    """Counts of at most 255 differing bits: eight signs per iteration, 32 channels per vector of bytes.

    On AVX2, the pixel's byte selects a row of the difference table, and nibbles of weights are looked up in it
    (VPSHUFB): 128 products in two instructions. Otherwise bits are counted (popcount). ``weight_layout.strict_limits``
    lays out the limits.
    """

    step_bytes = 1
    vector_type = BYTES

    def __init__(self, vectors: int) -> None:
        super().__init__(vectors)
        self.parts = vectors // 2
        self.weight_bytes = self.parts * 32 * WEIGHT_EXPANSION

    def add(self, builder: Any, pixels: list[Any], weights: Any, table: Any, sums: list[list[Any]]) -> list[list[Any]]:
        """Return each pixel's counts plus the bits in which its byte differs from the weights."""
        for half in range(WEIGHT_EXPANSION):
            rows = [(half * self.parts + part) * 32 for part in range(self.parts)]
            in_registers = [load(builder, BYTES, weights, row) for row in rows[:WEIGHTS_IN_REGISTERS]]
            results = []
            for pixel, before in zip(pixels, sums, strict=True):
                value = load(builder, I8, pixel)
                if WEIGHT_EXPANSION == 2:
                    address = builder.add(table, builder.mul(builder.zext(value, I64), ir.Constant(I64, 32)))
                    entries = load(builder, ir.VectorType(I8, 16), address, half * 16)
                    both = shuffle(builder, entries, entries, [*range(16), *range(16)])
                    counts = [call(builder, "llvm.x86.avx2.pshuf.b", BYTES, both, weight) for weight in in_registers]
                    counts += [_look_up(builder, both, weights, row) for row in rows[WEIGHTS_IN_REGISTERS:]]
                else:
                    x = broadcast(builder, value, 32)
                    counts = [call(builder, "llvm.ctpop.v32i8", BYTES, builder.xor(x, w)) for w in in_registers]
                results.append([builder.add(*pair) for pair in zip(before, counts, strict=True)])
            sums = results
        return sums

    def as_int32(self, builder: Any, sums: list[Any]) -> list[Any]:
        """Return a pixel's counts as vectors of LANES 32-bit numbers."""
        return _split_lanes(builder, [builder.zext(total, INT_VECTOR_32) for total in sums])

    def _compare(self, builder: Any, total: Any, limit: Any) -> Any:
        return builder.icmp_unsigned("<", total, limit)


class WidenedByteCountAccumulator(ByteCountAccumulator):
    """Counts of differing bits, widened to 16 bits every 31 bytes into even and odd channels."""

    wide_type, wide_parts = WORDS, 2

    def widen(self, builder: Any, total: Any) -> list[Any]:
        """Return byte counts as 16-bit counts, those of the even channels first."""
        both = builder.bitcast(total, WORDS)
        return [
            builder.and_(both, ir.Constant(WORDS, [255] * 16)),
            builder.lshr(both, ir.Constant(WORDS, [8] * 16)),
        ]

    def as_int32(self, builder: Any, sums: list[Any]) -> list[Any]:
        """Return a pixel's counts as vectors of LANES 32-bit numbers."""
        in_order = [16 * (channel % 2) + channel // 2 for channel in range(32)]
        pairs = [shuffle(builder, sums[part], sums[part + 1], in_order) for part in range(0, len(sums), 2)]
        return _split_lanes(builder, [builder.zext(pair, INT_VECTOR_32) for pair in pairs])

    def signs(self, builder: Any, sums: list[Any], limits: Any) -> list[Any]:
        """Return a pixel's signs: 1 if fewer bits differ than the limit."""
        results = []
        for part in range(0, len(sums), 2):
            even, odd = (
                builder.sext(
                    builder.icmp_signed(">", load(builder, WORDS, limits, (part + side) * 32), sums[part + side]), WORDS
                )
                for side in (0, 1)
            )
            channels = builder.select(
                ir.Constant(ir.VectorType(ir.IntType(1), 32), [0, 1] * 16),
                builder.bitcast(odd, BYTES),
                builder.bitcast(even, BYTES),
            )
            results.append(builder.bitcast(builder.icmp_signed("<", channels, ir.Constant(BYTES, [0] * 32)), I32))
        return results


def _split_lanes(builder: Any, sums: list[Any]) -> list[Any]:
    """Return vectors of 32 integers as twice as many vectors of LANES."""
    return [shuffle(builder, total, total, range(first, first + LANES)) for total in sums for first in (0, LANES)]


def _look_up(builder: Any, table: Any, weights: Any, row: int) -> Any:
    """Look nibbles up in a table of 16 bytes, straight from memory: LLVM would spill sums rather than load again."""
    binding.initialize_native_asmparser()
    kind = ir.FunctionType(BYTES, [BYTES, I64])
    return builder.asm(kind, f"vpshufb {row}($2), $1, $0", "=x,x,r", [table, weights], side_effect=False)
