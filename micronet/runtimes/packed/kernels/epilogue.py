"""What follows a convolution's sums, fused into it: scale, bias, clipping, and rounding to integers."""

from functools import partial
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from micronet.runtimes.packed.kernels.cpu import FLOAT32, LANES, UINT8
from micronet.runtimes.packed.kernels.kernel_cache import jit
from micronet.runtimes.packed.kernels.llvm import (
    FLOAT_VECTOR,
    I8,
    I32,
    I64,
    INT_VECTOR,
    broadcast,
    call,
    load,
    make_intrinsic,
    store,
)


def _kernel(source: Any, out_dtype: int) -> Any:
    """Return the intrinsic that turns sums (pixels, vectors, LANES) into the values of a feature map.

    value = clip((base + factor * sum) * scale + bias, clip_low, clip_high); float32 sums have no base. Then for UINT8:
    round_half_even(clip(value / out_scale, level_low, level_high)) + zero_point. Addresses: sums, scale, bias; base, to
    which a pixel's ``classes`` entry (int32) is added; out, ``out_step`` bytes from one pixel to the next. ``count`` of
    the ``vectors`` of each pixel are processed. ``_emit_epilogue`` has the order of the arguments.
    """
    kinds = [*[types.intp] * 10, types.int32, *[types.float32] * 5, types.int32]
    return make_intrinsic(types.void, kinds, partial(_emit_epilogue, source, out_dtype))


def _emit_epilogue(
    source: Any, out_dtype: int, builder: Any, classes: Any, bases: Any, out: Any, out_step: Any,
    pixels: Any, vectors: Any, count: Any, sums: Any, scale: Any, bias: Any, *constants: Any,
) -> None:  # fmt: skip
    factor, clip_low, clip_high, out_scale, level_low, level_high, zero_point = (
        broadcast(builder, constant, LANES) for constant in constants
    )
    zero, one = ir.Constant(I64, 0), ir.Constant(I64, 1)
    entry = builder.block
    next_pixel, next_vector, end_pixel, end = (
        builder.append_basic_block(name) for name in ("pixel", "vector", "turn", "done")
    )
    builder.branch(next_pixel)

    builder.position_at_end(next_pixel)
    pixel = builder.phi(I64)
    offset = load(builder, I32, builder.add(classes, builder.mul(pixel, ir.Constant(I64, 4))))
    base = builder.add(bases, builder.sext(offset, I64))
    to = builder.add(out, builder.mul(pixel, out_step))
    pixel_sums = builder.add(sums, builder.mul(builder.mul(pixel, vectors), ir.Constant(I64, LANES * 4)))
    builder.branch(next_vector)

    builder.position_at_end(next_vector)
    index = builder.phi(I64)
    at = builder.mul(index, ir.Constant(I64, LANES * 4))
    value = load(builder, source, builder.add(pixel_sums, at))
    if source is INT_VECTOR:
        whole = builder.add(load(builder, INT_VECTOR, builder.add(base, at)), builder.mul(factor, value))
        value = builder.sitofp(whole, FLOAT_VECTOR)
    value = builder.fmul(value, load(builder, FLOAT_VECTOR, builder.add(scale, at)))
    value = builder.fadd(value, load(builder, FLOAT_VECTOR, builder.add(bias, at)))
    value = _clip(builder, value, clip_low, clip_high)
    size = 4
    if out_dtype == UINT8:
        levels = _clip(builder, builder.fdiv(value, out_scale), level_low, level_high)
        rounded = builder.fptosi(call(builder, "llvm.rint.v16f32", FLOAT_VECTOR, levels), INT_VECTOR)
        value, size = builder.trunc(builder.add(rounded, zero_point), ir.VectorType(I8, LANES)), 1
    store(builder, value, builder.add(to, builder.mul(index, ir.Constant(I64, LANES * size))))
    index_after = builder.add(index, one)
    builder.cbranch(builder.icmp_signed("<", index_after, count), next_vector, end_pixel)

    builder.position_at_end(end_pixel)
    pixel_after = builder.add(pixel, one)
    builder.cbranch(builder.icmp_signed("<", pixel_after, pixels), next_pixel, end)
    for phi, start, after, blocks in (
        (pixel, zero, pixel_after, (entry, end_pixel)),
        (index, zero, index_after, (next_pixel, next_vector)),
    ):
        phi.add_incoming(start, blocks[0])
        phi.add_incoming(after, blocks[1])
    builder.position_at_end(end)


def _clip(builder: Any, value: Any, low: Any, high: Any) -> Any:
    for bound, comparison in ((low, ">"), (high, "<")):
        value = builder.select(builder.fcmp_unordered(comparison, value, bound), value, bound)
    return value


_integers_to_floats, _integers_to_uint8 = _kernel(INT_VECTOR, FLOAT32), _kernel(INT_VECTOR, UINT8)
_floats_to_floats, _floats_to_uint8 = _kernel(FLOAT_VECTOR, FLOAT32), _kernel(FLOAT_VECTOR, UINT8)


@jit
def apply_epilogue(step, channel, classes, base, out, pixels, vectors, count, sums, reals):  # type: ignore[no-untyped-def]
    """Turn an instruction's sums into its output, from ``channel`` on; for signs, into the floats before them.

    reals: the address of the float32 constants; see ``_kernel`` for the other arguments.
    """
    arguments = (
        classes, base, out, step.out_pixel, pixels, vectors, count, sums, reals + 4 * (step.scale + channel),
        reals + 4 * (step.bias + channel), np.int32(step.factor), step.clip_low, step.clip_high, step.out_scale,
        step.level_low, step.level_high, np.int32(step.out_zero_point),
    )  # fmt: skip
    if step.out_dtype == UINT8:
        if step.arithmetic == FLOAT32:
            _floats_to_uint8(*arguments)
        else:
            _integers_to_uint8(*arguments)
    elif step.arithmetic == FLOAT32:
        _floats_to_floats(*arguments)
    else:
        _integers_to_floats(*arguments)
