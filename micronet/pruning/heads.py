"""Attention on channel ids: the channels of a head, in queries, keys and values, are kept or cut as one.

softmax(q k^T) v (Vaswani et al. 2017, arXiv:1706.03762, equation 1) never mixes heads, so a whole head can be cut. Part
of a head cannot: the scale of the scores depends on its width. The scores (..., heads, L, S) of a head carry the id of
the head's first channel.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from micronet.graph import ops
from micronet.models.attention import weigh
from micronet.pruning.ids import FIXED, STRIDE, Ids, ids_along, is_whole_group, varies
from micronet.pruning.traced_network import NodeCall

Widths = Mapping[int, int]  # group -> number of channels
Heads = tuple[Tensor, list[Ids]]  # a call's result, and arrays (heads, d) of channels to cut alike, whole heads at once


def attend_ids(call: NodeCall, widths: Widths) -> Heads | None:
    """Run attention, or one of its two products, on ids. Return None if the heads cannot be identified."""
    if ops.MATMUL.matches(call.node):
        return _multiply(call.tensors[0], call.tensors[1], widths) if len(call.tensors) == 2 else None
    weighs = call.node.target is weigh
    inputs = [
        call.argument(i, name) for i, name in enumerate(["query", "key"] if weighs else ["query", "key", "value"])
    ]
    masks = [x for x in call.tensors if not any(x is tensor for tensor in inputs)]
    if any((mask.dim() > 2 and mask.size(-3) > 1) or bool((mask != FIXED).any()) for mask in masks):
        return None  # one mask per head
    tied = _tied([_head_ids(x) for x in inputs], widths)
    if tied is None:
        return None
    query, key = inputs[:2]
    if weighs:
        return _place(tied[0][:, :1], query, key.size(-2)), tied
    return _place(tied[2], query, tied[2].shape[1]), tied


def _multiply(left: Tensor, right: Tensor, widths: Widths) -> Heads | None:
    """Run the product of queries and keys (..., heads, d, S), or of scores and values, on ids."""
    if left.shape[:-2] != right.shape[:-2] or left.dim() < 3:
        return None
    if varies(left, left.dim() - 1):
        tied = _tied([_head_ids(left), _head_ids(right.transpose(-2, -1))], widths)
        return None if tied is None else (_place(tied[0][:, :1], left, right.size(-1)), tied)
    scores, values = _head_ids(left), _head_ids(right)
    if scores is None or values is None:
        return None
    tied = _tied([scores[:, :1] + np.arange(values.shape[1], dtype=np.int64), values], widths)
    return None if tied is None else (_place(values, left, right.size(-1)), tied)


def _head_ids(x: Tensor) -> Ids | None:
    """Return the ids (heads, d) of x (..., heads, positions, d), or None if they differ along other axes."""
    return None if x.dim() < 3 or 0 in x.shape else ids_along(x, -3, -1)


def _tied(heads: list[Ids | None], widths: Widths) -> list[Ids] | None:
    """Return arrays (heads, d), or None if one is unknown or not exactly one group's, or their shapes differ."""
    whole = [
        ids
        for ids in heads
        if ids is not None and is_whole_group(ids.ravel(), ids.size) and widths[int(ids[0, 0]) // STRIDE] == ids.size
    ]
    return whole if len(whole) == len(heads) and len({ids.shape for ids in whole}) == 1 else None


def _place(ids: Ids, like: Tensor, size: int) -> Tensor:
    """Repeat ids (heads, d or 1) at every position, in the shape of ``like`` with a last axis of ``size``."""
    view = [*[1] * (like.dim() - 3), len(ids), 1, ids.shape[1]]
    return torch.from_numpy(ids.copy()).view(view).expand(*like.shape[:-1], size)
