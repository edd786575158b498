"""Parameters and buffers that a forward itself reads and that hold one value per channel, such as a layer scale.

Every element has an id of its own, below ``FIXED``, that moves through views and permutations as a channel's id does.
Where it meets a channel in an elementwise operation, the element belongs to that channel, and is cut with it.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from micronet.graph.recorder import CONSTANT
from micronet.graph.symbolic import MADE
from micronet.pruning.group_table import GroupTable
from micronet.pruning.ids import FIXED, STRIDE, Ids, dense, smallest, varies

_FIRST = -2  # the "group" of the first tensor's elements; the others' go down from here
_LARGEST = 1 << 22  # elements


class TensorChannels(NamedTuple):
    """The channel ids along one axis of a tensor of the network's."""

    axis: int
    ids: Ids


class OwnTensors:
    """The tensors that a forward reads, and which channel each element belongs to."""

    def __init__(self, model: nn.Module, table: GroupTable, sizes: Mapping[str, tuple[int, int]]) -> None:
        """Start empty. ``sizes``: tensor -> an axis and its size, if that is not what it is in the network."""
        tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        uses = Counter(id(tensor) for _, tensor in tensors)
        self._shapes = {
            name: list(tensor.shape)
            for name, tensor in tensors
            if uses[id(tensor)] == 1 and tensor.is_floating_point() and 1 < tensor.numel() < _LARGEST
            and not name.rpartition(".")[2].startswith((CONSTANT, MADE))
        }  # fmt: skip
        for name, (axis, size) in sizes.items():
            self._shapes[name][axis] = size
        self._table = table
        self._channels: dict[str, Ids] = {}
        self._otherwise: set[str] = set()  # read by an operation that is not elementwise

    def read(self, name: str, fixed: Tensor) -> Tensor:
        """Return the ids of a tensor's elements, or ``fixed`` if it cannot be cut."""
        if name not in self._shapes:
            return fixed
        shape = self._shapes[name]
        self._channels.setdefault(name, np.full(shape, FIXED, np.int64).ravel())
        group = _FIRST - list(self._channels).index(name)
        return (group * STRIDE + torch.arange(len(self._channels[name]))).view(shape)

    def holds(self, x: Tensor) -> bool:
        """Return True if elements of such tensors are in x."""
        return bool(self._channels) and smallest(x) < FIXED

    def without(self, values: Any) -> Any:
        """Return values with ``FIXED`` in place of elements of such tensors, whose channels must then stay."""
        return tree_map(lambda value: self._without(value) if isinstance(value, Tensor) else value, values)

    def _without(self, x: Tensor) -> Tensor:
        if not self.holds(x):
            return x
        self._otherwise |= {self._name(group) for group in np.unique(x[x < FIXED].numpy() // STRIDE).tolist()}
        return torch.where(x < FIXED, FIXED, x)

    def follow(self, own: Tensor, x: Tensor) -> Tensor:
        """Give the elements in ``own`` the channels that they are combined with in x; return the result's ids."""
        rank = max(own.dim(), x.dim())
        one, other = (y.reshape((*[1] * (rank - y.dim()), *y.shape)) for y in (own, x))
        if all(one.size(axis) == 1 for axis in range(rank) if varies(other, axis)):
            return x.expand(torch.broadcast_shapes(own.shape, x.shape))  # type: ignore[no-untyped-call]
        one, other = torch.broadcast_tensors(one, other)  # type: ignore[no-untyped-call]
        elements, channels = np.unique(torch.stack(dense(one, other)).flatten(1).numpy(), axis=1)
        if len(np.unique(elements)) < len(elements) or (elements >= FIXED).any():
            return self._without(own)  # one element for several channels
        for group in np.unique(elements // STRIDE).tolist():
            mine = elements // STRIDE == group
            known, places = self._channels[self._name(group)], elements[mine] % STRIDE
            seen = known[places] != FIXED
            self._table.merge(known[places][seen], channels[mine][seen])
            known[places] = channels[mine]
        result: Tensor = other
        return result

    def settle(self) -> dict[str, TensorChannels]:
        """Return the tensors that must be cut with their channels; pin the channels of those that cannot be."""
        found = {}
        for name, flat in self._channels.items():
            ids = torch.from_numpy(flat).view(self._shapes[name])
            if bool((ids == FIXED).all()):
                continue
            axis, along = next(_axes(ids), (0, None))
            if along is None or name in self._otherwise:
                self._table.pin(flat, f"forward() also uses {name} in another way")
            else:
                found[name] = TensorChannels(axis, along)
        return found

    def _name(self, group: int) -> str:
        return list(self._channels)[_FIRST - group]


def _axes(x: Tensor) -> Iterator[tuple[int, Ids]]:
    """Yield each axis along which ids lie, and the ids; parts of x that nothing reads are ``FIXED``."""
    for axis in range(x.dim()):
        others = [other for other in range(x.dim()) if other != axis]
        along = x.amax(others, keepdim=True) if others else x
        if bool(((x == along) | (x == FIXED)).all()):
            yield axis, along.flatten().numpy()


def sizes_for(
    tensors: Mapping[str, TensorChannels], old: Mapping[int, int], new: Mapping[int, int]
) -> dict[str, tuple[int, int]]:
    """Return the axis and the size of each tensor for other widths of the groups."""
    found = {}
    for name, (axis, ids) in tensors.items():
        groups, counts = np.unique(ids // STRIDE, return_counts=True)
        pairs = zip(groups.tolist(), counts.tolist(), strict=True)
        found[name] = axis, sum(n if group == FIXED else n * new[group] // old[group] for group, n in pairs)
    return found
