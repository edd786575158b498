"""The ``prune`` stage: a network becomes a smaller one that computes the same without the channels cut."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from micronet.errors import FailedError, MicronetError, first_line
from micronet.graph import Graph, trace
from micronet.history import StageRecord
from micronet.pruning.config import PruneConfig
from micronet.pruning.criteria import bn_scale
from micronet.pruning.cut import cut, resize
from micronet.pruning.flow import Flow
from micronet.pruning.numbering import STRIDE, Ids
from micronet.pruning.plan import Plan, Planner

TOLERANCE = 1e-6  # relative, of float64 arithmetic in another order


def prune_model(
    model: nn.Module, config: PruneConfig, example: Tensor | None = None
) -> tuple[nn.Module, StageRecord, Plan]:
    """Return a copy of a network with channels cut, the record that rebuilds it, and what was decided.

    ``example``: an input, on which the cut network is then held against the whole one with its cut channels silenced.
    Raises MicronetError where the network cannot be traced or copied, or has no channels that could be judged;
    FailedError where the cut network does not compute what it should.
    """
    try:
        pruned = copy.deepcopy(model)
    except RuntimeError as error:  # hooks of old-style weight norms hold tensors that cannot be copied
        raise MicronetError(f"the network cannot be copied: {first_line(error)}") from error
    graph = _trace(pruned)
    old = Flow(graph)
    plan = _plan(graph, old, config)
    new = old.with_widths({group: chosen.after for group, chosen in plan.groups.items()})
    kept = {group: chosen.kept for group, chosen in plan.groups.items()}
    sizes = cut(pruned, old, new, kept)
    if example is not None:
        _check(model, pruned, old, kept, example)
    return pruned, StageRecord("prune", config.to_json(), {"sizes": sizes}), plan


def restore(model: nn.Module, record: StageRecord) -> nn.Module:
    """Rebuild the structure that a record describes; the values come from the file."""
    for name, sizes in record.result["sizes"].items():
        resize(model.get_submodule(name), sizes)
    return model


def channel_flow(model: nn.Module) -> Flow:
    """Return the flow of a network's channels. Raises MicronetError where it cannot be traced."""
    return Flow(_trace(model))


def _plan(graph: Graph, flow: Flow, config: PruneConfig) -> Plan:
    scores = bn_scale.scores(graph.model, flow)
    plan = Planner(flow, scores, config, bn_scale.WHY_UNJUDGED).plan()
    if not plan.total:
        reasons = "; ".join(f"{', '.join(group.layers)}: {group.note}" for group in list(plan.groups.values())[:3])
        raise MicronetError(f"no channel of this network can be cut ({reasons or 'no layer of it can be followed'})")
    return plan


def _trace(model: nn.Module) -> Graph:
    graph = trace(model)
    if graph is None:
        raise MicronetError("the network cannot be traced by torch.fx, so which channels belong together is unknown")
    return graph


@torch.no_grad()
def _check(model: nn.Module, pruned: nn.Module, flow: Flow, kept: dict[int, list[int]], example: Tensor) -> None:
    """Raise FailedError where the cut network's output is not that of the whole one with cut channels silenced."""
    whole, small = (copy.deepcopy(network).double().eval() for network in (model, pruned))
    for name, layer in flow.layers.items():
        if layer.inputs is not None:
            whole.get_submodule(name).register_forward_pre_hook(_silence(layer.inputs, kept))
    try:
        expected = whole(example.double())
    except RuntimeError:  # the network itself takes no such input; not the cut's fault
        return
    try:
        found = small(example.double())
    except (RuntimeError, ValueError) as error:
        raise FailedError(f"the pruned network does not run, which is a bug: {first_line(error)}") from error
    if isinstance(expected, Tensor) and (found - expected).norm() > TOLERANCE * expected.norm():
        raise FailedError("the pruned network does not compute what it should, which is a bug; nothing was written")


def _silence(ids: Ids, kept: dict[int, list[int]]) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    """Return a hook that zeroes the channels of a layer's input that are cut."""
    mask = torch.tensor([channel in kept[group] for group, channel in (divmod(i, STRIDE) for i in ids.tolist())])

    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x = inputs[0]
        shape = [-1] if isinstance(module, nn.Linear) else [1, -1, *[1] * (x.dim() - 2)]
        return (x * mask.to(x).view(shape), *inputs[1:])

    return hook
