"""Channel ids: integers that name channels, in arrays and in tensors that stand for a traced network's tensors.

A tensor of ids has the shape of the real tensor; each element names the channel that the real element belongs to.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_leaves

Ids = NDArray[np.int64]
STRIDE = 1 << 32  # an id is group * STRIDE + channel
FIXED = -1  # the id of everything that cannot be cut: inputs, constants, ...


@dataclass
class LayerChannels:
    """The channel ids at a layer's input, None if they cannot be cut, and at its output.

    ``parts``: the number of equal parts in which the layer takes its channels; 1 if channels may change parts.
    """

    inputs: Ids | None
    outputs: Ids
    parts: int = 1

    @property
    def ends(self) -> list[Ids]:
        """The ids at the input, if known, and at the output."""
        return [ids for ids in (self.inputs, self.outputs) if ids is not None]


def groups_of(ids: Ids) -> list[int]:
    """Return the groups that channels belong to."""
    return [group for group in np.unique(ids // STRIDE).tolist() if group != FIXED]


def is_whole_group(ids: Ids, width: int) -> bool:
    """Return True if ids are all channels of one group, in order."""
    return len(ids) == width and FIXED not in ids and bool((ids == ids[0] // STRIDE * STRIDE + np.arange(width)).all())


def without_ids(value: Any) -> Any:
    """Return a tensor's shape filled with ``FIXED``; anything else unchanged."""
    return torch.tensor(FIXED).expand(value.shape) if isinstance(value, Tensor) else value


def is_empty(value: Any) -> bool:
    """Return True if a tensor in a value has no elements, so that it shows no channels."""
    return any(isinstance(leaf, Tensor) and not leaf.numel() for leaf in tree_leaves(value))


def distinct(x: Tensor) -> Ids:
    """Return the sorted ids that occur in a tensor."""
    found: Ids = np.unique(_unexpanded(x).numpy())
    return found


def spread(ids: Ids, axis: int, shape: Sequence[int]) -> Tensor:
    """Return a tensor with ids along one axis, the same at every position of the others."""
    view = [1] * len(shape)
    view[axis] = len(ids)
    return torch.from_numpy(ids).view(view).expand(tuple(shape))


def ids_along(x: Tensor, *axes: int) -> Ids | None:
    """Return the ids along one or several axes, in order; None if they differ along another, or there are none."""
    others = set(range(x.dim())) - {axis % x.dim() for axis in axes}
    if not x.numel() or any(varies(x, other) for other in others):
        return None
    return first_along(x, *axes).squeeze(tuple(others)).numpy().copy()


def first_along(x: Tensor, *axes: int) -> Tensor:
    """Return a tensor's elements along one or several axes, at the first place of the others."""
    for other in set(range(x.dim())) - {axis % x.dim() for axis in axes}:
        x = x.narrow(other, 0, 1)
    return x


def varies(x: Tensor, axis: int) -> bool:
    """Return True if ids differ along an axis."""
    if x.size(axis) <= 1 or x.stride(axis) == 0:
        return False
    x = _unexpanded(x)
    return not bool((x == x.narrow(axis, 0, 1)).all())


def channels_along(x: Tensor, axis: int) -> int | None:
    """Return how many channels lie along an axis, at the first place of the others; None if they do not differ."""
    return len(distinct(first_along(x, axis))) if varies(x, axis) else None


def combine(left: Tensor, right: Tensor) -> tuple[Tensor, tuple[Ids, Ids], list[tuple[Tensor, str]]]:
    """Combine two tensors elementwise: ids at the same position must be cut alike.

    A tensor that is broadcast along the other's channel axis puts no condition on those channels.

    Returns:
        The resulting ids; pairs of channels that must be cut alike; channels without a counterpart, and why.
    """
    rank = max(left.dim(), right.dim())
    sides = [x.reshape((*[1] * (rank - x.dim()), *x.shape)) for x in (left, right)]
    unmatched: list[tuple[Tensor, str]] = []
    for side, other in ((0, 1), (1, 0)):
        x, y = sides[side], sides[other]
        if single := [axis for axis in range(rank) if _is_single(x, axis) and varies(y, axis)]:
            unmatched.append((x, "it is broadcast along the channel axis"))
            for axis in single:
                x = x.narrow(axis, 0, 1)
            sides[side] = without_ids(x)
    for x, y in (sides, sides[::-1]):
        matched = any(y.size(axis) > 1 and varies(x, axis) for axis in range(rank))
        if matched and bool((y == FIXED).any()):
            wide, fixed = torch.broadcast_tensors(x, y)  # type: ignore[no-untyped-call]
            unmatched.append((wide[fixed == FIXED], "it is combined with a tensor that cannot be pruned"))
    a, b = torch.broadcast_tensors(*sides)  # type: ignore[no-untyped-call]
    pairs = torch.stack(dense(a, b)).reshape(2, -1)
    first, second = np.unique(pairs[:, (pairs != FIXED).all(0)].numpy(), axis=1)
    complete = [side for side, ids in zip((a, b), pairs, strict=True) if bool((ids != FIXED).all())]
    out = complete[0] if complete else torch.where(a == FIXED, b, a)
    return out, (first, second), unmatched


def _is_single(x: Tensor, axis: int) -> bool:
    """Return True if one channel is broadcast along an axis, or was expanded along it before."""
    if x.size(axis) == 1 or not x.numel():
        return x.size(axis) == 1
    return x.stride(axis) == 0 and smallest(x) == int(_unexpanded(x).max())


def dense(left: Tensor, right: Tensor) -> list[Tensor]:
    """Return two tensors of one shape with one position along every axis that both are expanded along."""
    both = (a == b == 0 for a, b in zip(left.stride(), right.stride(), strict=True))
    places = tuple(slice(0, 1) if expanded else slice(None) for expanded in both)
    return [left[places], right[places]]


def smallest(x: Tensor) -> int:
    """Return the smallest id in a tensor; ``FIXED`` if it is empty."""
    return int(_unexpanded(x).min()) if x.numel() else FIXED


def _unexpanded(x: Tensor) -> Tensor:
    """Return a tensor with one position along every axis that it is expanded along."""
    return x[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in x.stride())]
