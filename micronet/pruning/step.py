"""One node of a traced forward, run on channel numbers in the place of values."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map

from micronet.pruning.network import Shape
from micronet.pruning.numbering import FIXED, STRIDE, Ids


@dataclass
class Layer:
    """A layer's channels: numbers at its input, None where they are not ours to cut, and at its output."""

    inputs: Ids | None
    outputs: Ids


class Reshaped(NamedTuple):
    """A reshape: the channels it takes, and the sizes of those of its output's axes that they lie along."""

    ids: Ids
    sizes: tuple[int | None, ...]


class Step:
    """A node about to be run. ``numbers``: the tensors among its arguments."""

    def __init__(
        self, node: fx.Node, key: tuple[int, str], args: list[Any], kwargs: dict[str, Any], results: Mapping[Any, Any]
    ) -> None:
        self.node, self.key, self.args, self.kwargs = node, key, args, kwargs
        self._results = results
        self.numbers: list[Tensor] = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]

    @property
    def name(self) -> str:
        """Return what the node calls."""
        return getattr(self.node.target, "__name__", str(self.node.target))

    @property
    def result(self) -> Any:
        """What a real input led to, shapes in the place of tensors."""
        return self._results[self.key]

    def call(self, function: Callable[..., Any] | None = None) -> Any:
        """Run the node on the numbers."""
        if function is not None:
            return function(*self.numbers)
        if self.node.op == "call_function":
            return self.node.target(*self.args, **self.kwargs)  # type: ignore[operator]
        name = "reshape" if self.node.target == "view" else str(self.node.target)  # numbers are expanded, not laid out
        return getattr(self.args[0], name)(*self.args[1:], **self.kwargs)

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """Return an argument by its place or its name."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    def blank(self) -> Any:
        """Return the node's result with no channel of ours in it."""
        return tree_map(lambda leaf: _blank(leaf) if isinstance(leaf, Shape) else leaf, self.result)


def _blank(shape: Sequence[int]) -> Tensor:
    return torch.tensor(FIXED).expand(tuple(shape))


def fixed(value: Any) -> Any:
    """Return a tensor of the same shape with no channel of ours in it; anything else as it is."""
    return _blank(value.shape) if isinstance(value, Tensor) else value


def shuffled(x: Tensor, groups: int) -> Tensor:
    """Return numbers (N, C, ...) as a channel shuffle leaves them."""
    return x.reshape(x.shape[0], groups, -1, *x.shape[2:]).transpose(1, 2).flatten(1, 2)


def distinct(x: Tensor) -> Ids:
    """Return the numbers that occur."""
    for axis in range(x.dim()):
        x = x.narrow(axis, 0, 1) if x.stride(axis) == 0 and x.size(axis) else x
    found: Ids = np.unique(x.numpy())
    return found


def spread(ids: Ids, axis: int, shape: Sequence[int]) -> Tensor:
    """Return numbers along one axis, the same along the others."""
    along = [1] * len(shape)
    along[axis] = len(ids)
    return torch.from_numpy(ids).view(along).expand(tuple(shape))


def vector(x: Tensor, axis: int) -> Ids | None:
    """Return the numbers along an axis; None where they differ along another."""
    axis %= x.dim()
    if any(varies(x, other) for other in range(x.dim()) if other != axis):
        return None
    for other in range(x.dim()):
        x = x if other == axis else x.narrow(other, 0, 1)
    return x.reshape(-1).numpy().copy()


def varies(x: Tensor, axis: int) -> bool:
    """Tell whether numbers differ along an axis."""
    if x.size(axis) <= 1 or x.stride(axis) == 0:
        return False
    for other in range(x.dim()):
        if x.stride(other) == 0 and x.size(other) > 1:
            x = x.narrow(other, 0, 1)
    return not bool((x == x.narrow(axis, 0, 1)).all())


def reshaped(numbers: Sequence[Tensor], moved: Any, pieces: int = 1) -> Reshaped | None:
    """Return how tensors were moved: into a tensor, in ``pieces`` of them, or into several, where those differ."""
    taken = np.concatenate([distinct(ids) for ids in numbers])
    if isinstance(moved, Tensor):
        return Reshaped(taken, (pieces, None) if pieces > 1 else tuple(sizes(moved)))
    differ = any(not torch.equal(piece, moved[0]) for piece in moved)  # pieces of the channels' axis
    return Reshaped(taken, (len(moved),)) if differ else None


def sizes(x: Tensor) -> list[int | None]:
    """Return the sizes of the axes along which numbers differ, None for the others."""
    return [x.size(axis) if varies(x, axis) else None for axis in range(x.dim())]


def is_whole_group(ids: Ids, width: int) -> bool:
    """Tell whether channels are all those of one group, in order."""
    return len(ids) == width and FIXED not in ids and bool((ids == ids[0] // STRIDE * STRIDE + np.arange(width)).all())


def broadcast(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return two tensors of as many axes expanded to one shape. Raises RuntimeError where they do not fit."""
    shape = [max(sizes) if min(sizes) else 0 for sizes in zip(left.shape, right.shape, strict=True)]
    return left.expand(shape), right.expand(shape)
