"""Products that ``torch.einsum`` computes, as products of matrices."""

from torch import Tensor
from torch.utils._pytree import tree_leaves

from micronet.pruning.group_table import GroupTable
from micronet.pruning.heads import multiply_ids
from micronet.pruning.ids import varies
from micronet.pruning.node_call import NodeCall

_ELLIPSIS = "ABCDEFGH"  # axes that an equation does not name


def einsum_ids(call: NodeCall, table: GroupTable) -> Tensor | None:
    """Run a product of two tensors on ids, such as that of queries and keys; return None for anything else."""
    equation, *operands = tree_leaves(call.args)
    inputs, arrow, out = str(equation).replace(" ", "").partition("->")
    names = inputs.split(",")
    if not arrow or len(names) != 2 or len(operands) != 2:
        return None
    first, second = (_spelled(axes, x.dim()) for axes, x in zip(names, operands, strict=True))
    unnamed = sum(axis in first + second for axis in _ELLIPSIS)
    out = _spelled(out, len(out.replace("...", "")) + unnamed)
    batch = [axis for axis in first if axis in second and axis in out]
    summed = [axis for axis in first if axis in second and axis not in out]
    rows, columns = ([axis for axis in own if axis in out and axis not in batch] for own in (first, second))
    used = len(batch) + len(summed)
    if (len(rows) + used, len(columns) + used) != (len(first), len(second)) or len(summed) != 1:
        return None
    if max(len(rows), len(columns)) > 1 or any(len(set(axes)) < len(axes) for axes in (first, second)):
        return None
    batch.sort(key=lambda axis: varies(operands[0], first.index(axis)))  # heads last
    left = _ordered(operands[0], first, [batch, rows, summed])
    right = _ordered(operands[1], second, [batch, summed, columns])
    product = multiply_ids(left, right, table)
    if product is None:
        return None
    absent = [len(batch) + place for place, axes in enumerate((rows, columns)) if not axes]
    axes = [*batch, *rows, *columns]
    return product.squeeze(absent).permute([axes.index(axis) for axis in out])


def _spelled(axes: str, rank: int) -> str:
    """Return the axes of a tensor with a letter for each."""
    before, dots, after = axes.partition("...")
    number = rank - len(before) - len(after)
    return before + (_ELLIPSIS[len(_ELLIPSIS) - number :] if dots and number else "") + after


def _ordered(x: Tensor, axes: str, order: list[list[str]]) -> Tensor:
    """Return a tensor with its axes in some order; a group of axes without any, other than the first, gets one."""
    x = x.permute([axes.index(axis) for group in order for axis in group])
    for place in (1, 2):
        if not order[place]:
            x = x.unsqueeze(len(order[0]) + place - 1)
    return x
