"""Two tensors' numbers where their values are added, multiplied and the like."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from micronet.pruning.numbering import FIXED, Ids
from micronet.pruning.step import broadcast, varies


class Combined(NamedTuple):
    """``numbers`` of the result. ``equals``: channels that must be cut alike. ``alone``: what must not be, and why."""

    numbers: Tensor
    equals: tuple[Ids, Ids]
    alone: list[tuple[Tensor, str]]


def combine_all(tensors: Sequence[Tensor]) -> tuple[Tensor, list[Combined]]:
    """Combine tensors one after the other; return the last result and every meeting. Raises RuntimeError."""
    out, met = tensors[0], []
    for other in tensors[1:]:
        met.append(combine(out, other))
        out = met[-1].numbers
    return out, met


def combine(left: Tensor, right: Tensor) -> Combined:
    """Make equals of the numbers at the same place of two tensors; what is alone there must not be cut.

    A tensor that is broadcast along the other's channels goes with any number of them.
    Raises RuntimeError where the shapes do not fit one another.
    """
    depth = max(left.dim(), right.dim())
    sides = [x.reshape(*[1] * (depth - x.dim()), *x.shape) for x in (left, right)]
    alone: list[tuple[Tensor, str]] = []
    for side, other in ((0, 1), (1, 0)):
        x, y = sides[side], sides[other]
        if any(x.size(axis) == 1 and varies(y, axis) for axis in range(depth)):
            alone.append((x, "it is broadcast along channels"))
            sides[side] = torch.full_like(x, FIXED)
    for x, y in (sides, sides[::-1]):
        held = any(y.size(axis) > 1 and varies(x, axis) for axis in range(depth))
        if held and bool((y == FIXED).any()):
            wide, lone = broadcast(x, y)
            alone.append((wide[lone == FIXED], "it is combined with what cannot be cut"))
    a, b = broadcast(*sides)
    dense = [slice(0, 1) if a.stride(i) == b.stride(i) == 0 else slice(None) for i in range(depth)]
    pairs = torch.stack([a[tuple(dense)], b[tuple(dense)]]).flatten(1)
    ours, theirs = np.unique(pairs[:, (pairs != FIXED).all(0)].numpy(), axis=1)
    if bool((pairs[0] != FIXED).all()):
        out = a
    else:
        out = b if bool((pairs[1] != FIXED).all()) else torch.where(a == FIXED, b, a)
    return Combined(out, (ours, theirs), alone)
