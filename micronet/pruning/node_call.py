"""One node of a traced forward, called on channel ids in place of values."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from micronet.graph import ops
from micronet.pruning.ids import Ids, distinct, varies

_KINDS = {
    "metadata": ops.METADATA,
    "moving": ops.MOVES_CHANNELS,
    "combining": ops.MATCHES_CHANNELS,
    "attending": ops.MIXES_HEADS,
    "reducing": ops.REDUCES,
    "pooling": ops.POOLS_CHANNELS,
}
_ATTRIBUTES = dict.fromkeys(ops.METADATA_ATTRIBUTES, "metadata") | dict.fromkeys(ops.TRANSPOSING_ATTRIBUTES, "moving")


class Reshape(NamedTuple):
    """A reshape, split or grouped layer: its channels, and the sizes of the axes that they lie along afterwards.

    Such a size may be a number of equal parts. None stands for axes without channels.
    """

    ids: Ids
    sizes: tuple[int | None, ...]


@dataclass
class NodeCall:
    """A node with tensors of ids as arguments.

    Attributes:
        node: The node.
        key: (graph's index, node's name).
        module: The module that it calls, None if it calls a function or a method.
        args: The positional arguments.
        kwargs: The keyword arguments.
        fixed: The result for the example input, without a channel that can be cut.
    """

    node: fx.Node
    key: tuple[int, str]
    module: nn.Module | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    fixed: Any

    @cached_property
    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    @property
    def kind(self) -> str:
        """What the call does to channels, one of ``_KINDS``, or "" if that is unknown."""
        if self.node.target is getattr:
            return _ATTRIBUTES.get(str(self.args[1]), "")
        return next((kind for kind, family in _KINDS.items() if family.matches(self.node, self.module)), "")

    @property
    def batched_rank(self) -> int | None:
        """The rank of the operation's batched input by its name (``MaxPool2d``: 4), or None if any rank will do."""
        name = getattr(self.node.target, "__name__", type(self.module).__name__)
        if name[-2:] not in ("1d", "2d", "3d") or isinstance(self.module, ops.BATCH_NORMS):  # BatchNorm1d has two ranks
            return None
        return int(name[-2]) + 2

    @property
    def writes_part(self) -> bool:
        """Whether the call writes into part of a tensor that others may read as a whole."""
        method = str(self.node.target) if self.node.op == "call_method" else ""
        in_place = method.endswith("_") and not method.endswith("__")
        if not (in_place or self.node.target in ops.IN_PLACE or self.node.kwargs.get("inplace")):
            return False
        source = self.node.args[0] if self.node.args else None
        return isinstance(source, fx.Node) and ops.PART.matches(source)

    @property
    def why_pinned(self) -> str:
        """Why an operation of an unknown kind keeps its channels from being cut."""
        name = getattr(self.node.target, "__name__", self.node.target)
        subject = f"{name} in the forward" if self.module is None else f"{name}: {type(self.module).__name__}"
        if ops.NORMALIZES_CHANNELS.matches(self.node, self.module):
            return f"{subject} normalizes over its channels, so each one depends on all others"
        return f"{subject} is not supported by pruning"

    def run(self) -> Any:
        """Run the node on the ids."""
        if self.module is not None:
            return self.module(*self.args, **self.kwargs)
        if self.node.op == "call_function":
            return self.node.target(*self.args, **self.kwargs)  # type: ignore[operator]
        name = "reshape" if self.node.target == "view" else str(self.node.target)  # expanded ids are not contiguous
        return getattr(self.args[0], name)(*self.args[1:], **self.kwargs)

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """Return an argument by its position or its name."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    def reshape(self, moved: Any) -> Reshape | None:
        """Return how the call reshaped its inputs into one or several tensors, or None if these are all equal."""
        ids = np.concatenate([distinct(x) for x in self.tensors])
        if isinstance(self.module, ops.SHUFFLES):
            return Reshape(ids, (self.module.groups,))
        if isinstance(moved, Tensor):
            return Reshape(ids, tuple(moved.size(axis) if varies(moved, axis) else None for axis in range(moved.dim())))
        differ = any(not torch.equal(piece, moved[0]) for piece in moved)  # the channel axis was split
        return Reshape(ids, (len(moved),)) if differ else None
