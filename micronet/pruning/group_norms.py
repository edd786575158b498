"""Group norms on channel ids: the channels that a norm takes as one group are kept or cut as one.

A channel depends on those of its own group alone (Wu and He 2018, arXiv:1803.08494, equation 2). So whole groups can be
cut, and the norm then has fewer of them.
"""

from fractions import Fraction

from torch import Tensor, nn
from torch.nn import functional as F

from micronet.graph.attributes import Attribute
from micronet.pruning.attributes import Attributes
from micronet.pruning.group_table import GroupTable
from micronet.pruning.ids import STRIDE, Ids
from micronet.pruning.node_call import NodeCall
from micronet.pruning.traced_network import TracedNetwork


def tie_normalized(
    call: NodeCall, ids: Ids | None, network: TracedNetwork, table: GroupTable, attributes: Attributes
) -> str:
    """Keep or cut the channels of each group as one, and fit the number of groups to these widths.

    Args:
        call: The call of a group norm.
        ids: Its channels; None if they do not lie along the axis that it takes in groups.
        network: The network.
        table: Where the channels of a group are tied.
        attributes: Those of the user's modules, one of which may hold the number of groups.

    Returns:
        Why some of its channels have to stay, or "".
    """
    number = _number(call, network)
    if number == 1 or ids is None:
        return call.why_pinned
    size, rest = divmod(call.fixed.shape[1], number)
    groups = f"{call.subject} normalizes groups of {size} channels"
    uneven = f"{groups}, which do not divide its channels into equal parts"
    if rest or len(ids) % size:
        return uneven
    rows = table.canonical(ids).reshape(-1, size)
    spans = bool((rows // STRIDE != rows[:, :1] // STRIDE).any())
    unsuited = f"{groups}, and no smaller number of groups suits the layers before it"
    why = f"{groups}, some of which span several joined tensors" if spans else unsuited
    table.merge(rows[:, :1].repeat(size, 1).ravel(), rows.ravel(), why=why)
    if isinstance(number, Attribute):
        fits = attributes.fit(number, Fraction(len(rows)))
    else:
        fits = isinstance(call.module, nn.GroupNorm) and str(call.node.target) not in network.plain
    return "" if fits else f"{groups}, and forward() uses a fixed number of them"


def _number(call: NodeCall, network: TracedNetwork) -> int:
    """Return the number of groups in the whole network, as the attribute of the user's that holds it, if one does."""
    if isinstance(call.module, nn.GroupNorm):
        plain = network.plain.get(str(call.node.target))
        number: int = plain.sizes.get("num_groups", call.module.num_groups) if plain else call.module.num_groups
        return number
    args, kwargs = call.unresolved
    return args[1] if len(args) > 1 else kwargs["num_groups"]  # type: ignore[no-any-return]


def weights_of(call: NodeCall) -> list[Tensor]:
    """Return the arguments of ``F.group_norm`` with one value per channel; none for anything else."""
    given = [call.argument(2, "weight"), call.argument(3, "bias")] if call.node.target is F.group_norm else []
    return [x for x in given if isinstance(x, Tensor)]
