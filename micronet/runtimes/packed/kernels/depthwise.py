"""The inner loops of depthwise convolutions of integers: each channel has its own sum of a few products."""

from typing import Any

from llvmlite import ir
from numba import types

from micronet.runtimes.packed.kernels.cpu import BLOCK_PIXELS, LANES
from micronet.runtimes.packed.kernels.llvm import I8, I64, INT_VECTOR, VECTOR_BYTES, Builder, make_intrinsic, splat


def _emit_depthwise(
    builder: Builder, x: Any, x_step: Any, columns: Any, runs: Any, taps: Any, weights: Any, vectors: Any, sums: Any
) -> None:
    with builder.loop(vectors) as vector:
        own_weights = builder.at(weights, builder.mul(vector, taps), VECTOR_BYTES)
        own_x, own_sums = builder.at(x, vector, LANES), builder.at(sums, vector, VECTOR_BYTES)
        with builder.loop_blocks(columns, BLOCK_PIXELS) as column:
            totals = [builder.variable(splat(INT_VECTOR, 0)) for _ in range(BLOCK_PIXELS)]
            first = builder.at(own_x, column, x_step)
            with builder.loop(taps) as tap:
                place = builder.add(first, builder.read(I64, builder.at(runs, tap, 8)))
                weight = builder.read(INT_VECTOR, builder.at(own_weights, tap, VECTOR_BYTES))
                for pixel, total in enumerate(totals):
                    values = builder.read(ir.VectorType(I8, LANES), builder.at(place, x_step, pixel))
                    product = builder.mul(builder.zext(values, INT_VECTOR), weight)
                    builder.store(builder.add(builder.load(total), product), total)
            row = builder.at(own_sums, builder.mul(column, vectors), VECTOR_BYTES)
            for pixel, total in enumerate(totals):
                builder.write(builder.load(total), builder.at(row, vectors, pixel * VECTOR_BYTES))


# (x, x_step, columns, runs, taps, weights, vectors, sums), as in ``convolution.Arguments``, but ``runs`` are offsets of
# single pixels, and weights int32 by vector, tap and lane: write sums (pixels, vectors, LANES)
accumulate_depthwise = make_intrinsic(types.void, [types.intp] * 8, _emit_depthwise)
