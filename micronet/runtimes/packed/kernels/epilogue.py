"""What follows a convolution's sums, fused into it: scale, bias, clipping, and rounding to integers."""

from functools import partial
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from micronet.runtimes.packed.kernels import llvm
from micronet.runtimes.packed.kernels.activation import activate
from micronet.runtimes.packed.kernels.cpu import BITS, FLOAT32, LANES, UINT8
from micronet.runtimes.packed.kernels.kernel_cache import jit

VALUES = 3  # as "arithmetic": not of sums, but of values to which scale and bias have been applied


def _emit_epilogue(builder: llvm.Builder, kind: Any, *arguments: Any) -> None:
    """Emit one loop for each output type and type of sums; ``kind`` is the output type plus 4 times that of sums."""
    cases = {
        out_dtype + 4 * arithmetic: partial(_emit_pixels, out_dtype, source, builder, *arguments)
        for out_dtype in (UINT8, FLOAT32)
        for arithmetic, source in ((UINT8, llvm.INT_VECTOR), (FLOAT32, llvm.FLOAT_VECTOR), (VALUES, None))
    }
    builder.emit_cases(kind, cases)


def _emit_pixels(
    out_dtype: int, source: Any, builder: llvm.Builder, classes: Any, bases: Any, out: Any, out_step: Any, pixels: Any,
    vectors: Any, count: Any, sums: Any, scale: Any, bias: Any, *constants: Any,
) -> None:  # fmt: skip
    """Turn sums (pixels, vectors, LANES) into the values of a feature map.

    value = clip((base + factor * sum) * scale + bias, clip_low, clip_high); float32 sums have no base, and without
    a source, sums are values already. Then for UINT8:
    round_half_even(clip(value / out_scale, level_low, level_high)) + zero_point. Addresses: sums, scale, bias; bases,
    to which a pixel's ``classes`` entry (int32) is added; out, ``out_step`` bytes from one pixel to the next. ``count``
    of the ``vectors`` of each pixel are processed.
    """
    factor, clip_low, clip_high, out_scale, level_low, level_high, zero_point = (
        builder.broadcast(constant, LANES) for constant in constants
    )
    with builder.loop(pixels) as pixel:
        base = builder.add(bases, builder.sext(builder.read(llvm.I32, builder.at(classes, pixel, 4)), llvm.I64))
        row, to = builder.at(sums, builder.mul(pixel, vectors), llvm.VECTOR_BYTES), builder.at(out, pixel, out_step)
        with builder.loop(count) as vector:
            own_sums, own_base, own_scale, own_bias = (
                builder.at(address, vector, llvm.VECTOR_BYTES) for address in (row, base, scale, bias)
            )
            value = builder.read(source or llvm.FLOAT_VECTOR, own_sums)
            if source is llvm.INT_VECTOR:
                whole = builder.add(builder.read(source, own_base), builder.mul(factor, value))
                value = builder.sitofp(whole, llvm.FLOAT_VECTOR)
            if source:
                value = builder.fmul(value, builder.read(llvm.FLOAT_VECTOR, own_scale))
                value = builder.fadd(value, builder.read(llvm.FLOAT_VECTOR, own_bias))
            value, size = _clip(builder, value, clip_low, clip_high), llvm.VECTOR_BYTES
            if out_dtype == UINT8:
                levels = _clip(builder, builder.fdiv(value, out_scale), level_low, level_high)
                rounded = builder.call_intrinsic("llvm.rint.v16f32", llvm.FLOAT_VECTOR, levels)
                whole = builder.add(builder.fptosi(rounded, llvm.INT_VECTOR), zero_point)
                value, size = builder.trunc(whole, ir.VectorType(llvm.I8, LANES)), LANES
            builder.write(value, builder.at(to, vector, size))


def _clip(builder: llvm.Builder, value: Any, low: Any, high: Any) -> Any:
    for bound, comparison in ((low, ">"), (high, "<")):
        value = builder.select(builder.fcmp_unordered(comparison, value, bound), value, bound)
    return value


_epilogue = llvm.make_intrinsic(
    types.void, [*[types.intp] * 11, types.int32, *[types.float32] * 5, types.int32], _emit_epilogue
)


@jit
def apply_epilogue(step, arithmetic, channel, classes, base, out, pixels, vectors, count, sums, reals):  # type: ignore[no-untyped-def]
    """Turn an instruction's sums, or VALUES, into its output, from ``channel`` on; for signs, into the floats before.

    reals: the address of the float32 constants; see ``_emit_pixels`` for the other arguments.
    """
    out_dtype = UINT8 if step.out_dtype == UINT8 else FLOAT32
    source = UINT8 if arithmetic == BITS else arithmetic
    _epilogue(
        out_dtype + 4 * source, classes, base, out, step.out_pixel, pixels, vectors, count, sums,
        reals + 4 * (step.scale + channel), reals + 4 * (step.bias + channel), np.int32(step.factor), step.clip_low,
        step.clip_high, step.out_scale, step.level_low, step.level_high, np.int32(step.out_zero_point),
    )  # fmt: skip


@jit
def apply_activation(step, channel, classes, base, pixels, vectors, sums, reals):  # type: ignore[no-untyped-def]
    """Turn an instruction's sums into values after its activation, in place."""
    source = UINT8 if step.arithmetic == BITS else step.arithmetic
    _epilogue(
        FLOAT32 + 4 * source, classes, base, sums, 4 * vectors * LANES, pixels, vectors, vectors, sums,
        reals + 4 * (step.scale + channel), reals + 4 * (step.bias + channel), np.int32(step.factor),
        np.float32(-np.inf), np.float32(np.inf), np.float32(1), np.float32(0), np.float32(0), np.int32(0),
    )  # fmt: skip
    activate(step.activation, sums, pixels * vectors, step.alpha, step.beta)
