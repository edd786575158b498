"""How much each group of channels matters: one group cut at a time, by several shares, the rest whole."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import nn

from micronet.core.progress import Progress
from micronet.errors import MicronetError
from micronet.pruning.prune import Pruner

SHARES = (0.25, 0.5, 0.75)


class GroupSensitivity(NamedTuple):
    """A group cut alone: the layers that make its channels, their number, and share cut -> accuracy lost (0..1).

    A share that the group cannot lose alone, because of what its channels are combined with, is left out.
    """

    layers: list[str]
    channels: int
    drops: dict[float, float]


def measure_sensitivity(
    pruner: Pruner, accuracy: Callable[[nn.Module], float], progress: Progress, shares: Sequence[float] = SHARES
) -> list[GroupSensitivity]:
    """Cut each group alone; return the groups, the one that loses most first."""
    base = accuracy(pruner.model)
    found = []
    groups = pruner.planner.free
    for done, group in enumerate(groups, 1):
        drops: dict[float, float] = {}
        for share in shares:
            try:
                plan = pruner.planner.plan_widths({group: pruner.planner.rounded(group, share)})
            except MicronetError:
                continue
            drops[share] = base - accuracy(pruner.cut(plan)[0])
        found.append(GroupSensitivity(pruner.flow.names[group], pruner.flow.widths[group], drops))
        progress.step("measuring groups", done, len(groups))
    return sorted(found, key=lambda item: -max(item.drops.values(), default=0))
