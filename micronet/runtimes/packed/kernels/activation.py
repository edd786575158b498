"""Activation functions on vectors of floats: the expressions of ``packed.activations`` as LLVM code."""

from functools import partial
from typing import Any

from numba import types

from micronet.packed.activations import ACTIVATIONS
from micronet.runtimes.packed.kernels.llvm import (
    FLOAT_VECTOR,
    INT_VECTOR,
    VECTOR_BYTES,
    Builder,
    make_intrinsic,
    splat,
)  # fmt: skip

NUMBERS = {kind: number for number, kind in enumerate(ACTIVATIONS, 1)}  # 0: no activation


class Lanes:
    """A vector of float32 whose operators emit code."""

    def __init__(self, builder: Builder, value: Any) -> None:
        self.builder, self.value = builder, value

    def _emit(self, name: str, first: Any, second: Any) -> "Lanes":
        values = [each.value if isinstance(each, Lanes) else splat(FLOAT_VECTOR, each) for each in (first, second)]
        return Lanes(self.builder, getattr(self.builder, name)(*values))

    def __add__(self, other: Any) -> "Lanes":
        return self._emit("fadd", self, other)

    def __sub__(self, other: Any) -> "Lanes":
        return self._emit("fsub", self, other)

    def __rsub__(self, other: Any) -> "Lanes":
        return self._emit("fsub", other, self)

    def __mul__(self, other: Any) -> "Lanes":
        return self._emit("fmul", self, other)

    def __truediv__(self, other: Any) -> "Lanes":
        return self._emit("fdiv", self, other)

    def __rtruediv__(self, other: Any) -> "Lanes":
        return self._emit("fdiv", other, self)


class LaneArithmetic:
    """``Arithmetic`` on lanes."""

    def clip(self, x: Lanes, low: float, high: float) -> Lanes:
        """Return x between two bounds, which may be infinite; NaN stays NaN."""
        builder, value = x.builder, x.value
        for bound, comparison in ((low, ">"), (high, "<")):
            if abs(bound) != float("inf"):
                limit = splat(FLOAT_VECTOR, bound)
                value = builder.select(builder.fcmp_unordered(comparison, value, limit), value, limit)
        return Lanes(builder, value)

    def round(self, x: Lanes) -> Lanes:
        """Return x rounded half to even."""
        return Lanes(x.builder, x.builder.call_intrinsic("llvm.rint.v16f32", FLOAT_VECTOR, x.value))

    def power_of_two(self, x: Lanes) -> Lanes:
        """Return 2 to the power of x, a whole number from -126 to 127."""
        builder = x.builder
        exponent = builder.add(builder.fptosi(x.value, INT_VECTOR), splat(INT_VECTOR, 127))
        return Lanes(builder, builder.bitcast(builder.shl(exponent, splat(INT_VECTOR, 23)), FLOAT_VECTOR))


def _emit_activate(builder: Builder, kind: Any, *arguments: Any) -> None:
    cases = {NUMBERS[name]: partial(_emit_loop, name, builder, *arguments) for name in ACTIVATIONS}
    builder.emit_cases(kind, cases)


def _emit_loop(name: str, builder: Builder, address: Any, vectors: Any, *constants: Any) -> None:
    alpha, beta = (Lanes(builder, builder.broadcast(constant, FLOAT_VECTOR.count)) for constant in constants)
    with builder.loop(vectors) as index:
        place = builder.at(address, index, VECTOR_BYTES)
        x = Lanes(builder, builder.read(FLOAT_VECTOR, place))
        builder.write(ACTIVATIONS[name](LaneArithmetic(), x, alpha, beta).value, place)


# (number of an activation, address, count, alpha, beta): apply it to vectors of LANES floats in place
activate = make_intrinsic(types.void, [types.intp] * 3 + [types.float32] * 2, _emit_activate)
