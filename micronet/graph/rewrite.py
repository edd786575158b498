"""Rewriting a network's graph where a named place is needed that no module of it is.

The network becomes a ``torch.fx.GraphModule`` with the same submodules under the same names, so its state-dict keys
stay.
"""

from dataclasses import dataclass, field

from torch import fx, nn

from micronet.graph.trace import Graph
from micronet.models.layers import ModeCall, Tap


@dataclass(frozen=True)
class Split:
    """A place on the way to some readers of a tensor alone, with a ReLU left out of the way.

    ``read``: the node that is read. ``without``: the ReLU node before it, or None. ``readers``: nodes to be redirected.
    """

    read: str
    without: str | None
    readers: list[str]


@dataclass
class Outline:
    """What to rewrite. ``taps``: nodes behind which a place is added for all their readers."""

    taps: list[str] = field(default_factory=list)
    splits: list[Split] = field(default_factory=list)


def tap_name(place: str) -> str:
    """Return the name of the tap behind the node called ``place``."""
    return f"{place}_tap"


def split_name(place: str) -> str:
    """Return the name of the place that a split of the node called ``place`` makes."""
    return f"{place}_split"


def rewrite(model: nn.Module, outline: Outline) -> nn.Module:
    """Return the network with its places added.

    A functional dropout becomes a module, since tracing would freeze its mode. Raises ValueError where the forward
    differs between training and evaluation in more than that, KeyError where a node is not there.
    """
    graph = Graph(model)
    if graph.mode_keys is None:
        raise ValueError("its forward differs between training and evaluation")
    nodes = {node.name: node for node in graph.fx.nodes}
    outlined = fx.GraphModule(model, graph.fx)
    outlined.training = model.training
    for split in outline.splits:  # before the taps, which would stand in the way
        _split(outlined, graph, nodes, split)
    for place in outline.taps:
        node = nodes[place]
        outlined.add_submodule(tap_name(place), Tap())
        with graph.fx.inserting_after(node):
            tap = graph.fx.call_module(tap_name(place), (node,))
        node.replace_all_uses_with(tap, delete_user_cb=lambda user, tap=tap: user is not tap)
    _outline_modes(outlined, graph.mode_keys)
    graph.fx.eliminate_dead_code()
    outlined.recompile()
    return outlined


def _split(outlined: fx.GraphModule, graph: Graph, nodes: dict[str, fx.Node], split: Split) -> None:
    """Give some readers of a node a place of their own, behind a copy of what lies between it and the ReLU."""
    read = end = last = nodes[split.read]
    if split.without is not None:
        relu = nodes[split.without]
        between: list[fx.Node] = []
        node = read
        while node is not relu:
            between.insert(0, node)
            node = graph.inputs(node)[0]
        end, before = graph.inputs(relu)[0], relu
        _not_in_place(graph, relu)
        for node in between:
            with graph.fx.inserting_after(last):
                last = graph.fx.node_copy(
                    node, {**{used: used for used in node.all_input_nodes}, before: end}.__getitem__
                )
            end, before = last, node
    outlined.add_submodule(split_name(split.read), Tap())
    with graph.fx.inserting_after(last):
        tap = graph.fx.call_module(split_name(split.read), (end,))
    for reader in split.readers:
        nodes[reader].replace_input_with(read, tap)


def _not_in_place(graph: Graph, relu: fx.Node) -> None:
    """Keep a ReLU's input as it is, since it has another reader now."""
    if relu.op == "call_module":
        graph.module(relu).inplace = False  # type: ignore[union-attr]
    elif relu.op == "call_method":
        relu.target = "relu"
    else:
        relu.args, relu.kwargs = relu.args[:1], {}


def _outline_modes(model: fx.GraphModule, keys: dict[str, str | int]) -> None:
    """Turn calls whose arguments say ``training`` into modules that follow the network's mode."""
    for node in list(model.graph.nodes):
        if node.name in keys:
            model.add_submodule(f"{node.name}_mode", ModeCall(node.target, keys[node.name]))
            node.target, node.op = f"{node.name}_mode", "call_module"
