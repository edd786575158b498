"""One node of a traced forward, called on channel ids in place of values."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map

from micronet.pruning.ids import Ids, distinct, fixed_ids, varying_sizes
from micronet.pruning.traced_network import Shape


class Reshape(NamedTuple):
    """A reshape: its channels, and the sizes of the output axes that they lie along (None for other axes)."""

    ids: Ids
    sizes: tuple[int | None, ...]


class NodeCall:
    """A node with tensors of ids as arguments; ``key``: (graph's index, node's name)."""

    def __init__(
        self, node: fx.Node, key: tuple[int, str], args: list[Any], kwargs: dict[str, Any], results: Mapping[Any, Any]
    ) -> None:
        self.node, self.key, self.args, self.kwargs = node, key, args, kwargs
        self._results = results
        self.tensors: list[Tensor] = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]

    @property
    def name(self) -> str:
        """The name of what the node calls."""
        return getattr(self.node.target, "__name__", str(self.node.target))

    @property
    def result(self) -> Any:
        """The node's result for the example input, with shapes in place of tensors."""
        return self._results[self.key]

    def run(self, function: Callable[..., Any] | None = None) -> Any:
        """Run the node, or ``function`` in its place, on the ids."""
        if function is not None:
            return function(*self.tensors)
        if self.node.op == "call_function":
            return self.node.target(*self.args, **self.kwargs)  # type: ignore[operator]
        name = "reshape" if self.node.target == "view" else str(self.node.target)  # expanded ids are not contiguous
        return getattr(self.args[0], name)(*self.args[1:], **self.kwargs)

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """Return an argument by its position or its name."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    def fixed_result(self) -> Any:
        """Return the node's result without a channel that can be cut."""
        return tree_map(lambda leaf: fixed_ids(leaf) if isinstance(leaf, Shape) else leaf, self.result)


def find_reshape(tensors: Sequence[Tensor], moved: Any, pieces: int = 1) -> Reshape | None:
    """Return how a call reshaped its inputs into one or several tensors, or None if these are all equal.

    ``pieces``: the number of pieces in which a channel shuffle takes the channels.
    """
    ids = np.concatenate([distinct(x) for x in tensors])
    if isinstance(moved, Tensor):
        return Reshape(ids, (pieces, None) if pieces > 1 else tuple(varying_sizes(moved)))
    differ = any(not torch.equal(piece, moved[0]) for piece in moved)  # the channel axis was split
    return Reshape(ids, (len(moved),)) if differ else None
