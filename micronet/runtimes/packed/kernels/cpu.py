"""Which instructions this processor has, and the small words in which the compiled steps are written for LLVM.

Three ways, by what the processor has: ``avx512`` (VPOPCNTD, VPDPBUSD), ``avx2``, and ``portable`` for any other.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any, cast

import numpy as np
from llvmlite import binding, ir
from numba import config, njit, types
from numba.extending import intrinsic

from micronet.errors import MicronetError
from micronet.runtimes.packed.kernels.kernel_cache import Kept

LANES = 16  # output channels of a vector
PIXELS = 4  # that share the weights in registers
ITEM = 4  # bytes
BITS, INTEGERS, FLOATS = range(3)  # what a tensor holds
I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
INTS, REALS = ir.VectorType(I32, LANES), ir.VectorType(F32, LANES)


def way() -> str:
    """Return which way this process takes; the variable MICRONET_KERNEL names another one."""
    asked = os.environ.get("MICRONET_KERNEL")
    ways = ["portable"]
    if FEATURES.get("avx2"):
        ways.insert(0, "avx2")
    if all(FEATURES.get(name) for name in ("avx512vpopcntdq", "avx512vnni", "avx512bw")):
        ways.insert(0, "avx512")
    if asked and asked not in ways:
        raise MicronetError(f"MICRONET_KERNEL is {asked!r}; this processor has {', '.join(ways)}")
    return asked or ways[0]


# Where numba is told to compile for another processor, nothing is known of it.
_ELSEWHERE = any(getattr(config, name, None) for name in ("CPU_NAME", "CPU_FEATURES"))
FEATURES: Mapping[str, bool] = {} if _ELSEWHERE else binding.get_host_cpu_features()
WAY = way()
BYTEWISE = WAY != "avx512"  # bits are counted by the byte
NIBBLES = 2 if WAY == "avx2" else 1  # bytes in memory of eight weights
FEWEST = 2 if BYTEWISE else 1  # vectors a block of binary weights is a multiple of
MOST_BITS, MOST = (6, 1) if BYTEWISE else (4, 4)  # vectors that the registers hold, of bits and of others
PAIRS = WAY == "avx2"  # small integers have a way of their own
DEPOSITS = bool(FEATURES.get("bmi2")) and WAY != "portable"
TABLE = np.array(
    [[bin(i ^ half).count("1") for half in (byte & 15, byte >> 4) for i in range(16)] for byte in range(256)], np.uint8
)

binding.initialize_native_asmparser()


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function without Python in it; kept on the disk, but for a way that is not this processor's own."""
    cache = "MICRONET_KERNEL" not in os.environ
    made = cast("Callable[..., Any]", njit(nogil=True, error_model="numpy", cache=cache)(function))
    store: Any = getattr(made, "_cache", None)
    if hasattr(store, "_cache_file"):  # numba's own looks at one file, but compiles in what that file imports
        store._cache_file = Kept(Path(store.cache_path), f"{function.__module__}.{function.__qualname__}")
    return made


def primitive(result: Any, kinds: Sequence[Any], emit: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function for compiled code, of arguments of these kinds: what ``emit(builder, *arguments)`` writes."""

    def typer(context: Any, *arguments: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            found = emit(builder, *values)
            return context.get_dummy_value() if result is types.void else found

        return result(*kinds), codegen

    names = ["context", *(f"x{number}" for number in range(len(kinds)))]  # numba wants each argument named
    named = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    typer.__signature__ = Signature(named)  # type: ignore[attr-defined]
    return cast("Callable[..., Any]", intrinsic(typer))


def load(builder: Any, kind: Any, address: Any, offset: int = 0) -> Any:
    """Return what lies at an address, so many bytes on."""
    place = builder.add(address, ir.Constant(I64, offset)) if offset else address
    return builder.load(builder.inttoptr(place, kind.as_pointer()), align=1)


def store(builder: Any, value: Any, address: Any, offset: int = 0) -> None:
    """Put a value at an address, so many bytes on."""
    place = builder.add(address, ir.Constant(I64, offset)) if offset else address
    builder.store(value, builder.inttoptr(place, value.type.as_pointer()), align=1)


def spread(builder: Any, value: Any, lanes: int) -> Any:
    """Return a vector that holds one value in every lane."""
    kind = ir.VectorType(value.type, lanes)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(I32, 0))
    return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(I32, lanes), [0] * lanes))


def shuffled(builder: Any, first: Any, second: Any, places: Iterable[int]) -> Any:
    """Return a vector of two vectors' lanes."""
    chosen = list(places)
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(I32, len(chosen)), chosen))


def call(builder: Any, name: str, result: Any, *args: Any) -> Any:
    """Call one of LLVM's own functions."""
    function = builder.module.declare_intrinsic(name, (), ir.FunctionType(result, [arg.type for arg in args]))
    return builder.call(function, args)
