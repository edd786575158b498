"""Small intrinsics: signs of floats, bit deposits, and a barrier for threads."""

import os
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from micronet.runtimes.packed.kernels.cpu import LANES
from micronet.runtimes.packed.kernels.llvm import FLOAT_VECTOR, I16, I32, I64, call, load, make_intrinsic, store


def _emit_sign_bits(builder: Any, values: Any) -> Any:
    """Return one bit for each of the 16 floats at an address: 1 if it is at least 0."""
    positive = builder.fcmp_ordered(">=", load(builder, FLOAT_VECTOR, values), ir.Constant(FLOAT_VECTOR, [0.0] * LANES))
    return builder.zext(builder.bitcast(positive, I16), I64)


def _emit_deposit_bits(builder: Any, address: Any, shift: Any, mask: Any) -> Any:
    """Shift the 64 bits at an address right and deposit them at the ones of a mask (PDEP)."""
    return call(builder, "llvm.x86.bmi.pdep.64", I64, builder.lshr(load(builder, I64, address), shift), mask)


def _emit_atomic_add(builder: Any, counter: Any, amount: Any) -> Any:
    """Add to the int64 at an address, which threads share, and return its earlier value."""
    return builder.atomic_rmw("add", builder.inttoptr(counter, I64.as_pointer()), amount, "seq_cst")


def _emit_yield(builder: Any) -> None:
    """Offer the core to another thread, if the operating system can do that."""
    if os.name == "posix":
        untyped: Any = cgutils
        function = untyped.get_or_insert_function(builder.module, ir.FunctionType(I32, []), "sched_yield")
        builder.call(function, [])


sign_bits = make_intrinsic(types.intp, [types.intp], _emit_sign_bits)
deposit_bits = make_intrinsic(types.int64, [types.intp, types.int64, types.int64], _emit_deposit_bits)
store_word = make_intrinsic(types.void, [types.int64, types.intp], store)
atomic_add = make_intrinsic(types.intp, [types.intp] * 2, _emit_atomic_add)
yield_core = make_intrinsic(types.void, [], _emit_yield)
