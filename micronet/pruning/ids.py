"""Channel ids: integers that name channels, in arrays and in tensors that stand for a traced network's tensors.

A tensor of ids has the shape of the real tensor; each element names the channel that the real element belongs to.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ids = NDArray[np.int64]
STRIDE = 1 << 32  # an id is group * STRIDE + channel
FIXED = -1  # the id of everything that cannot be cut: inputs, constants, ...


def groups_of(ids: Ids) -> list[int]:
    """Return the groups that channels belong to."""
    return [group for group in np.unique(ids // STRIDE).tolist() if group != FIXED]


def is_whole_group(ids: Ids, width: int) -> bool:
    """Return True if ids are all channels of one group, in order."""
    return len(ids) == width and FIXED not in ids and bool((ids == ids[0] // STRIDE * STRIDE + np.arange(width)).all())


def fixed_ids(shape: Sequence[int]) -> Tensor:
    """Return a tensor of ids without a channel that can be cut."""
    return torch.tensor(FIXED).expand(tuple(shape))


def without_ids(value: Any) -> Any:
    """Return a tensor's shape filled with ``FIXED``; anything else unchanged."""
    return fixed_ids(value.shape) if isinstance(value, Tensor) else value


def distinct(x: Tensor) -> Ids:
    """Return the sorted ids that occur in a tensor."""
    for axis in range(x.dim()):
        x = x.narrow(axis, 0, 1) if x.stride(axis) == 0 and x.size(axis) else x
    found: Ids = np.unique(x.numpy())
    return found


def expand_from_axis(ids: Ids, axis: int, shape: Sequence[int]) -> Tensor:
    """Return a tensor with ids along one axis, repeated along the others."""
    view = [1] * len(shape)
    view[axis] = len(ids)
    return torch.from_numpy(ids).view(view).expand(tuple(shape))


def ids_along(x: Tensor, axis: int) -> Ids | None:
    """Return the ids along an axis, or None if they differ along another axis too."""
    axis %= x.dim()
    if any(varies(x, other) for other in range(x.dim()) if other != axis):
        return None
    for other in range(x.dim()):
        x = x if other == axis else x.narrow(other, 0, 1)
    return x.reshape(-1).numpy().copy()


def varies(x: Tensor, axis: int) -> bool:
    """Return True if ids differ along an axis."""
    if x.size(axis) <= 1 or x.stride(axis) == 0:
        return False
    for other in range(x.dim()):
        if x.stride(other) == 0 and x.size(other) > 1:
            x = x.narrow(other, 0, 1)
    return not bool((x == x.narrow(axis, 0, 1)).all())


def varying_sizes(x: Tensor) -> list[int | None]:
    """Return the size of each axis along which ids differ, None for the other axes."""
    return [x.size(axis) if varies(x, axis) else None for axis in range(x.dim())]


def shuffle_channels(x: Tensor, groups: int) -> Tensor:
    """Return ids (N, C, ...) after a channel shuffle."""
    return x.reshape(x.shape[0], groups, -1, *x.shape[2:]).transpose(1, 2).flatten(1, 2)


def broadcast(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Expand two tensors of the same rank to one shape. Raise RuntimeError if their shapes do not match."""
    shape = [max(sizes) if min(sizes) else 0 for sizes in zip(left.shape, right.shape, strict=True)]
    return left.expand(shape), right.expand(shape)
