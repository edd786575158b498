"""``cumprod`` as products over masked rows; ONNX has a cumulative sum, but logarithms only of what is positive."""

from collections.abc import Callable
from typing import Any

import onnxscript
import torch


def cumprod_translation(opset: int) -> dict[Any, Callable[..., Any]]:
    """Return how the exporter is to translate ``torch.cumprod``: torch operator -> function.

    Of n values along an axis, n x n are multiplied.
    """
    op = getattr(onnxscript, f"opset{opset}")

    def write(x: Any, dim: int, dtype: int = -1) -> Any:
        """Write the products of the first 1, 2, ..., n values along an axis."""
        rank = len(x.shape)
        order = [*(axis for axis in range(rank) if axis != dim % rank), dim % rank]
        last = op.Constant(value_ints=[-1])
        one = op.Constant(value_int=1)
        count = op.Squeeze(op.Shape(x, start=dim % rank, end=dim % rank + 1))
        steps = op.Range(op.Constant(value_int=0), count, one)
        taken = op.GreaterOrEqual(op.Unsqueeze(steps, last), steps)  # row i takes the values up to i
        rows = op.Unsqueeze(op.Transpose(x, perm=order), op.Constant(value_ints=[-2]))
        products = op.ReduceProd(op.Where(taken, rows, op.CastLike(one, x)), last, keepdims=0)
        return op.Transpose(products, perm=[order.index(axis) for axis in range(rank)])

    return {torch.ops.aten.cumprod.default: write}
