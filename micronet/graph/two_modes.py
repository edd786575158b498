"""A network whose forward does more in training mode, such as an auxiliary classifier, as two graphs of its modules."""

from collections import defaultdict
from collections.abc import Mapping
from functools import wraps
from typing import Any

from torch import fx, nn

from micronet.graph.symbolic import MADE


def pair_nodes(evaluating: fx.Graph, training: fx.Graph) -> dict[str, fx.Node] | None:
    """Return the node in training mode that computes what each node in eval mode does, by the latter's name.

    Outputs are left out. None if a node has no such partner, or if a graph holds tensors that its forward made, which
    every trace names anew.
    """
    waiting: dict[Any, list[fx.Node]] = defaultdict(list)
    for node in training.nodes:
        waiting[node.op, node.target].append(node)
    pairs: dict[fx.Node, fx.Node] = {}
    for node in evaluating.nodes:
        if node.op == "output":
            continue
        others = waiting[node.op, node.target]
        found = next((other for other in others if _is_partner(node, other, pairs)), None)
        if found is None or str(node.target).startswith(MADE):
            return None
        others.remove(found)
        pairs[node] = found
    return {node.name: other for node, other in pairs.items()}


def _is_partner(node: fx.Node, other: fx.Node, pairs: Mapping[fx.Node, fx.Node]) -> bool:
    return _agree((node.args, dict(node.kwargs)), (other.args, dict(other.kwargs)), pairs)


def _agree(own: Any, other: Any, pairs: Mapping[fx.Node, fx.Node]) -> bool:
    """Return True if arguments are the same, apart from booleans, which may say the mode."""
    if isinstance(own, fx.Node):
        return pairs.get(own) is other
    if type(own) is not type(other):
        return False
    if isinstance(own, (tuple, list)):
        return len(own) == len(other) and all(_agree(x, y, pairs) for x, y in zip(own, other, strict=True))
    if isinstance(own, dict):
        return own.keys() == other.keys() and all(_agree(own[key], other[key], pairs) for key in own)
    if isinstance(own, slice):
        return all(_agree(getattr(own, end), getattr(other, end), pairs) for end in ("start", "stop", "step"))
    return isinstance(own, bool) or bool(own == other)


def follow_modes(evaluating: fx.GraphModule, training: fx.GraphModule) -> nn.Module:
    """Return a network that does in each mode what one of two networks with the same modules does."""
    forwards = [type(evaluating).forward, type(training).forward]

    @wraps(forwards[False])  # torch.fx and the exporters read the names of its arguments
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forwards[self.training](self, *args, **kwargs)

    network: nn.Module = type("TwoModes", (nn.Module,), {"forward": forward})()
    for kind in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
        getattr(network, kind).update(getattr(evaluating, kind))
    network.training = evaluating.training
    return network
