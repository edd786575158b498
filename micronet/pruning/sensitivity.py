"""Sensitivity: the accuracy lost when each group of channels is cut alone, by several shares."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from micronet.core.metrics import metric_label
from micronet.core.progress import Progress
from micronet.errors import MicronetError
from micronet.evaluation import plot
from micronet.pruning.prune import Pruner

SHARES = (0.25, 0.5, 0.75)


class GroupSensitivity(NamedTuple):
    """The sensitivity of a group with a number of channels, produced by ``layers``.

    ``drops``: share cut -> accuracy lost (0 to 1). Shares that the group cannot lose alone are missing.
    """

    layers: list[str]
    channels: int
    drops: dict[float, float]


def measure_sensitivity(
    pruner: Pruner, accuracy: Callable[[nn.Module], float], progress: Progress, shares: Sequence[float] = SHARES
) -> list[GroupSensitivity]:
    """Cut each group alone and measure the accuracy; return the groups, the most sensitive first."""
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
        whole = pruner.channels.groups[group]
        found.append(GroupSensitivity(whole.layers, whole.width, drops))
        progress.step("measuring groups", done, len(groups))
    return sorted(found, key=lambda item: -max(item.drops.values(), default=0))


def draw(rows: Sequence[GroupSensitivity], path: Path, metric: str = "accuracy") -> None:
    """Draw one line per group, how much the metric is worse over the share cut, into a .png or .svg file."""
    scale, unit = (100, " (percentage points)") if metric == "accuracy" else (1, "")

    def fill(axes: Any) -> None:
        for row in rows:
            axes.plot(
                [0, *row.drops], [0, *(scale * drop for drop in row.drops.values())], marker="o", label=row.layers[0]
            )
        axes.set_xlabel("fraction of the group's channels removed")
        axes.set_ylabel(f"{metric_label(metric)} drop{unit}")
        axes.legend(fontsize=7)

    plot.draw(path, (8, 5), fill)
