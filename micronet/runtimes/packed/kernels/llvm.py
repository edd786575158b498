"""LLVM code: a builder with shorthand, numba intrinsics made with it, and the small ones that several kernels share."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import Parameter, Signature
from typing import Any, cast

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from micronet.runtimes.packed.kernels.cpu import LANES

_cgutils: Any = cgutils  # it has no types
I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
INT_VECTOR, FLOAT_VECTOR = ir.VectorType(I32, LANES), ir.VectorType(F32, LANES)
VECTOR_BYTES = 4 * LANES


def splat(kind: Any, value: float) -> Any:
    """Return a constant vector with the same value in every lane."""
    return ir.Constant(kind, [value] * kind.count)


class Builder(ir.IRBuilder):  # type: ignore[misc]
    """llvmlite's builder, with shorthand. Addresses, sizes, indices and counts are int64; Python integers will do."""

    def at(self, address: Any, index: Any, size: Any = 1) -> Any:
        """Return ``address`` plus ``index`` times ``size`` bytes."""
        index, size = (ir.Constant(I64, each) if isinstance(each, int) else each for each in (index, size))
        return self.add(address, self.mul(index, size))

    def read(self, kind: Any, address: Any) -> Any:
        """Load a value of an LLVM type from an address."""
        return self.load(self.inttoptr(address, kind.as_pointer()), align=1)

    def write(self, value: Any, address: Any) -> None:
        """Store a value at an address."""
        self.store(value, self.inttoptr(address, value.type.as_pointer()), align=1)

    def variable(self, value: Any) -> Any:
        """Return a pointer to a new variable with an initial value, for ``load`` and ``store``."""
        return _cgutils.alloca_once_value(self, value)

    def broadcast(self, value: Any, lanes: int) -> Any:
        """Return a vector with the same value in every lane."""
        kind = ir.VectorType(value.type, lanes)
        first = self.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(I32, 0))
        return self.shuffle(first, first, [0] * lanes)

    def shuffle(self, first: Any, second: Any, lanes: Iterable[int]) -> Any:
        """Return the given lanes of two concatenated vectors."""
        chosen = list(lanes)
        return self.shuffle_vector(first, second, ir.Constant(ir.VectorType(I32, len(chosen)), chosen))

    def call_intrinsic(self, name: str, result: Any, *args: Any) -> Any:
        """Call an LLVM intrinsic that returns a value of type ``result``."""
        function = self.module.declare_intrinsic(name, (), ir.FunctionType(result, [arg.type for arg in args]))
        return self.call(function, args)

    @contextmanager
    def loop(self, count: Any, step: int = 1) -> Iterator[Any]:
        """Emit a loop over 0, ``step``, ... below ``count``; yield the index."""
        with _cgutils.for_range_slice(self, ir.Constant(I64, 0), count, ir.Constant(I64, step)) as (index, _):
            yield index

    @contextmanager
    def loop_blocks(self, count: Any, size: int) -> Iterator[Any]:
        """Emit a loop over blocks of ``size`` of ``count`` places; yield a block's first place.

        The last block may overlap the one before. If there are fewer places than a block has, it reads beyond them.
        """
        zero, distance = ir.Constant(I64, 0), self.at(count, -size)
        last = self.select(self.icmp_signed(">", distance, zero), distance, zero)
        with self.loop(self.at(last, size), size) as first:
            yield self.select(self.icmp_signed("<", first, last), first, last)

    def emit_cases(self, value: Any, cases: Mapping[int, Callable[[], None]]) -> None:
        """Emit a switch: the code of the case that equals ``value`` runs."""
        end = self.append_basic_block("end")
        switch = self.switch(value, end)
        for case, emit in cases.items():
            block = self.append_basic_block(f"case{case}")
            switch.add_case(case, block)
            self.position_at_end(block)
            emit()
            self.branch(end)
        self.position_at_end(end)


def make_intrinsic(result: Any, argument_types: Sequence[Any], emit: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function for compiled code whose body is the LLVM code that ``emit(builder, *arguments)`` writes."""

    def typer(context: Any, *arguments: Any) -> Any:
        def codegen(context: Any, numba_builder: Any, signature: Any, values: Any) -> Any:
            builder = Builder(numba_builder.block)
            value = emit(builder, *values)
            numba_builder.position_at_end(builder.block)
            return context.get_dummy_value() if result is types.void else value

        return result(*argument_types), codegen

    names = ["context", *(f"x{index}" for index in range(len(argument_types)))]  # numba needs each argument named
    parameters = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    typer.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    return cast("Callable[..., Any]", intrinsic(typer))


def _emit_sign_bits(builder: Builder, values: Any) -> Any:
    positive = builder.fcmp_ordered(">=", builder.read(FLOAT_VECTOR, values), splat(FLOAT_VECTOR, 0.0))
    return builder.zext(builder.bitcast(positive, I16), I64)


def _emit_deposit_bits(builder: Builder, address: Any, shift: Any, mask: Any) -> Any:
    bits = builder.lshr(builder.read(I64, address), shift)
    return builder.call_intrinsic("llvm.x86.bmi.pdep.64", I64, bits, mask)


def _emit_atomic_add(builder: Builder, counter: Any, amount: Any) -> Any:
    return builder.atomic_rmw("add", builder.inttoptr(counter, I64.as_pointer()), amount, "seq_cst")


def _emit_yield(builder: Builder) -> None:
    if os.name == "posix":
        builder.call(_cgutils.get_or_insert_function(builder.module, ir.FunctionType(I32, []), "sched_yield"), [])


# (address) -> one bit for each of its 16 floats: 1 if it is at least 0
sign_bits = make_intrinsic(types.intp, [types.intp], _emit_sign_bits)
# (address, shift, mask) -> its 64 bits, shifted right, deposited at the ones of the mask (PDEP)
deposit_bits = make_intrinsic(types.int64, [types.intp, types.int64, types.int64], _emit_deposit_bits)
store_word = make_intrinsic(types.void, [types.int64, types.intp], Builder.write)
# (address, amount) -> the earlier value of an int64 that threads share
atomic_add = make_intrinsic(types.intp, [types.intp] * 2, _emit_atomic_add)
# offers the core to another thread, if the operating system can do that
yield_core = make_intrinsic(types.void, [], _emit_yield)
