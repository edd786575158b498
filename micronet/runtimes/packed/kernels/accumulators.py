"""How the products of a block of pixels and channels are summed in registers, by what the processor has.

A turn reads so many bytes of each pixel, and its weights once for all pixels. Sums of fewer than 32 bits are widened
before they could overflow. Of signs x and weights w the sum of K products is K - 2 m, m the number of bits that differ.
"""

from typing import Any

from llvmlite import ir

from micronet.runtimes.packed.kernels.cpu import (
    F32,
    I8,
    I16,
    I32,
    I64,
    INTS,
    LANES,
    NIBBLES,
    REALS,
    WAY,
    call,
    load,
    shuffled,
    spread,
)

BYTES, WORDS, HALF = ir.VectorType(I8, 32), ir.VectorType(I16, 16), ir.VectorType(I32, 8)  # of 256 bits
WIDE = ir.VectorType(I32, 32)

IN_REGISTERS = 2 if NIBBLES == 2 else 3  # vectors of a turn's weights of bits


class Sum:
    """Sums of 32 bits: one vector of LANES for each pixel and each of ``vectors``.

    held, turn: what is read of a pixel at once, and its bytes. lanes, parts: the type of the vectors that a pixel's
    sums lie in, and their number. row: bytes of weights of a turn. Limits to compare sums with lie as sums do.
    """

    held: Any = I32
    turn = 4
    lanes: Any = INTS
    wide: Any = None  # the type that the sums are widened to, ``spread_over`` vectors of it for each of theirs
    spread_over = 1

    def __init__(self, vectors: int) -> None:
        self.vectors = self.parts = vectors
        self.row = vectors * LANES * 4

    def add(self, builder: Any, places: list[Any], weights: Any, table: Any, sums: list[list[Any]]) -> list[list[Any]]:
        """Return each pixel's sums with the products of what lies at its place and the weights at an address."""
        own = [load(builder, self.lanes, weights, vector * LANES * 4) for vector in range(self.vectors)]
        found = []
        for place, before in zip(places, sums, strict=True):
            same = spread(builder, load(builder, self.held, place), LANES)
            found.append([self._grown(builder, *each, same) for each in zip(before, own, strict=True)])
        return found

    def _grown(self, builder: Any, total: Any, weight: Any, x: Any) -> Any:
        raise NotImplementedError

    def widen(self, builder: Any, total: Any) -> list[Any]:
        """Return a vector of narrow sums as vectors of wide ones."""
        raise NotImplementedError

    def whole(self, builder: Any, sums: list[Any]) -> list[Any]:
        """Return a pixel's sums, widened where they are, as vectors of LANES of 32 bits."""
        return sums

    def signs(self, builder: Any, sums: list[Any], limits: Any) -> list[Any]:
        """Return a pixel's signs, a bit a channel, in integers that follow one another. limits: their address."""
        found = []
        for part, total in enumerate(sums):
            kind, size = total.type, 64 if total.type.count == LANES else 32  # bytes
            same = self._compared(builder, total, load(builder, kind, limits, part * size))
            found.append(builder.bitcast(same, ir.IntType(kind.count)))
        return found

    def _compared(self, builder: Any, total: Any, limit: Any) -> Any:
        return builder.icmp_signed(">=", total, limit)


class FloatSum(Sum):
    """Sums of float32."""

    held, lanes = F32, REALS

    def _grown(self, builder: Any, total: Any, weight: Any, x: Any) -> Any:
        return call(builder, "llvm.fmuladd.v16f32", REALS, x, weight, total)

    def _compared(self, builder: Any, total: Any, limit: Any) -> Any:
        return builder.fcmp_ordered(">=", total, limit)


class BitSum(Sum):
    """Numbers of differing bits, 32 signs an item (VPOPCNTD)."""

    def _grown(self, builder: Any, total: Any, weight: Any, x: Any) -> Any:
        return builder.add(total, call(builder, "llvm.ctpop.v16i32", INTS, builder.xor(x, weight)))

    def _compared(self, builder: Any, total: Any, limit: Any) -> Any:
        return builder.icmp_signed("<=", total, limit)


class IntegerSum(Sum):
    """Sums of four products of uint8 and int8 an item (VPDPBUSD, or by what LLVM makes of it)."""

    def _grown(self, builder: Any, total: Any, weight: Any, x: Any) -> Any:
        if WAY == "avx512":
            return call(builder, "llvm.x86.avx512.vpdpbusd.512", INTS, total, x, weight)
        low, top = ir.Constant(INTS, [255] * LANES), ir.Constant(INTS, [24] * LANES)
        for byte in range(4):
            up, down = (ir.Constant(INTS, [shift] * LANES) for shift in (24 - 8 * byte, 8 * byte))
            own = builder.ashr(builder.shl(weight, up), top)
            total = builder.add(total, builder.mul(builder.and_(builder.lshr(x, down), low), own))
        return total


class WordSum(Sum):
    """The same on AVX2: two products of 16 bits a lane (VPMADDWD), of the even and of the odd bytes."""

    lanes = HALF

    def __init__(self, vectors: int) -> None:
        super().__init__(vectors)
        self.parts = 2 * vectors

    def add(self, builder: Any, places: list[Any], weights: Any, table: Any, sums: list[list[Any]]) -> list[list[Any]]:
        """Return each pixel's sums with the products of what lies at its place and the weights at an address."""
        eight = ir.Constant(WORDS, [8] * 16)
        own = []
        for part in range(self.parts):
            both = load(builder, WORDS, weights, part * 32)
            own.append((builder.ashr(builder.shl(both, eight), eight), builder.ashr(both, eight)))
        found = []
        for place, before in zip(places, sums, strict=True):
            both = builder.bitcast(spread(builder, load(builder, I32, place), 8), WORDS)
            sides = builder.and_(both, ir.Constant(WORDS, [255] * 16)), builder.lshr(both, eight)
            grown = []
            for total, mine in zip(before, own, strict=True):
                for x, weight in zip(sides, mine, strict=True):
                    total = builder.add(total, call(builder, "llvm.x86.avx2.pmadd.wd", HALF, x, weight))
                grown.append(total)
            found.append(grown)
        return found

    def whole(self, builder: Any, sums: list[Any]) -> list[Any]:
        """Return a pixel's sums as vectors of LANES of 32 bits."""
        return [shuffled(builder, sums[part], sums[part + 1], range(LANES)) for part in range(0, self.parts, 2)]


class PairSum(WordSum):
    """The same for small weights: sums of 16 bits of two products of bytes (VPMADDUBSW)."""

    lanes, wide = WORDS, HALF

    def add(self, builder: Any, places: list[Any], weights: Any, table: Any, sums: list[list[Any]]) -> list[list[Any]]:
        """Return each pixel's sums with the products of what lies at its place and the weights at an address."""
        own = [load(builder, BYTES, weights, part * 32) for part in range(self.parts)]
        found = []
        for place, before in zip(places, sums, strict=True):
            same = builder.bitcast(spread(builder, load(builder, I32, place), 8), BYTES)
            found.append([
                builder.add(total, call(builder, "llvm.x86.avx2.pmadd.ub.sw", WORDS, same, weight))
                for total, weight in zip(before, own, strict=True)
            ])  # fmt: skip
        return found

    def widen(self, builder: Any, total: Any) -> list[Any]:
        """Return a vector of narrow sums as vectors of wide ones."""
        return [call(builder, "llvm.x86.avx2.pmadd.wd", HALF, total, ir.Constant(WORDS, [1] * 16))]


class FewSum(Sum):
    """Numbers of differing bits, at most 255 of them, eight signs a turn, 32 channels a vector of 8 bits.

    On AVX2 by weights as nibbles, looked up (VPSHUFB) in the table of differences that the pixel's byte selects: 128
    products in two instructions. Else by population counts. Limits lie as ``layout.below`` has them.
    """

    turn = 1
    lanes = BYTES

    def __init__(self, vectors: int) -> None:
        super().__init__(vectors)
        self.parts = vectors // 2
        self.row = self.parts * 32 * NIBBLES

    def add(self, builder: Any, places: list[Any], weights: Any, table: Any, sums: list[list[Any]]) -> list[list[Any]]:
        """Return each pixel's sums with the bits added in which its byte differs from the weights at an address."""
        for half in range(NIBBLES):
            rows = [(half * self.parts + part) * 32 for part in range(self.parts)]
            own = [load(builder, BYTES, weights, row) for row in rows[:IN_REGISTERS]]
            grown = []
            for place, before in zip(places, sums, strict=True):
                value = load(builder, I8, place)
                if NIBBLES == 2:
                    known = builder.add(table, builder.mul(builder.zext(value, I64), ir.Constant(I64, 32)))
                    loaded = load(builder, ir.VectorType(I8, 16), known, half * 16)
                    both = shuffled(builder, loaded, loaded, [*range(16), *range(16)])
                    counts = [call(builder, "llvm.x86.avx2.pshuf.b", BYTES, both, weight) for weight in own]
                    counts += [_looked_up(builder, both, weights, row) for row in rows[IN_REGISTERS:]]
                else:
                    same = spread(builder, value, 32)
                    counts = [call(builder, "llvm.ctpop.v32i8", BYTES, builder.xor(same, weight)) for weight in own]
                grown.append([builder.add(*each) for each in zip(before, counts, strict=True)])
            sums = grown
        return sums

    def whole(self, builder: Any, sums: list[Any]) -> list[Any]:
        """Return a pixel's counts as vectors of LANES of 32 bits."""
        return _in_lanes(builder, [builder.zext(total, WIDE) for total in sums])

    def _compared(self, builder: Any, total: Any, limit: Any) -> Any:
        return builder.icmp_unsigned("<", total, limit)


class ManySum(FewSum):
    """Numbers of differing bits, widened to 16 bits every 31 bytes: the even channels' and the odd ones'."""

    wide, spread_over = WORDS, 2

    def widen(self, builder: Any, total: Any) -> list[Any]:
        """Return a vector of counts as the even channels' and the odd ones', 16 bits each."""
        both = builder.bitcast(total, WORDS)
        return [
            builder.and_(both, ir.Constant(WORDS, [255] * 16)),
            builder.lshr(both, ir.Constant(WORDS, [8] * 16)),
        ]

    def whole(self, builder: Any, sums: list[Any]) -> list[Any]:
        """Return a pixel's counts as vectors of LANES of 32 bits."""
        in_order = [16 * (channel % 2) + channel // 2 for channel in range(32)]
        pairs = [shuffled(builder, sums[part], sums[part + 1], in_order) for part in range(0, len(sums), 2)]
        return _in_lanes(builder, [builder.zext(pair, WIDE) for pair in pairs])

    def signs(self, builder: Any, sums: list[Any], limits: Any) -> list[Any]:
        """Return a pixel's signs: 1 where fewer bits differ than the limit."""
        found = []
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
            found.append(builder.bitcast(builder.icmp_signed("<", channels, ir.Constant(BYTES, [0] * 32)), I32))
        return found


def _in_lanes(builder: Any, sums: list[Any]) -> list[Any]:
    """Return vectors of 32 integers as twice as many of LANES."""
    return [shuffled(builder, total, total, range(first, first + LANES)) for total in sums for first in (0, LANES)]


def _looked_up(builder: Any, table: Any, weights: Any, row: int) -> Any:
    """Return what a table of 16 bytes has for nibbles that stay in memory: LLVM would rather spill sums than load."""
    kind = ir.FunctionType(BYTES, [BYTES, I64])
    return builder.asm(kind, f"vpshufb {row}($2), $1, $0", "=x,x,r", [table, weights], side_effect=False)
