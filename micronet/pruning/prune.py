"""The ``prune`` stage: a network becomes a smaller one that computes the same without the channels cut."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from micronet import registry
from micronet.artifact.history import StageRecord
from micronet.core.config import flag
from micronet.errors import FailedError, MicronetError, first_line
from micronet.evaluation.cost import count_macs
from micronet.models import transformer
from micronet.models.inputs import Example
from micronet.pruning.check import check
from micronet.pruning.config import PruneConfig
from micronet.pruning.cut import changed_layers, cut, resize
from micronet.pruning.flow import Flow
from micronet.pruning.network import open_network
from micronet.pruning.plan import Plan, Planner
from micronet.pruning.scaling import follow

PARTS = 1000  # a target is met to within this many parts of the channels

Cost = Callable[[nn.Module], float]


def prune_model(
    model: nn.Module, config: PruneConfig, example: Example, cost: Cost | None = None, *, in_place: bool = False
) -> tuple[nn.Module, StageRecord, Plan]:
    """Return a copy of a network with channels cut, the record that rebuilds it, and what was decided.

    ``in_place``: cut the network itself and return it, once a copy has passed the check.

    ``example``: an input, or a tuple of them. The shapes that follow from it tell which channels belong together, and
    on it the cut network is then held against the whole one with its cut channels silenced. ``cost``: what a network
    costs, where the config has a target for latency; parameters and multiply-accumulates are counted here.
    Raises MicronetError where the network cannot be traced or copied, or has no channels that could be judged;
    FailedError where the cut network does not compute what it should.
    """
    pruner = Pruner(model, config, example)
    if config.widths is not None:
        plan = pruner.planner.plan_widths(_widths(config.widths, pruner))
    elif config.target is not None:
        plan = _meet(pruner, *config.target, cost)
    else:
        plan = pruner.planner.plan(config.share)
    pruned, result = pruner.cut(plan)
    pruner.check(pruned, plan)
    if in_place:
        pruned, result = pruner.cut(plan, in_place=True)
    return pruned, StageRecord("prune", config.to_json(), result), plan


class Pruner:
    """One network with its channels followed and judged, and the copies of it that a plan cuts."""

    def __init__(self, model: nn.Module, config: PruneConfig, example: Example) -> None:
        """Raises MicronetError where nothing of the network can be cut."""
        self.model, self.example = model, example
        self.flow = _flow_of_heads(model, example, config.regular) or channel_flow(model, example, config.regular)
        criterion = registry.resolve(registry.CRITERIA, config.criterion, "criterion")
        scores = criterion.scores(self.flow.network.model, self.flow)
        self.planner = Planner(self.flow, scores, config, criterion.WHY_UNJUDGED)
        if not self.planner.free:
            whole = list(self.planner.plan(0).groups.values())
            # Those come first that another criterion would judge.
            whole = sorted(whole, key=lambda group: group.note != criterion.WHY_UNJUDGED)
            reasons = "; ".join(f"{_short(group.layers)}: {group.note}" for group in whole[:3])
            raise MicronetError(
                f"no channel of this network can be cut ({reasons or 'no layer of it can be followed'})"
            )

    def cut(self, plan: Plan, *, in_place: bool = False) -> tuple[nn.Module, dict[str, Any]]:
        """Return a copy, or the network itself, with channels cut, and what ``restore`` needs to do the same."""
        layers = changed_layers(self.flow, plan.flow)
        heads = [name for name in transformer.splittable_attentions(self.model) if f"{name}.out_proj" in layers]
        pruned = transformer.split_attentions(self.model if in_place else _copied(self.model), heads)
        try:
            result: dict[str, Any] = {"sizes": cut(pruned, self.flow, plan.flow, _kept(plan))}
        except (IndexError, KeyError) as error:
            raise FailedError(f"the channels of this network were followed wrongly, which is a bug: {error}") from error
        return pruned, {"attention": heads, **result} if heads else result

    def check(self, pruned: nn.Module, plan: Plan) -> None:
        """Raise FailedError where a cut network's output is not that of the whole one with cut channels silenced."""
        check(pruned, self.flow, plan.flow, _kept(plan), self.example)


def _short(layers: list[str]) -> str:
    return layers[0] if len(layers) == 1 else f"{layers[0]} and {len(layers) - 1} more"


def _kept(plan: Plan) -> dict[int, list[int]]:
    return {group: chosen.kept for group, chosen in plan.groups.items()}


def _widths(asked: str, pruner: Pruner) -> dict[int, int]:
    """Return the widths that ``--widths`` gives, one a group that may be cut, in the order of the forward."""
    parts = [part.strip() for part in asked.replace(",", " ").split()]
    free = pruner.planner.free
    if wrong := [part for part in parts if not part.isdigit()]:
        raise MicronetError(f"--widths has {wrong[0]!r}; allowed: whole numbers by commas")
    if len(parts) != len(free):
        now = ",".join(str(pruner.flow.widths[group]) for group in free)
        raise MicronetError(f"--widths has {len(parts)} numbers; this network takes {len(free)}, now {now}")
    return dict(zip(free, map(int, parts), strict=True))


def _meet(pruner: Pruner, target: str, share: float, cost: Cost | None) -> Plan:
    """Return the plan that cuts as little as a target allows, to a thousandth of the channels.

    Raises FailedError where the network cannot be made so small.
    """
    if cost is None:
        if target == "target_latency":
            raise MicronetError("target_latency needs a cost: a function from a network to its latency")
        cost = partial(count_macs, example=pruner.example) if target == "target_macs" else _count_parameters
    limit = share * cost(pruner.model)
    low, high = 0, PARTS - 1
    plan = pruner.planner.plan(high / PARTS)
    if (least := cost(pruner.cut(plan)[0])) > limit:
        raise FailedError(
            f"{flag(target)} {share:g} cannot be met: with all cut that can be, {share * least / limit:.3f} is left"
        )
    while low < high:
        middle = (low + high) // 2
        tried = pruner.planner.plan(middle / PARTS)
        if cost(pruner.cut(tried)[0]) <= limit:
            high, plan = middle, tried
        else:
            low = middle + 1
    return plan


def _count_parameters(model: nn.Module) -> float:
    return sum(parameter.numel() for parameter in model.parameters())


def restore(model: nn.Module, record: StageRecord) -> nn.Module:
    """Rebuild the structure that a record describes; the values come from the file."""
    transformer.split_attentions(model, record.result.get("attention", []))
    for name, sizes in record.result["sizes"].items():
        resize(model.get_submodule(name), sizes)
    return model


def channel_flow(model: nn.Module, example: Example, regular: int = 1) -> Flow:
    """Return the flow of a network's channels. Raises MicronetError where it cannot be traced."""
    return follow(open_network(model, example, regular))


def _flow_of_heads(model: nn.Module, example: Example, regular: int) -> Flow | None:
    """Return the flow of a network whose attentions have layers of their own; None where it has none, or needs torch's.

    The flow's network is ``transformer.with_split_attentions``.
    """
    if not transformer.splittable_attentions(model):
        return None
    try:
        return channel_flow(transformer.with_split_attentions(model), example, regular)
    except (MicronetError, RuntimeError):  # a forward that reads an attention's own tensors, perhaps
        return None


def _copied(model: nn.Module) -> nn.Module:
    """Return a copy of a network. Raises MicronetError."""
    try:
        return copy.deepcopy(model)
    except RuntimeError as error:  # hooks of old-style weight norms hold tensors that cannot be copied
        raise MicronetError(f"the network cannot be copied: {first_line(error)}") from error
