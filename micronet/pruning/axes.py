"""Channel ids that differ along several axes of a tensor, where an operation tells them apart along some of these."""

import torch
from torch import Tensor

from micronet.graph import ops
from micronet.pruning.group_table import GroupTable
from micronet.pruning.ids import Ids, dense, distinct, first_along, ids_along, varies
from micronet.pruning.node_call import NodeCall


def tied_along(x: Tensor, axis: int, table: GroupTable) -> Ids | None:
    """Return the ids along an axis; those that differ along others too, as in a pixel shuffle, are cut as one."""
    ids = ids_along(x, axis)
    narrowed = x.size(axis) == 1 and table.is_narrowed(distinct(x))  # to one block
    if ids is not None or not (varies(x, axis) or narrowed):
        return ids
    first = first_along(x, axis)
    table.merge(*(each.numpy().ravel() for each in dense(first.expand_as(x), x)))
    return first.flatten().numpy().copy()


def reduce_ids(call: NodeCall, table: GroupTable) -> Tensor | None:
    """Run a reduction or a softmax over some axes on ids; return None if it mixes channels."""
    x, default = call.tensors[0], call.kwargs.get("axis", getattr(call.module, "dim", None))
    dims = call.argument(1, "dim", default)
    axes = list(range(x.dim())) if dims is None else [dims] if isinstance(dims, int) else list(dims)
    if call.node.users and not all(_tie(x, axis % x.dim(), table) for axis in axes if varies(x, axis % x.dim())):
        return None
    if ops.SOFTMAX.matches(call.node, call.module):
        return x
    return torch.amin(x, axes, keepdim=bool(call.argument(2, "keepdim", False)))


def _tie(x: Tensor, axis: int, table: GroupTable) -> bool:
    """Keep or cut channels that differ along one axis alike; return False if nothing else tells channels apart."""
    if others := any(varies(x, other) for other in range(x.dim()) if other != axis):
        table.merge(*(ids.numpy().ravel() for ids in dense(x.narrow(axis, 0, 1).expand_as(x), x)))
    return others
