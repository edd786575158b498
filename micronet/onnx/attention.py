"""``scaled_dot_product_attention`` as products and a softmax, for the calls that torch's exporter cannot write.

It refuses tensors that do not have four axes, and at opset 23 keys of one head for queries of several. Of a negative
scale it takes the root, and where a mask hides all keys from a query, it computes NaN or their mean instead of zeros. A
mask that hides some keys in the example may hide all of them from a query of another input.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxscript
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

FOUR_AXES, HEADS = 4, -3  # (batch, heads, positions, channels)


class UnusualAttention(TorchFunctionMode):
    """A context that finds calls of attention that torch's exporter cannot write: ``found``."""

    found = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch, and look at its arguments if it is attention."""
        if func is F.scaled_dot_product_attention:
            self.found |= _is_unusual(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _is_unusual(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> bool:  # fmt: skip
    if any(each.dim() != FOUR_AXES for each in (query, key, value)) or (scale is not None and scale < 0):
        return True
    if query.shape[HEADS] != key.shape[HEADS] and not enable_gqa:
        return True
    if attn_mask is None:
        return False
    return attn_mask.dtype == torch.bool or bool((attn_mask == -torch.inf).any())


def attention_translation(opset: int) -> dict[Any, Callable[..., Any]]:
    """Return how the exporter is to translate every attention of a network: torch operator -> function."""
    op = getattr(onnxscript, f"opset{opset}")

    def write(
        query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
        scale: float | None = None, enable_gqa: bool = False,
    ) -> Any:  # fmt: skip
        """Write softmax(scale * query @ key^T + mask) @ value; see torch's documentation of the function."""
        rank, factor = len(key.shape), query.shape[-1] ** -0.5 if scale is None else scale
        mask = _causal(op, query, key) if is_causal else attn_mask
        chooses = is_causal or (mask is not None and mask.dtype == ir.DataType.BOOL)  # otherwise it is added
        if enable_gqa:
            key, value = (_with_heads(op, each, query.shape[HEADS]) for each in (key, value))
        turned = op.Transpose(key, perm=[*range(rank - 2), rank - 1, rank - 2])
        scores = op.MatMul(op.Mul(query, op.CastLike(op.Constant(value_float=factor), query)), turned)
        if chooses:
            scores = op.Where(mask, scores, op.CastLike(op.Constant(value_float=-np.inf), query))
        elif mask is not None:
            scores = op.Add(scores, mask)
        weights = op.Softmax(scores, axis=-1)
        if mask is not None:
            zero = op.CastLike(op.Constant(value_float=0.0), query)
            weights = op.Where(mask, weights, zero) if chooses else op.Where(op.IsNaN(weights), zero, weights)
        return op.MatMul(weights, value)

    return {torch.ops.aten.scaled_dot_product_attention.default: write}


def _with_heads(op: Any, x: Any, heads: int) -> Any:
    """Return keys or values, each head repeated until there are as many as queries have (grouped-query attention)."""
    rank, shape = len(x.shape), op.Shape(x)
    repeated = op.Tile(
        op.Unsqueeze(x, op.Constant(value_ints=[rank - 2])),
        op.Constant(value_ints=[*[1] * (rank - 2), heads // x.shape[HEADS], 1, 1]),
    )
    ends = (op.Constant(value_ints=[0]), op.Constant(value_ints=[HEADS])), (
        op.Constant(value_ints=[-2]), op.Constant(value_ints=[rank]),
    )  # fmt: skip
    before, after = (op.Slice(shape, *each) for each in ends)
    return op.Reshape(repeated, op.Concat(before, op.Constant(value_ints=[heads]), after, axis=0))


def _causal(op: Any, query: Any, key: Any) -> Any:
    """Return which keys (queries, keys) a query may see: those at its own position and before it."""
    sizes = [op.Shape(each, start=-2, end=-1) for each in (query, key)]
    ones = op.ConstantOfShape(op.Concat(*sizes, axis=0), value=ir.tensor(np.ones(1, np.int64)))
    return op.Cast(op.Trilu(ones, upper=0), to=ir.DataType.BOOL)
