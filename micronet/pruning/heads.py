"""Attention in channel numbers: the queries, keys and values of a head, which go or stay together.

softmax(q k^T) v (Vaswani et al. 2017, arXiv:1706.03762, equation 1) keeps the heads apart, so one can go as a whole. A
part of one cannot, since the scores' scale is of its width. The scores (..., heads, L, S) of a head bear the number of
the head's first channel.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from micronet.models.attention import weigh
from micronet.pruning.numbering import FIXED, STRIDE, Ids
from micronet.pruning.operations import MATRIX_CALLS
from micronet.pruning.step import Step, is_whole_group, varies

Widths = Mapping[int, int]


class Heads(NamedTuple):
    """``numbers`` of a call's result, and the (heads, d) channels that must be cut alike, whole heads at a time."""

    numbers: Tensor
    tied: list[Ids]


def follow_heads(step: Step, widths: Widths) -> Heads | None:
    """Run a call that is attention, or one of its two products; None where its heads cannot be followed.

    ``widths``: channels of each group.
    """
    target = step.node.target
    if target in MATRIX_CALLS or step.node.op == "call_method":
        return _multiply(step.numbers[0], step.numbers[1], widths) if len(step.numbers) == 2 else None
    tensors = [step.argument(0, "query"), step.argument(1, "key")]
    tensors += [] if target is weigh else [step.argument(2, "value")]
    masks = [x for x in step.numbers if not any(x is tensor for tensor in tensors)]
    if any((mask.dim() > 2 and mask.size(-3) > 1) or bool((mask != FIXED).any()) for mask in masks):
        return None  # a mask for each head
    tied = [_heads(x, widths) for x in tensors]
    q, k = tensors[:2]
    found = _checked(tied)
    if found is None:
        return None
    numbers = _placed(found[0][:, :1], q, k.size(-2)) if target is weigh else _placed(found[2], q, found[2].shape[1])
    return Heads(numbers, found)


def _multiply(left: Tensor, right: Tensor, widths: Widths) -> Heads | None:
    """Follow the product of queries and keys (..., heads, d, S), or of scores and values."""
    if left.shape[:-2] != right.shape[:-2] or left.dim() < 3:
        return None
    if varies(left, -1 % left.dim()):
        found = _checked([_heads(left, widths), _heads(right.transpose(-2, -1), widths)])
        return None if found is None else Heads(_placed(found[0][:, :1], left, right.size(-1)), found)
    values = _heads(right, widths)
    found = None if values is None else _checked([_heads_of_scores(left, values.shape[1], widths), values])
    return None if found is None else Heads(_placed(found[1], left, right.size(-1)), found)


def _heads(x: Tensor, widths: Widths) -> Ids | None:
    """Return the (heads, d) numbers of x (..., heads, positions, d); None where they are not one whole group's."""
    ids = _table(x)
    return ids if ids is not None and _is_whole(ids, widths) else None


def _heads_of_scores(x: Tensor, d: int, widths: Widths) -> Ids | None:
    """Return the (heads, d) numbers of the heads that scores (..., heads, L, S) are of; None as ``_heads``."""
    table = _table(x)
    if table is None or FIXED in table or bool((table != table[:, :1]).any()):
        return None
    ids: Ids = table[:, :1] + np.arange(d, dtype=np.int64)
    return ids if _is_whole(ids, widths) else None


def _checked(tied: list[Ids | None]) -> list[Ids] | None:
    """Return the heads of several tensors where all are known and of one shape."""
    known = [ids for ids in tied if ids is not None]
    return known if len(known) == len(tied) and len({ids.shape for ids in known}) == 1 else None


def _table(x: Tensor) -> Ids | None:
    """Return the numbers (heads, d) of x (..., heads, positions, d); None where they differ along other axes."""
    ends = x.dim() - 3, x.dim() - 1
    others = [axis for axis in range(x.dim()) if axis not in ends]
    if x.dim() < 3 or 0 in x.shape or any(varies(x, axis) for axis in others):
        return None
    for axis in others:
        x = x.narrow(axis, 0, 1)
    table: Ids = x.reshape(x.size(-3), x.size(-1)).numpy().copy()
    return table


def _is_whole(ids: Ids, widths: Widths) -> bool:
    return is_whole_group(ids.ravel(), ids.size) and widths[int(ids[0, 0]) // STRIDE] == ids.size


def _placed(ids: Ids, like: Tensor, size: int) -> Tensor:
    """Return numbers (heads, d or 1) at every position, in the shape of ``like`` with a last axis of ``size``."""
    along = [*[1] * (like.dim() - 3), len(ids), 1, ids.shape[1]]
    return torch.from_numpy(ids.copy()).view(along).expand(*like.shape[:-1], size)
