"""Rewriting a network's graph where a quantizer needs a module that the network does not have.

The network becomes a ``torch.fx.GraphModule`` with the same submodules under the same names, so its state-dict keys
stay the same.
"""

import operator
from dataclasses import dataclass, field
from functools import partial

from torch import fx, nn

from micronet.graph.graph_module import GraphModule
from micronet.graph.ops import is_opaque, writes_in_place
from micronet.graph.plain import with_plain
from micronet.graph.trace import Graph
from micronet.graph.training import outline_mode_calls
from micronet.graph.two_modes import follow_modes, pair_nodes
from micronet.models.layers import Tap


@dataclass(frozen=True)
class Branch:
    """A tap that only some consumers of a tensor, ``readers``, will read in place of the node ``read``.

    ``without``: the ReLU node before it that the branch leaves out, or None. The names are keys of stored records.
    """

    read: str
    without: str | None
    readers: list[str]


@dataclass
class Outline:
    """The rewrites of a graph. ``taps``: nodes to put a tap behind, for all their consumers."""

    taps: list[str] = field(default_factory=list)
    splits: list[Branch] = field(default_factory=list)


def tap_name(node: str) -> str:
    """Return the name of the tap behind a node."""
    return f"{node}_tap"


def branch_name(node: str) -> str:
    """Return the name of the tap that a branch from a node adds."""
    return f"{node}_split"


def rewrite(model: nn.Module, outline: Outline) -> nn.Module:
    """Return the network with its taps and branches added.

    A functional dropout becomes a module, because tracing would freeze its mode. If the forward does more in training
    mode, the network has a graph for each mode. Raises ValueError if training mode does not do all that eval mode does,
    KeyError if a node does not exist.
    """
    graph = Graph(model, plain=False)  # a file's placement says whether its network has plain layers
    if graph.mode_keys is None:
        return _rewrite_both(model, graph, outline)
    outlined = GraphModule(model, graph.fx)
    outlined.training = model.training
    _add(outlined, graph, graph.fx, {node.name: node for node in graph.fx.nodes}, outline)
    outline_mode_calls(outlined, graph.mode_keys)
    _clean(outlined)
    return outlined


def _rewrite_both(model: nn.Module, graph: Graph, outline: Outline) -> nn.Module:
    """Rewrite the graphs of both modes."""
    partners = pair_nodes(graph.fx, graph.training)
    if partners is None:
        raise ValueError("forward() takes different paths in training and evaluation")
    outlined = with_plain(model, {}, graph.fx, graph.training)  # with the modules of both
    _add(outlined, graph, graph.fx, {node.name: node for node in graph.fx.nodes}, outline)
    _add(outlined, graph, graph.training, partners, outline)
    trained = GraphModule(outlined, graph.training)
    for each in (outlined, trained):
        _clean(each)
    return follow_modes(outlined, trained)


def _add(
    outlined: fx.GraphModule, graph: Graph, rewritten: fx.Graph, nodes: dict[str, fx.Node], outline: Outline
) -> None:
    """Add taps and branches to the graph of one mode; ``nodes``: its nodes by their names in eval mode."""
    for branch in outline.splits:  # before the taps, which would get in between
        _add_branch(outlined, graph, rewritten, nodes, branch)
    for name in outline.taps:
        node = nodes[name]
        tap = _call_tap(outlined, rewritten, tap_name(name), after=node, read=node)
        node.replace_all_uses_with(tap, delete_user_cb=partial(operator.is_not, tap))


def _call_tap(outlined: fx.GraphModule, graph: fx.Graph, name: str, *, after: fx.Node, read: fx.Node) -> fx.Node:
    if not hasattr(outlined, name):  # both modes share it
        outlined.add_submodule(name, Tap())
    with graph.inserting_after(after):
        return graph.create_node("call_module", name, (read,))  # call_module looks for it in the graph's owner


def _clean(outlined: fx.GraphModule) -> None:
    outlined.graph.eliminate_dead_code(lambda node: node.is_impure() or writes_in_place(node) or is_opaque(node))
    outlined.recompile()


def _add_branch(
    outlined: fx.GraphModule, graph: Graph, rewritten: fx.Graph, nodes: dict[str, fx.Node], branch: Branch
) -> None:
    """Add a branch's tap. If it leaves out a ReLU, copy the nodes behind the ReLU to read the ReLU's input."""
    read = last = nodes[branch.read]
    end = read
    if branch.without is not None:
        before = nodes[branch.without]
        between: list[fx.Node] = []
        node = read
        while node is not before:
            between.insert(0, node)
            node = node.all_input_nodes[0]
        end = before.all_input_nodes[0]
        _make_out_of_place(graph, before)
        for node in between:
            inputs = {**{used: used for used in node.all_input_nodes}, before: end}
            with rewritten.inserting_after(last):
                end = last = rewritten.node_copy(node, inputs.__getitem__)
            before = node
    tap = _call_tap(outlined, rewritten, branch_name(branch.read), after=last, read=end)
    for reader in branch.readers:
        nodes[reader].replace_input_with(read, tap)


def _make_out_of_place(graph: Graph, relu: fx.Node) -> None:
    """Stop a ReLU from overwriting its input, which now has another consumer."""
    if relu.op == "call_module":
        graph.module(relu).inplace = False  # type: ignore[union-attr]
    elif relu.op == "call_method":
        relu.target = "relu"
    else:
        relu.args, relu.kwargs = relu.args[:1], {}
