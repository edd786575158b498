"""Pruning a network: a smaller network that computes the same without the channels that were cut."""

import itertools
from bisect import bisect_left
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from micronet import registry
from micronet.artifact.header import StageRecord
from micronet.core.config import flag
from micronet.core.progress import Progress, Silent
from micronet.errors import FailedError, MicronetError, by_reason, count, listed
from micronet.evaluation.cost import count_macs
from micronet.models import transformer
from micronet.models.device import Example
from micronet.models.modes import copy_model
from micronet.models.precision import check_precision
from micronet.pruning.check import check_cut
from micronet.pruning.config import PruneConfig
from micronet.pruning.criteria import Criterion, Scores
from micronet.pruning.criteria.bn_scale import WHY_UNSCORED as NO_NORM
from micronet.pruning.criterion import choose_criterion
from micronet.pruning.cut import changed_layers, cut_channels, restore_cut
from micronet.pruning.groups import find_groups_and_heads, group_channels
from micronet.pruning.plan import Planner, PrunePlan
from micronet.pruning.traced_network import TracedNetwork

LISTED = 3  # layers of a reason, and reasons, of a network that cannot be pruned
TARGET_STEPS = 1000  # a target is met to within one thousandth of the channels

Cost = Callable[[nn.Module], float]


def prune_model(
    model: nn.Module,
    config: PruneConfig,
    example: Example,
    cost: Cost | None = None,
    *,
    in_place: bool = False,
    progress: Progress | None = None,
) -> tuple[nn.Module, StageRecord, PrunePlan]:
    """Cut channels of a network.

    Args:
        model: The network.
        config: How much to cut, and which channels.
        example: An input, or a tuple of inputs. It shows which channels belong together, and the pruned network is
            checked on it against the whole one with the cut channels set to zero.
        cost: The latency of a network, in any unit; needed for ``target_latency``.
        in_place: Cut the network itself, after a copy has passed the check. A torch transformer layer with fewer heads
            is a new object: use the returned network.
        progress: Where to report progress: tracing and checking run the network several times.

    Returns:
        The pruned network, the record that rebuilds its structure, and the plan.

    Raises:
        MicronetError: The network cannot be traced or copied, or none of its channels can be cut.
        FailedError: The target cannot be met, or the pruned network fails the check with the given widths.
    """
    try:
        pruner = Pruner(model, config, example, progress)
        plan, pruned, result = _pruned(pruner, config, cost)
    except _AttributesMatter:  # to more than the sizes that the network shows
        pruner = Pruner(model, config, example, progress, attributes=False)
        plan, pruned, result = _pruned(pruner, config, cost)
    pruner.report_criterion(config, plan)
    pruner.report_uncut()
    if in_place:
        pruned, result = pruner.cut(plan, in_place=True)
    result |= {"criterion": pruner.criterion} if config.criterion == "auto" else {}
    return pruned, StageRecord("prune", config.to_json(), result), plan


class _AttributesMatter(Exception):
    """A pruned network with changed attributes computes something else."""


def _pruned(pruner: "Pruner", config: PruneConfig, cost: Cost | None) -> tuple[PrunePlan, nn.Module, dict[str, Any]]:
    """Plan, cut a copy and check it."""
    while True:
        if config.widths is not None:
            plan = pruner.planner.plan_widths(_parse_widths(config.widths, pruner))
        elif config.target is not None:
            plan = _plan_for_target(pruner, *config.target, cost)
        else:
            plan = pruner.planner.plan(config.share)
        pruner.progress.step("checking the pruned network", 0, 1)
        pruned, result, wrong = pruner.attempt(plan)
        if not wrong:
            return plan, pruned, result
        if "attributes" in result and pruner.attributes:
            raise _AttributesMatter
        if config.widths is not None:
            raise FailedError(f"with these widths the network {wrong}; choose others")
        pruner.keep_whole(plan, wrong)


class Pruner:
    """A network with its channel groups found and scored."""

    def __init__(
        self,
        model: nn.Module,
        config: PruneConfig,
        example: Example,
        progress: Progress | None = None,
        *,
        attributes: bool = True,
        traced: TracedNetwork | None = None,
    ) -> None:
        """Trace the network, unless an earlier pruner has ``traced`` it, and score its channels.

        Raises MicronetError if no channel of the network can be cut, or its weights are in half precision.
        """
        self.model, self.example, self.progress, self.attributes = model, example, progress or Silent(), attributes
        check_precision(model, "pruning")
        self.progress.step("tracing the network", 0, 1)
        if traced is not None:
            self.channels = group_channels(traced.with_regular(config.regular))
        else:
            self.channels = find_groups_and_heads(model, example, config.regular, attributes=attributes)
        network = self.channels.network.model
        self.criterion: str = config.criterion
        scores: Scores | None = None
        if self.criterion == "auto":
            self.criterion, scores = choose_criterion(network, self.channels, config)
        criterion: Criterion = registry.resolve(registry.CRITERIA, self.criterion, "criterion")
        scores = criterion.scores(network, self.channels) if scores is None else scores
        self.planner = Planner(self.channels, scores, config, criterion.WHY_UNSCORED)
        self._why_unscored = criterion.WHY_UNSCORED
        self._require_free()

    def attempt(self, plan: PrunePlan) -> tuple[nn.Module, dict[str, Any], str]:
        """Return what ``cut`` does, and what the pruned network does wrong or ""."""
        pruned, result = self.cut(plan)
        return pruned, result, check_cut(pruned, self.channels, plan.channels, plan.keep, self.example)

    def keep_whole(self, plan: PrunePlan, wrong: str) -> None:
        """Leave one group whole because of which the plan's network does something ``wrong``.

        Raises MicronetError if no other group may be cut, FailedError if the plan cuts none.
        """
        cut = [group for group in self.planner.free if plan.groups[group].after < plan.groups[group].before]
        if not cut:
            raise FailedError(f"the network {wrong} although nothing is cut; this is a bug in micronet")
        fine, bad = 0, len(cut)  # how many of them can be cut, and how many cannot
        while bad - fine > 1:
            middle = (fine + bad) // 2
            self.progress.step("looking for a layer that cannot be cut", len(cut) - (bad - fine), len(cut))
            *_, why = self.attempt(self.planner.plan_some(plan, cut[:middle]))
            fine, bad, wrong = (fine, middle, why) if why else (middle, bad, wrong)
        self.planner.keep_whole(cut[fine], f"with fewer channels the network {wrong}")
        self._require_free()

    def report_criterion(self, config: PruneConfig, plan: PrunePlan) -> None:
        """Say so if weights rank the channels by default, or would rank more than twice as many as their scales."""
        if config.criterion == "auto" and self.criterion == "l2":
            self.progress.line("some channels have no batch norm, so all are ranked by weight norm (--criterion l2)")
        left = sum(group.before for group in plan.groups.values() if group.note == self._why_unscored == NO_NORM)
        if left > plan.total:
            self.progress.line(
                f"only {plan.total:,} of {left + plan.total:,} channels have a batch norm, whose scales rank them; to "
                "rank all, add --criterion l2"
            )

    def report_uncut(self) -> None:
        """Name the layers with weights that the forward computes: no group has them."""
        for why, names in by_reason(self.channels.functions).items():
            self.progress.line(f"{listed(names, LISTED)} {'stays' if len(names) == 1 else 'stay'} whole: {why}")

    def _require_free(self) -> None:
        if not self.planner.free:
            groups = list(self.planner.plan(0).groups.values())
            groups.sort(key=lambda group: group.note != self._why_unscored)  # those another criterion can score
            notes = {layer: group.note for group in groups for layer in group.layers}
            reasons = by_reason({**self.channels.functions, **notes})
            first = [f"{listed(layers, LISTED)}: {why}" for why, layers in list(reasons.items())[:LISTED]]
            raise MicronetError(
                "no channels in this network can be pruned "
                f"({'; '.join(first) or 'it has no convolution or linear layer'})"
            )

    def cut(self, plan: PrunePlan, *, in_place: bool = False) -> tuple[nn.Module, dict[str, Any]]:
        """Return the network, or a copy of it, with channels cut, and the result that ``restore`` needs."""
        layers = changed_layers(self.channels, plan.channels)
        heads = [name for name in transformer.splittable_attentions(self.model) if f"{name}.out_proj" in layers]
        pruned = transformer.split_layers(self.model if in_place else copy_model(self.model), heads)
        try:
            result = cut_channels(pruned, self.channels, plan.channels, plan.keep, attributes=self.attributes)
        except (IndexError, KeyError) as error:
            raise FailedError(
                f"micronet traced this network's channels incorrectly ({error}). This is a bug in micronet; as a "
                "workaround, exclude the affected layers with --exclude"
            ) from error
        return pruned, {"attention": heads, **result} if heads else result


def restore(model: nn.Module, record: StageRecord) -> nn.Module:
    """Rebuild the structure that a record describes. The values come from the file."""
    model = transformer.split_layers(model, record.result.get("attention", []))
    restore_cut(model, record.result)
    return model


def _parse_widths(text: str, pruner: Pruner) -> dict[int, int]:
    """Return the widths in ``--widths``, one per group that may be cut, in execution order."""
    parts = text.replace(",", " ").split()
    free = pruner.planner.free
    if invalid := [part for part in parts if not part.isdigit()]:
        raise MicronetError(f"--widths contains {invalid[0]!r}; expected integers separated by commas")
    if len(parts) != len(free):
        now = ",".join(str(pruner.channels.groups[group].width) for group in free)
        raise MicronetError(
            f"--widths has {count(len(parts), 'entry')}; this network needs {len(free)} (current widths: {now})"
        )
    return dict(zip(free, map(int, parts), strict=True))


def _plan_for_target(pruner: Pruner, target: str, share: float, cost: Cost | None) -> PrunePlan:
    """Return the plan that cuts least and meets a target. Raise FailedError if the network cannot be that small."""
    if target == "target_latency" and cost is None:
        raise MicronetError("target_latency requires cost; pass a function that returns the latency of a network")
    if cost is None and target == "target_macs":
        cost = partial(count_macs, example=pruner.example)
    measure: Cost = cost or (lambda network: sum(parameter.numel() for parameter in network.parameters()))
    limit, measured = share * measure(pruner.model), itertools.count()

    def cost_of(step: int) -> float:
        pruner.progress.step("measuring what is left", next(measured), TARGET_STEPS.bit_length() + 1)
        return measure(pruner.cut(pruner.planner.plan(step / TARGET_STEPS))[0])

    if (least := cost_of(TARGET_STEPS - 1)) > limit:
        raise FailedError(
            f"{flag(target)} {share:g} cannot be met: removing every prunable channel still leaves "
            f"{share * least / limit:.3f}; choose a higher target"
        )
    step = bisect_left(range(TARGET_STEPS - 1), True, key=lambda step: cost_of(step) <= limit)
    return pruner.planner.plan(step / TARGET_STEPS)
