"""Attention on channel ids: the channels of a head, in queries, keys and values, are kept or cut as one.

softmax(q k^T) v (Vaswani et al. 2017, arXiv:1706.03762, equation 1) never mixes heads, so a whole head can be cut. Part
of a head cannot: the scale of the scores depends on its width. The scores (..., heads, L, S) of a head carry the id of
the head's first channel. Queries, keys and values may come from one layer, one after the other or head by head. Several
heads of queries may share one of keys and values (Ainslie et al. 2023, arXiv:2305.13245): they are cut with it, unless
all heads share it.
"""

import numpy as np
import torch
from torch import Tensor

from micronet.graph import ops
from micronet.models.attention import weigh
from micronet.pruning.group_table import GroupTable
from micronet.pruning.ids import FIXED, STRIDE, Ids, ids_along, varies
from micronet.pruning.node_call import NodeCall


def attend_ids(call: NodeCall, table: GroupTable) -> Tensor | None:
    """Run attention, or one of its two products, on ids, and tie the channels of each head.

    Returns None if the heads cannot be identified.
    """
    if ops.MATMUL.matches(call.node):
        return multiply_ids(call.tensors[0], call.tensors[1], table) if len(call.tensors) == 2 else None
    weighs = call.node.target is weigh
    inputs = [
        call.argument(i, name) for i, name in enumerate(["query", "key"] if weighs else ["query", "key", "value"])
    ]
    masks = [x for x in call.tensors if not any(x is tensor for tensor in inputs)]
    if any((mask.dim() > 2 and mask.size(-3) > 1) or bool((mask != FIXED).any()) for mask in masks):
        return None  # one mask per head
    heads = _tie(_repeated([_head_ids(x) for x in inputs]), table)
    if heads is None:
        return None
    query, key = inputs[:2]
    return _place(heads[0][:, :1], query, key.size(-2)) if weighs else _place(heads[2], query, heads[2].shape[1])


def multiply_ids(left: Tensor, right: Tensor, table: GroupTable) -> Tensor | None:
    """Run the product of two tensors of ids, of which at least one has heads; return None if they are not known."""
    if {left.dim(), right.dim()} <= {2, 3}:  # more axes may be heads
        shape = [*max(left.shape[:-2], right.shape[:-2]), left.size(-2), right.size(-1)]
        if bool((left == FIXED).all()) and not varies(right, right.dim() - 2):
            return right[..., :1, :].expand(shape)
        if bool((right == FIXED).all()) and not varies(left, left.dim() - 1):
            return left[..., :1].expand(shape)
    sizes = list(zip(left.shape[:-2], right.shape[:-2], strict=False))
    if left.dim() != right.dim() or left.dim() < 3 or any(a != b and 1 not in (a, b) for a, b in sizes):
        return None
    batch = [max(pair) for pair in sizes]
    left, right = left.expand(*batch, -1, -1), right.expand(*batch, -1, -1)
    if len(batch) < 3 or not varies(left, len(batch) - 2):
        return _multiply(left, right, table)
    product = _multiply(left.flatten(-4, -3), right.flatten(-4, -3), table)  # the heads lie along two axes
    return None if product is None else product.reshape(*batch, *product.shape[-2:])


def _multiply(left: Tensor, right: Tensor, table: GroupTable) -> Tensor | None:
    """Multiply what has the same heads: queries (..., heads, L, d) and keys (..., heads, d, S), scores and values, ...

    Where no channels differ within the heads, as in scores, there is the id of the head's first channel.
    """
    rows, inner = (varies(left, left.dim() - axis) for axis in (2, 1))
    summed, columns = (varies(right, right.dim() - axis) for axis in (2, 1))
    if (inner and not summed and _head_ids(right) is not None and varies(right, right.dim() - 3)) or (
        rows and not inner and not columns
    ):
        product = _multiply(right.transpose(-2, -1), left.transpose(-2, -1), table)
        return None if product is None else product.transpose(-2, -1)
    if inner:
        heads = _tie([_head_ids(left), _head_ids(right.transpose(-2, -1))], table)
        return None if heads is None else _place(heads[0][:, :1], left, right.size(-1))
    if rows:  # one matrix of channels and channels for each head
        heads = _tie([_head_ids(left.transpose(-2, -1)), _head_ids(right)], table)
        return None if heads is None else _place(heads[0][:, :1], left, right.size(-1))
    scores, values = _head_ids(left), _head_ids(right.transpose(-2, -1) if summed else right)
    if scores is None or values is None:
        return None
    scores = scores[:, :1]
    if len(scores) == 1 or scores[1] - scores[0] == values.shape[1]:
        scores = scores + np.arange(values.shape[1], dtype=np.int64)
    tied = _tie([scores, values], table)
    if tied is None or (summed and left.size(-2) != values.shape[1]):
        return None
    if summed:  # its rows are the channels of what the scores come from
        return _place(tied[0], right.transpose(-2, -1), left.size(-2)).transpose(-2, -1)
    return _place(tied[1], left, right.size(-1))


def _head_ids(x: Tensor) -> Ids | None:
    """Return the ids (heads, d) of x (..., heads, positions, d), or None if they differ along other axes."""
    return None if x.dim() < 3 or 0 in x.shape else ids_along(x, -3, -1)


def _repeated(heads: list[Ids | None]) -> list[Ids | None]:
    """Repeat keys and values with fewer heads (heads, d) than there are heads of queries."""
    number = 0 if heads[0] is None else len(heads[0])
    return [ids if ids is None or number % len(ids) else ids.repeat(number // len(ids), 0) for ids in heads]


def _tie(heads: list[Ids | None], table: GroupTable) -> list[Ids] | None:
    """Cut the channels of each head as one, in all arrays (heads, d); return them as they are cut.

    Returns None if they are not in a layer's order.
    """
    if any(ids is None for ids in heads):
        return None
    shared = [ids is not None and len(ids) > 1 and bool((ids[0] == ids[1]).all()) for ids in heads]
    own = _tie_alike([ids for ids, is_shared in zip(heads, shared, strict=True) if not is_shared], table)
    if not own or len({ids.shape for ids in heads if ids is not None}) > 1:
        return own if not any(shared) else None
    for ids in (ids for ids, is_shared in zip(heads, shared, strict=True) if is_shared and ids is not None):
        number = len(np.unique(ids[:, 0]))
        few = ids[:: len(ids) // number]
        if not _is_regular(few) or (few.repeat(len(ids) // number, 0) != ids).any():
            return None
        if number == 1 and not table.is_narrowed(few):  # not the last of several
            table.pin(few, "all heads of the queries share it")
        elif not table.merge_heads(own[0], few):
            return None
    rest = iter(own)
    return [own[0] if is_shared else next(rest) for is_shared in shared]


def _tie_alike(heads: list[Ids | None], table: GroupTable) -> list[Ids] | None:
    """Cut the channels of heads that none share as one."""
    known = [ids for ids in heads if ids is not None and _is_regular(ids)]
    if len(known) < len(heads) or len({len(ids) for ids in known}) > 1:
        return None
    layers = {int(ids[0, 0]) // STRIDE for ids in known}
    sizes = {table.widths[layer] // len(known[0]) for layer in layers}
    if len({ids.shape for ids in known}) == 1 and all(_is_part(ids, table) for ids in known):
        for ids in known:  # the heads of a layer's queries, for example, follow each other
            table.merge(known[0].ravel(), ids.ravel())
        table.add_block(known[0], known[0].shape[1])
    elif len(layers) == 1 and all((ids % STRIDE // min(sizes) == np.arange(len(ids))[:, None]).all() for ids in known):
        table.add_block(known[0], min(sizes))  # a head's queries, keys and values do
    else:
        return None
    return known


def _is_regular(ids: Ids) -> bool:
    """Return True if each head (heads, d) has neighboring channels of one layer."""
    first = ids[:, :1]
    return bool((first >= 0).all() and (first // STRIDE == first[0] // STRIDE).all() and (np.diff(ids) == 1).all())


def _is_part(ids: Ids, table: GroupTable) -> bool:
    """Return True if heads (heads, d) follow each other and are an equal part of all channels of their layer."""
    group, place = divmod(int(ids[0, 0]), STRIDE)
    return bool((np.diff(ids.ravel()) == 1).all()) and place % ids.size == table.widths[group] % ids.size == 0


def _place(ids: Ids, like: Tensor, size: int) -> Tensor:
    """Repeat ids (heads, d or 1) at every position, in the shape of ``like`` with a last axis of ``size``."""
    view = [*[1] * (like.dim() - 3), len(ids), 1, ids.shape[1]]
    return torch.from_numpy(ids.copy()).view(view).expand(*like.shape[:-1], size)
