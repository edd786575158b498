"""The ``prune`` stage: a network becomes a smaller one that computes the same without the channels cut."""

import copy

from torch import nn

from micronet.errors import MicronetError
from micronet.graph import Graph, trace
from micronet.history import StageRecord
from micronet.pruning.config import PruneConfig
from micronet.pruning.criteria import bn_scale
from micronet.pruning.cut import cut, resize
from micronet.pruning.flow import Flow
from micronet.pruning.plan import Plan, Planner


def plan_pruning(model: nn.Module, config: PruneConfig) -> Plan:
    """Say which channels would go. Raises MicronetError where the network cannot be traced or nothing can go."""
    graph = _trace(model)
    return _plan(graph, Flow(graph), config)


def prune_model(model: nn.Module, config: PruneConfig) -> tuple[nn.Module, StageRecord, Plan]:
    """Return a copy of a network with channels cut, the record that rebuilds it, and what was decided.

    Raises MicronetError where the network cannot be traced or has no channels that could be judged.
    """
    pruned = copy.deepcopy(model)
    graph = _trace(pruned)
    old = Flow(graph)
    plan = _plan(graph, old, config)
    new = Flow(graph, {group: chosen.after for group, chosen in plan.groups.items()}, old)
    sizes = cut(pruned, old, new, {group: chosen.kept for group, chosen in plan.groups.items()})
    return pruned, StageRecord("prune", config.to_json(), {"sizes": sizes}), plan


def restore(model: nn.Module, record: StageRecord) -> nn.Module:
    """Rebuild the structure that a record describes; the values come from the file."""
    for name, sizes in record.result["sizes"].items():
        resize(model.get_submodule(name), sizes)
    return model


def cuttable(model: nn.Module) -> Flow:
    """Return the flow of a network's channels. Raises MicronetError where it cannot be traced."""
    return Flow(_trace(model))


def _plan(graph: Graph, flow: Flow, config: PruneConfig) -> Plan:
    scores = bn_scale.scores(graph.model, flow)
    plan = Planner(graph, flow, scores, config, bn_scale.WHY_UNJUDGED).plan()
    if not plan.total:
        reasons = "; ".join(f"{', '.join(group.layers)}: {group.note}" for group in list(plan.groups.values())[:3])
        raise MicronetError(f"no channel of this network can be cut ({reasons or 'it has no layers to cut'})")
    return plan


def _trace(model: nn.Module) -> Graph:
    graph = trace(model)
    if graph is None:
        raise MicronetError("the network cannot be traced by torch.fx, so which channels belong together is unknown")
    return graph
