"""How products are accumulated in registers: one class per instruction set and element type.

An iteration reads a few bytes of each pixel, and the weights once for all pixels. Sums of fewer than 32 bits are
widened before they can overflow. For signs x and weights w, the sum of K products is K - 2 m, with m the number of
differing bits, so binary accumulators only count differing bits.
"""

from typing import Any

from llvmlite import binding, ir

from micronet.runtimes.packed.kernels import cpu
from micronet.runtimes.packed.kernels.llvm import F32, FLOAT_VECTOR, I8, I16, I32, I64, INT_VECTOR, Builder, splat

BYTES, WORDS, HALF = ir.VectorType(I8, 32), ir.VectorType(I16, 16), ir.VectorType(I32, 8)  # 256 bits each
Sums = list[list[Any]]  # vectors by pixel
WEIGHTS_IN_REGISTERS = 2  # vectors of expanded binary weights per iteration


class Accumulator:
    """32-bit sums: one vector of LANES per pixel and per one of ``vectors``.

    load_type, step_bytes: what an iteration reads of a pixel, and how many bytes that is.
    vector_type, vector_bytes, parts: the type, size and number of the vectors that hold a pixel's sums.
    weight_type: the type of a vector of weights. weight_bytes: bytes of weights per iteration.
    wide_type, wide_parts: the type that sums are widened to (None: never), and how many of it per narrow vector.
    comparison: how sums compare with limits, which have the layout of the sums, if the sign is 1.
    """

    load_type: Any = I32
    step_bytes = 4
    vector_type: Any = INT_VECTOR
    vector_bytes = 64
    weight_type: Any = INT_VECTOR
    wide_type: Any = None
    wide_parts = 1
    comparison = ("icmp_signed", ">=")

    def __init__(self, vectors: int) -> None:
        self.vectors = vectors
        self.weight_bytes = vectors * cpu.LANES * 4
        self.parts = self.weight_bytes // self.vector_bytes

    def add(self, builder: Builder, pixels: list[Any], weights: Any, table: Any, sums: Sums) -> Sums:
        """Return each pixel's sums plus the products of its data and the weights, both given by address."""
        rows = [
            builder.read(self.weight_type, builder.at(weights, part, self.vector_bytes)) for part in range(self.parts)
        ]
        results = []
        for pixel, before in zip(pixels, sums, strict=True):
            lanes = builder.broadcast(builder.read(self.load_type, pixel), self.vector_bytes // self.step_bytes)
            x = builder.bitcast(lanes, self.weight_type)
            results.append([self._multiply_add(builder, *pair, x) for pair in zip(before, rows, strict=True)])
        return results

    def _multiply_add(self, builder: Builder, total: Any, weight: Any, x: Any) -> Any:
        raise NotImplementedError

    def widen(self, builder: Builder, total: Any) -> list[Any]:
        """Return a vector of narrow sums as ``wide_parts`` vectors of wide ones."""
        raise NotImplementedError

    def as_int32(self, builder: Builder, sums: list[Any]) -> list[Any]:
        """Return a pixel's sums, already widened, as vectors of LANES 32-bit numbers in channel order."""
        return sums

    def signs(self, builder: Builder, sums: list[Any], limits: Any) -> list[Any]:
        """Return a pixel's signs as consecutive integers, one bit per channel. limits: an address."""
        compare, operator = getattr(builder, self.comparison[0]), self.comparison[1]
        results = []
        for part, total in enumerate(sums):
            positive = compare(operator, total, builder.read(total.type, builder.at(limits, part, self.vector_bytes)))
            results.append(builder.bitcast(positive, ir.IntType(total.type.count)))
        return results


class FloatAccumulator(Accumulator):
    """float32 sums."""

    load_type, vector_type, weight_type = F32, FLOAT_VECTOR, FLOAT_VECTOR
    comparison = ("fcmp_ordered", ">=")

    def _multiply_add(self, builder: Builder, total: Any, weight: Any, x: Any) -> Any:
        return builder.call_intrinsic("llvm.fmuladd.v16f32", FLOAT_VECTOR, x, weight, total)


class IntegerAccumulator(Accumulator):
    """Sums of uint8 x int8, four products per item (VPDPBUSD, or plain multiplications without it)."""

    def _multiply_add(self, builder: Builder, total: Any, weight: Any, x: Any) -> Any:
        if cpu.INSTRUCTION_SET == "avx512":
            return builder.call_intrinsic("llvm.x86.avx512.vpdpbusd.512", INT_VECTOR, total, x, weight)
        for byte in range(4):
            up, down, top = (splat(INT_VECTOR, shift) for shift in (24 - 8 * byte, 8 * byte, 24))
            signed = builder.ashr(builder.shl(weight, up), top)
            total = builder.add(total, builder.mul(builder.and_(builder.lshr(x, down), splat(INT_VECTOR, 255)), signed))
        return total


class MaddAccumulator(Accumulator):
    """The same on AVX2: two 16-bit products per lane (VPMADDWD), of the even and of the odd bytes."""

    vector_type, vector_bytes, weight_type = HALF, 32, WORDS

    def _multiply_add(self, builder: Builder, total: Any, weight: Any, x: Any) -> Any:
        eight = splat(WORDS, 8)
        even = builder.and_(x, splat(WORDS, 255)), builder.ashr(builder.shl(weight, eight), eight)
        odd = builder.lshr(x, eight), builder.ashr(weight, eight)
        for pair in (even, odd):
            total = builder.add(total, builder.call_intrinsic("llvm.x86.avx2.pmadd.wd", HALF, *pair))
        return total

    def as_int32(self, builder: Builder, sums: list[Any]) -> list[Any]:
        """Return a pixel's sums as vectors of LANES 32-bit numbers."""
        return [builder.shuffle(sums[part], sums[part + 1], range(cpu.LANES)) for part in range(0, self.parts, 2)]


class MaddubsAccumulator(MaddAccumulator):
    """The same for small weights: 16-bit sums of two byte products (VPMADDUBSW)."""

    vector_type, weight_type, wide_type = WORDS, BYTES, HALF

    def _multiply_add(self, builder: Builder, total: Any, weight: Any, x: Any) -> Any:
        return builder.add(total, builder.call_intrinsic("llvm.x86.avx2.pmadd.ub.sw", WORDS, x, weight))

    def widen(self, builder: Builder, total: Any) -> list[Any]:
        """Return a vector of narrow sums as ``wide_parts`` vectors of wide ones."""
        return [builder.call_intrinsic("llvm.x86.avx2.pmadd.wd", HALF, total, splat(WORDS, 1))]


class WordPopcountAccumulator(Accumulator):
    """Counts of differing bits, 32 signs per item (VPOPCNTD)."""

    comparison = ("icmp_signed", "<=")

    def _multiply_add(self, builder: Builder, total: Any, weight: Any, x: Any) -> Any:
        name = f"llvm.ctpop.v{total.type.count}i{total.type.element.width}"
        return builder.add(total, builder.call_intrinsic(name, total.type, builder.xor(x, weight)))


class ByteCountAccumulator(WordPopcountAccumulator):
    """Counts of at most 255 differing bits: eight signs per iteration, 32 channels per vector of bytes.

    On AVX2, the pixel's byte selects a row of the difference table, and nibbles of weights are looked up in it
    (VPSHUFB): 128 products in two instructions. Otherwise bits are counted (popcount). ``weight_layout.strict_limits``
    lays out the limits.
    """

    load_type, step_bytes = I8, 1
    vector_type, vector_bytes, weight_type = BYTES, 32, BYTES
    comparison = ("icmp_unsigned", "<")

    def __init__(self, vectors: int) -> None:
        super().__init__(vectors)
        self.parts = vectors // 2
        self.weight_bytes = self.parts * 32 * cpu.WEIGHT_EXPANSION

    def add(self, builder: Builder, pixels: list[Any], weights: Any, table: Any, sums: Sums) -> Sums:
        """Return each pixel's counts plus the bits in which its byte differs from the weights."""
        if cpu.WEIGHT_EXPANSION == 1:
            return super().add(builder, pixels, weights, table, sums)
        for half in range(2):
            rows = [(half * self.parts + part) * 32 for part in range(self.parts)]
            in_registers = [builder.read(BYTES, builder.at(weights, row)) for row in rows[:WEIGHTS_IN_REGISTERS]]
            results = []
            for pixel, before in zip(pixels, sums, strict=True):
                value = builder.zext(builder.read(I8, pixel), I64)
                address = builder.at(table, value, 32)
                entries = builder.read(ir.VectorType(I8, 16), builder.at(address, half, 16))
                both = builder.shuffle(entries, entries, [*range(16), *range(16)])
                counts = [builder.call_intrinsic("llvm.x86.avx2.pshuf.b", BYTES, both, row) for row in in_registers]
                counts += [_look_up(builder, both, weights, row) for row in rows[WEIGHTS_IN_REGISTERS:]]
                results.append([builder.add(*pair) for pair in zip(before, counts, strict=True)])
            sums = results
        return sums

    def as_int32(self, builder: Builder, sums: list[Any]) -> list[Any]:
        """Return a pixel's counts as vectors of LANES 32-bit numbers."""
        halves = [(total, range(first, first + cpu.LANES)) for total in sums for first in (0, cpu.LANES)]
        return [builder.zext(builder.shuffle(total, total, lanes), INT_VECTOR) for total, lanes in halves]


class WidenedByteCountAccumulator(ByteCountAccumulator):
    """Counts of differing bits, widened to 16 bits every 31 bytes into even and odd channels."""

    wide_type, wide_parts = WORDS, 2

    def widen(self, builder: Builder, total: Any) -> list[Any]:
        """Return byte counts as 16-bit counts, those of the even channels first."""
        both = builder.bitcast(total, WORDS)
        return [builder.and_(both, splat(WORDS, 255)), builder.lshr(both, splat(WORDS, 8))]

    def as_int32(self, builder: Builder, sums: list[Any]) -> list[Any]:
        """Return a pixel's counts as vectors of LANES 32-bit numbers."""
        return super().as_int32(builder, _interleave(builder, sums))

    def signs(self, builder: Builder, sums: list[Any], limits: Any) -> list[Any]:
        """Return a pixel's signs: 1 if fewer bits differ than the limit."""
        own_limits = [builder.read(WORDS, builder.at(limits, part, 32)) for part in range(len(sums))]
        below = [builder.icmp_signed("<", *pair) for pair in zip(sums, own_limits, strict=True)]
        return [builder.bitcast(positive, I32) for positive in _interleave(builder, below)]


def _interleave(builder: Builder, halves: list[Any]) -> list[Any]:
    """Return pairs of vectors of 16, one of the even and one of the odd channels, as vectors of 32 in channel order."""
    in_order = [16 * (channel % 2) + channel // 2 for channel in range(32)]
    return [builder.shuffle(*pair, in_order) for pair in zip(halves[::2], halves[1::2], strict=True)]


def _look_up(builder: Builder, table: Any, weights: Any, row: int) -> Any:
    """Look nibbles up in a table of 16 bytes, straight from memory: LLVM would spill sums rather than load again."""
    binding.initialize_native_asmparser()
    kind = ir.FunctionType(BYTES, [BYTES, I64])
    return builder.asm(kind, f"vpshufb {row}($2), $1, $0", "=x,x,r", [table, weights], side_effect=False)


def accumulator_key(arithmetic: int, vectors: int, widen_after: int) -> int:
    """Return the number of the accumulator for an arithmetic, vectors per block, and sums that are widened or not."""
    return arithmetic + 4 * vectors + (32 if widen_after else 0)


def _available() -> dict[int, Accumulator]:
    """Return this processor's accumulators by key."""
    integers = MaddAccumulator if cpu.INSTRUCTION_SET == "avx2" else IntegerAccumulator
    kinds: list[tuple[int, int, type[Accumulator], tuple[int, ...]]]
    if cpu.COUNTS_BYTES:
        kinds = [(cpu.BITS, 0, ByteCountAccumulator, (2, 4, 6)), (cpu.BITS, 1, WidenedByteCountAccumulator, (2, 4, 6)),
                 (cpu.UINT8, 0, integers, (1,)), (cpu.FLOAT32, 0, FloatAccumulator, (1,))]  # fmt: skip
    else:
        kinds = [(cpu.BITS, 0, WordPopcountAccumulator, (1, 2, 4)), (cpu.UINT8, 0, integers, (1, 2, 4)),
                 (cpu.FLOAT32, 0, FloatAccumulator, (1, 2, 4))]  # fmt: skip
    if cpu.INSTRUCTION_SET == "avx2":
        kinds.append((cpu.UINT8, 1, MaddubsAccumulator, (1,)))
    return {
        accumulator_key(arithmetic, vectors, widens): kind(vectors)
        for arithmetic, widens, kind, sizes in kinds
        for vectors in sizes
    }


ACCUMULATORS = _available()
