"""Attention on channel ids: the channels of a head, in queries, keys and values, are kept or cut as one.

softmax(q k^T) v (Vaswani et al. 2017, arXiv:1706.03762, equation 1) never mixes heads, so a whole head can be cut. Part
of a head cannot: the scale of the scores depends on its width. The scores (..., heads, L, S) of a head carry the id of
the head's first channel.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from micronet.graph import ops
from micronet.models.attention import weigh
from micronet.pruning.ids import FIXED, STRIDE, Ids, is_whole_group, varies
from micronet.pruning.node_call import NodeCall

Widths = Mapping[int, int]  # group -> number of channels


class Heads(NamedTuple):
    """The ids of a call's result, and the arrays (heads, d) of channels that must be cut alike, whole heads at once."""

    ids: Tensor
    tied: list[Ids]


def attend_ids(call: NodeCall, widths: Widths) -> Heads | None:
    """Run attention, or one of its two products, on ids. Return None if the heads cannot be identified."""
    target = call.node.target
    if ops.MATMUL.matches(call.node):
        return _multiply(call.tensors[0], call.tensors[1], widths) if len(call.tensors) == 2 else None
    inputs = [call.argument(0, "query"), call.argument(1, "key")]
    inputs += [] if target is weigh else [call.argument(2, "value")]
    masks = [x for x in call.tensors if not any(x is tensor for tensor in inputs)]
    if any((mask.dim() > 2 and mask.size(-3) > 1) or bool((mask != FIXED).any()) for mask in masks):
        return None  # one mask per head
    tied = _same_shape([_heads(x, widths) for x in inputs])
    if tied is None:
        return None
    q, k = inputs[:2]
    ids = _place(tied[0][:, :1], q, k.size(-2)) if target is weigh else _place(tied[2], q, tied[2].shape[1])
    return Heads(ids, tied)


def _multiply(left: Tensor, right: Tensor, widths: Widths) -> Heads | None:
    """Run the product of queries and keys (..., heads, d, S), or of scores and values, on ids."""
    if left.shape[:-2] != right.shape[:-2] or left.dim() < 3:
        return None
    if varies(left, -1 % left.dim()):
        tied = _same_shape([_heads(left, widths), _heads(right.transpose(-2, -1), widths)])
        return None if tied is None else Heads(_place(tied[0][:, :1], left, right.size(-1)), tied)
    values = _heads(right, widths)
    tied = None if values is None else _same_shape([_heads_of_scores(left, values.shape[1], widths), values])
    return None if tied is None else Heads(_place(tied[1], left, right.size(-1)), tied)


def _heads(x: Tensor, widths: Widths) -> Ids | None:
    """Return the ids (heads, d) of x (..., heads, positions, d), or None if they are not exactly one group's."""
    ids = _table(x)
    return ids if ids is not None and _is_whole(ids, widths) else None


def _heads_of_scores(x: Tensor, d: int, widths: Widths) -> Ids | None:
    """Return the ids (heads, d) of the heads that scores (..., heads, L, S) belong to, or None as in ``_heads``."""
    table = _table(x)
    if table is None or FIXED in table or bool((table != table[:, :1]).any()):
        return None
    ids: Ids = table[:, :1] + np.arange(d, dtype=np.int64)
    return ids if _is_whole(ids, widths) else None


def _same_shape(tied: list[Ids | None]) -> list[Ids] | None:
    """Return the heads of several tensors, or None if one is unknown or their shapes differ."""
    known = [ids for ids in tied if ids is not None]
    return known if len(known) == len(tied) and len({ids.shape for ids in known}) == 1 else None


def _table(x: Tensor) -> Ids | None:
    """Return the ids (heads, d) of x (..., heads, positions, d), or None if they differ along other axes."""
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


def _place(ids: Ids, like: Tensor, size: int) -> Tensor:
    """Repeat ids (heads, d or 1) at every position, in the shape of ``like`` with a last axis of ``size``."""
    view = [*[1] * (like.dim() - 3), len(ids), 1, ids.shape[1]]
    return torch.from_numpy(ids.copy()).view(view).expand(*like.shape[:-1], size)
