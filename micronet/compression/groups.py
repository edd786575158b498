"""The groups of channels of a network that may be cut, and the widths that they may have."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from micronet.compression.plan import CRITERION, Plan
from micronet.compression.sensitivities import cut_noise, plan_noise
from micronet.core.progress import Progress
from micronet.errors import MicronetError
from micronet.models.device import Example
from micronet.pruning.channel_map import ChannelMap
from micronet.pruning.config import PruneConfig
from micronet.pruning.prune import Pruner

MULTIPLES = (8, 4, 2, 1)  # channels that kernels compute at a time, at best
LEAST_STEPS = 4  # of the widest group


@dataclass(frozen=True)
class Groups:
    """The groups that may be cut.

    Attributes:
        widths: Group -> channels, in the order of ``prune --widths``; empty if none may be cut.
        multiples: Group -> what its width must be a multiple of.
        multiple: What all widths are to be multiples of.
        pruner: Cuts them.
        why: Why none may be cut, or "".
    """

    widths: Mapping[int, int]
    multiples: Mapping[int, int]
    multiple: int = 1
    pruner: Pruner | None = None
    why: str = ""

    @classmethod
    def find(cls, model: nn.Module, example: Example) -> "Groups":
        """Find the groups of a network. Widths are multiples of 8 if the network is wide enough for several."""
        try:
            pruner = Pruner(model, PruneConfig(criterion=CRITERION), example)
            widest = max(pruner.channels.groups[group].width for group in pruner.planner.free)
            multiple = next(each for each in MULTIPLES if widest >= LEAST_STEPS * each or each == 1)
            if multiple > 1:
                config = PruneConfig(criterion=CRITERION, regular=multiple)
                pruner = Pruner(model, config, example, traced=pruner.channels.network)
            plan = pruner.planner.plan(0.5)
            *_, wrong = pruner.attempt(plan)
        except MicronetError as error:
            return cls({}, {}, why=str(error))
        if wrong:
            return cls({}, {}, why=f"with fewer channels the network {wrong}")
        channels = pruner.channels.groups
        widths = {group: channels[group].width for group in pruner.planner.free}
        return cls(widths, {group: math.lcm(multiple, channels[group].multiple) for group in widths}, multiple, pruner)

    @property
    def channels(self) -> ChannelMap | None:
        """Where the channels of each group are, if any may be cut."""
        return None if self.pruner is None else self.pruner.channels

    def named(self) -> list[tuple[str, int]]:
        """Return the first layer and the width of each group."""
        if self.pruner is None:
            return []
        return [(self.pruner.channels.groups[group].layers[0], width) for group, width in self.widths.items()]

    def noise(self, noise: Callable[[nn.Module], float], progress: Progress) -> dict[str, list[tuple[float, float]]]:
        """Return the noise of cutting shares of each group alone; see ``cut_noise``."""
        assert self.pruner is not None
        return cut_noise(self.pruner, noise, progress)

    def plan_noise(self, plan: Plan, cuts: Mapping[str, Sequence[Sequence[float]]]) -> float:
        """Return the noise that a plan's widths add; see ``plan_noise``."""
        return plan_noise(plan, self.widths, cuts)

    def allows(self, plan: Plan) -> bool:
        """Return True if the network can have a plan's widths."""
        assert self.pruner is not None
        try:
            self.pruner.planner.plan_widths(dict(zip(self.widths, plan.widths, strict=True)))
        except MicronetError:
            return False
        return True

    def uniform(self, share: float) -> tuple[int, ...]:
        """Return the widths if the same share of every group is cut, as far as its multiple allows."""
        assert self.pruner is not None
        planner = self.pruner.planner
        wanted: dict[int, int] = {group: planner.rounded(group, share) for group in self.widths}
        try:
            plan = planner.plan_some(planner.plan_widths(wanted), list(wanted))
        except MicronetError:  # grouped layers, whose widths depend on one another
            layer = PruneConfig(criterion=CRITERION, regular=self.multiple, scope="layer")
            pruner = Pruner(self.pruner.model, layer, self.pruner.example, traced=self.pruner.channels.network)
            plan = pruner.planner.plan(share)
        found: dict[int, Any] = plan.groups
        return tuple(found[group].after for group in self.widths)
