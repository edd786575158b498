"""The channel ids of tensors whose values are added, multiplied or otherwise combined."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from micronet.pruning.ids import FIXED, Ids, broadcast, varies


class Combined(NamedTuple):
    """The resulting ids; pairs of channels that must be cut alike; channels without a counterpart, and why."""

    ids: Tensor
    equal: tuple[Ids, Ids]
    unmatched: list[tuple[Tensor, str]]


def combine_all(tensors: Sequence[Tensor]) -> tuple[Tensor, list[Combined]]:
    """Combine tensors one after the other; return the last ids, and the result of each step."""
    out, steps = tensors[0], []
    for other in tensors[1:]:
        steps.append(combine(out, other))
        out = steps[-1].ids
    return out, steps


def combine(left: Tensor, right: Tensor) -> Combined:
    """Combine two tensors elementwise: ids at the same position must be cut alike.

    A tensor that is broadcast along the other's channel axis puts no condition on those channels.
    Raises RuntimeError if the shapes cannot be broadcast.
    """
    rank = max(left.dim(), right.dim())
    sides = [x.reshape(*[1] * (rank - x.dim()), *x.shape) for x in (left, right)]
    unmatched: list[tuple[Tensor, str]] = []
    for side, other in ((0, 1), (1, 0)):
        x, y = sides[side], sides[other]
        if any(x.size(axis) == 1 and varies(y, axis) for axis in range(rank)):
            unmatched.append((x, "it is broadcast along the channel axis"))
            sides[side] = torch.full_like(x, FIXED)
    for x, y in (sides, sides[::-1]):
        matched = any(y.size(axis) > 1 and varies(x, axis) for axis in range(rank))
        if matched and bool((y == FIXED).any()):
            wide, fixed = broadcast(x, y)
            unmatched.append((wide[fixed == FIXED], "it is combined with a tensor that cannot be cut"))
    a, b = broadcast(*sides)
    dense = [slice(0, 1) if a.stride(i) == b.stride(i) == 0 else slice(None) for i in range(rank)]
    pairs = torch.stack([a[tuple(dense)], b[tuple(dense)]]).flatten(1)
    first, second = np.unique(pairs[:, (pairs != FIXED).all(0)].numpy(), axis=1)
    if bool((pairs[0] != FIXED).all()):
        out = a
    else:
        out = b if bool((pairs[1] != FIXED).all()) else torch.where(a == FIXED, b, a)
    return Combined(out, (first, second), unmatched)
