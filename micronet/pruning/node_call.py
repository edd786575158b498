"""A call of a traced forward, on channel ids in place of values."""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from micronet.graph import ops
from micronet.pruning.ids import Ids, channels_along, distinct
from micronet.pruning.kinds import kind_of

OUTPUTS = "its channels are network outputs"


class Reshape(NamedTuple):
    """A reshape, split or grouped layer: its channels, and the sizes of the axes that they lie along afterwards.

    Such a size may be a number of equal parts. None stands for axes without channels.
    """

    ids: Ids
    sizes: tuple[int | None, ...]


@dataclass
class NodeCall:
    """A node with tensors of ids as arguments; ``module``: the one that it calls, if any.

    ``key`` is (graph's index, node's name), ``fixed`` the result for the example input with ``FIXED`` in every tensor,
    ``unresolved`` the arguments with ``Attribute``s, ``before_heads`` whether attention reads the result.
    """

    node: fx.Node
    key: tuple[int, str]
    module: nn.Module | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    fixed: Any
    unresolved: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
    before_heads: bool = False

    @cached_property
    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    @property
    def numbers(self) -> list[float]:
        """The plain numbers among the arguments."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, (int, float))]

    @cached_property
    def ids(self) -> Ids:
        """The ids that occur in the arguments."""
        return np.concatenate([np.empty(0, np.int64), *map(distinct, self.tensors)])

    @property
    def kind(self) -> str:
        """What the call does to channels, one of ``KINDS``, or "" if that is unknown."""
        return kind_of(self.node, self.module)

    @property
    def keeps_elements(self) -> bool:
        """Whether each output element comes from the elements at one position of the inputs."""
        if self.module is not None or self.node.op == "output":
            return False
        return self.kind in ("metadata", "combining") or (self.kind == "moving" and len(self.tensors) == 1)

    @property
    def batched_rank(self) -> int | None:
        """The rank of the operation's batched input by its name (``MaxPool2d``: 4), or None if any rank will do."""
        name = getattr(self.node.target, "__name__", type(self.module).__name__)
        if name[-2:] not in ("1d", "2d", "3d") or isinstance(self.module, ops.BATCH_NORMS):  # BatchNorm1d has two ranks
            return None
        return int(name[-2]) + 2

    @property
    def writes(self) -> bool:
        """Whether the call writes into its first tensor."""
        target: Any = self.node.target
        name = "" if self.module or target in (operator.and_, operator.or_) else getattr(target, "__name__", target)
        in_place = name.endswith("_") and not name.endswith("__")
        return in_place or target in ops.IN_PLACE or bool(self.node.kwargs.get("inplace"))

    @property
    def writes_part(self) -> bool:
        """Whether the call writes into part of a tensor that others may read as a whole."""
        if not self.writes:
            return False
        source = self.node.args[0] if self.node.args else None
        return isinstance(source, fx.Node) and ops.PART.matches(source)

    @property
    def _is_last(self) -> bool:
        """Whether the network returns the result, perhaps in another shape."""
        waiting = [self.node]
        while waiting:
            users = waiting.pop().users
            inner = [user for user in users if user.op != "output"]
            if not users or not all(ops.RESHAPE.matches(user) for user in inner):
                return False
            waiting += inner
        return True

    @property
    def _returns_channels(self) -> bool:
        """Whether the network returns the result, which has the shape of the only input, as a softmax of scores."""
        of_torch = self.module is None or type(self.module).__module__.startswith("torch.nn.")
        weightless = of_torch and not getattr(self.module, "_parameters", None)
        alike = [x.shape for x in self.tensors] == [getattr(self.fixed, "shape", None)]
        return self._is_last and weightless and alike

    @property
    def subject(self) -> str:
        """What a reason calls the operation."""
        name = getattr(self.node.target, "__name__", self.node.target)
        return f"{name} in forward()" if self.module is None else f"{name} ({type(self.module).__name__})"

    @property
    def why_pinned(self) -> str:
        """Why an operation that does not tell its channels apart keeps them from being cut."""
        if isinstance(self.node.target, type) and self._is_last:
            return OUTPUTS  # in a named tuple or a dataclass
        if ops.WEIGHTED_FUNCTIONS.matches(self.node, self.module):
            what = "no layer stores" if self._reads_weight else "forward() computes"
            return f"{self.subject} has a weight that {what}"
        if self._returns_channels:
            return OUTPUTS
        if self.kind == "reducing":
            return f"{self.node.name} reduces across channels"
        if ops.NORMALIZES_CHANNELS.matches(self.node, self.module):
            return f"{self.subject} normalizes across its channels, so none can be cut without changing others"
        return f"{self.subject} is not supported by pruning"

    @property
    def why_whole(self) -> str:
        """Why a function with a weight is never cut."""
        what = "no layer stores its weight" if self._reads_weight else "forward() computes its weight"
        return f"{what}; only layers that store theirs are cut"

    @property
    def _reads_weight(self) -> bool:
        """Whether a function's weight is a stored tensor as it is, such as a fixed filter."""
        weight = self.node.args[1] if len(self.node.args) > 1 else self.node.kwargs.get("weight")
        return isinstance(weight, fx.Node) and weight.op == "get_attr"

    def run(self) -> Any:
        """Run the node on the ids."""
        if self.module is not None:
            return self.module(*self.args, **self.kwargs)
        if self.node.op == "call_function":
            return self.node.target(*self.args, **self.kwargs)  # type: ignore[operator]
        name = str(self.node.target).replace("view", "reshape")  # expanded ids are not contiguous
        return getattr(self.args[0], name)(*self.args[1:], **self.kwargs)

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """Return an argument by its position or its name."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    def reshape(self, moved: Any, uneven: Sequence[int]) -> Reshape | None:
        """Return how the call reshaped its inputs into one or several tensors, or None if these are all equal.

        ``uneven``: the sizes of a split's parts if they differ.
        """
        if isinstance(self.module, ops.SHUFFLES):
            return Reshape(self.ids, (self.module.groups,))
        if self.node.target in ops.CHANNEL_SHUFFLES:
            return Reshape(self.ids, (self.argument(1, "groups"),))
        if isinstance(moved, Tensor):
            return Reshape(self.ids, tuple(channels_along(moved, axis) for axis in range(moved.dim())))
        if len(uneven) > 1:
            return Reshape(self.ids, (sum(uneven) // math.gcd(*uneven),))
        pieces = [leaf for leaf in tree_leaves(moved) if isinstance(leaf, Tensor)]
        differ = any(not torch.equal(piece, pieces[0]) for piece in pieces)  # the channel axis was split
        return Reshape(self.ids, (len(pieces),)) if differ else None


def reads_shape(node: fx.Node) -> bool:
    """Return True if a node reads no values of a tensor, only facts such as its shape."""
    attribute = node.target is getattr and node.args[1] in ops.METADATA_ATTRIBUTES
    return attribute or ops.METADATA.matches(node)
