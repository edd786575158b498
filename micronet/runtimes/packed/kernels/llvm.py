"""Shorthand for LLVM code, and numba intrinsics made from it."""

from collections.abc import Callable, Iterable, Sequence
from inspect import Parameter, Signature
from typing import Any, cast

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from micronet.runtimes.packed.kernels.cpu import LANES

I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
INT_VECTOR, FLOAT_VECTOR = ir.VectorType(I32, LANES), ir.VectorType(F32, LANES)


def make_intrinsic(result: Any, argument_types: Sequence[Any], emit: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function for compiled code whose body is the LLVM code that ``emit(builder, *arguments)`` writes."""

    def typer(context: Any, *arguments: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            value = emit(builder, *values)
            return context.get_dummy_value() if result is types.void else value

        return result(*argument_types), codegen

    names = ["context", *(f"x{number}" for number in range(len(argument_types)))]  # numba needs each argument named
    parameters = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    typer.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    return cast("Callable[..., Any]", intrinsic(typer))


def load(builder: Any, kind: Any, address: Any, offset: int = 0) -> Any:
    """Load a value of an LLVM type from ``address`` plus ``offset`` bytes."""
    place = builder.add(address, ir.Constant(I64, offset)) if offset else address
    return builder.load(builder.inttoptr(place, kind.as_pointer()), align=1)


def store(builder: Any, value: Any, address: Any, offset: int = 0) -> None:
    """Store a value at ``address`` plus ``offset`` bytes."""
    place = builder.add(address, ir.Constant(I64, offset)) if offset else address
    builder.store(value, builder.inttoptr(place, value.type.as_pointer()), align=1)


def broadcast(builder: Any, value: Any, lanes: int) -> Any:
    """Return a vector with the same value in every lane."""
    kind = ir.VectorType(value.type, lanes)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(I32, 0))
    return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(I32, lanes), [0] * lanes))


def shuffle(builder: Any, first: Any, second: Any, lanes: Iterable[int]) -> Any:
    """Return the given lanes of two concatenated vectors."""
    chosen = list(lanes)
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(I32, len(chosen)), chosen))


def call(builder: Any, name: str, result: Any, *args: Any) -> Any:
    """Call an LLVM intrinsic."""
    function = builder.module.declare_intrinsic(name, (), ir.FunctionType(result, [arg.type for arg in args]))
    return builder.call(function, args)
