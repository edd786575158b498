"""A network cut into parts that run one after the other, each from a single tensor to a single tensor.

A part is what has to be looked at together: a residual block, or some consecutive layers of a chain. It is found from
the traced graph, whatever the network: at a cut, only one tensor is still to be read.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from micronet.graph import ops
from micronet.graph.graph_module import GraphModule
from micronet.graph.trace import Graph, trace
from micronet.models.layers import ModeCall, Tap

CHAIN = 3  # consecutive layers, each with a cut behind it, that make a block
LARGEST = 16  # layers of a block; in larger ones (DenseNet's), layers are treated one by one


@dataclass(frozen=True)
class Part:
    """A part of a network, in its float and its quantized form; their modules are the network's own.

    Attributes:
        floating: Computes the part in the float network.
        quantized: Computes it in the quantized network.
        layers: The names of its layers, among those asked for.
        is_block: Whether it computes one tensor (N, ...) from one, with at most ``LARGEST`` layers.
    """

    floating: nn.Module
    quantized: nn.Module
    layers: list[str]
    is_block: bool


@torch.no_grad()
def split(floating: nn.Module, quantized: nn.Module, names: list[str], images: Tensor) -> tuple[list[Part], int]:
    """Cut a network into parts.

    Args:
        floating: The float network.
        quantized: The same network, quantized and calibrated, in eval mode.
        names: The layers to divide among the parts, in the order of the forward pass.
        images: Inputs.

    Returns:
        The parts, in order, and the most bytes that an image takes between two of them. A network that cannot be
        traced is one part, which is not a block.
    """
    whole = [Part(floating, quantized, names, is_block=False)], images[:1].nbytes
    graph, plain = trace(quantized, images[:2]), trace(floating, images[:2])
    if graph is None or plain is None:
        return whole
    same = _counterparts(graph, plain)
    nodes = list(graph.fx.nodes)
    starts = [node for node in nodes if node.op == "placeholder" and node.users]
    if same is None or len(starts) != 1:
        return whole
    sizes = _measure(graph, images[:3])
    layers = [node for node, module in graph.calls() if str(node.target) in names and graph.call_count(module) == 1]
    groups = _group(graph, layers, _cuts(nodes, sizes))
    starts += [end for _, end in groups if end is not None]
    parts = []
    for start, (members, end) in zip(starts, groups, strict=True):
        single = end is not None or nodes[-1].args[0] in sizes  # a network may give several tensors, in a tuple
        parts.append(
            Part(
                _subgraph(plain, same[start], None if end is None else same[end]),
                _subgraph(graph, start, end),
                [str(node.target) for node in members],
                is_block=single and len(members) <= LARGEST,
            )
        )
    return parts, max(sizes[node] for node in starts)


def _counterparts(graph: Graph, plain: Graph) -> dict[fx.Node, fx.Node] | None:
    """Return the float network's node for each node of the quantized one; None if they differ in more than taps."""
    found: dict[fx.Node, fx.Node] = {}
    known = dict(plain.model.named_modules())
    waiting = iter(plain.fx.nodes)
    for node in graph.fx.nodes:
        module = graph.module(node)
        if isinstance(module, Tap) and str(node.target) not in known:
            found[node] = found[node.all_input_nodes[0]]
            continue
        other = next(waiting, None)
        calls = isinstance(module, ModeCall)  # placing quantizers makes modules of functions that depend on the mode
        if other is None or not (calls or (node.op, str(node.target)) == (other.op, str(other.target))):
            return None
        found[node] = other
    return found if next(waiting, None) is None else None


def _measure(graph: Graph, images: Tensor) -> dict[fx.Node, int]:
    """Return the bytes that an image takes in each tensor whose first axis is the images."""
    sizes: dict[fx.Node, int] = {}

    class Measuring(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            out: object = super().run_node(n)
            if isinstance(out, Tensor) and out.dim() and len(out) == len(images):
                sizes[n] = out[0].nbytes
            return out

    Measuring(graph.model, graph=graph.fx).run(images.clone())
    return sizes


def _cuts(nodes: list[fx.Node], sizes: dict[fx.Node, int]) -> dict[fx.Node, int]:
    """Return the nodes after which no other node's output is still to be read, and their positions."""
    place = {node: position for position, node in enumerate(nodes)}
    last = {node: max((place[user] for user in node.users), default=-1) for node in nodes if node.op != "get_attr"}
    cuts, read_until = {}, -1  # the last position that reads a node before this one
    for node in nodes:
        if node in sizes and node in last and read_until <= place[node] < last[node]:
            cuts[node] = place[node]
        read_until = max(read_until, last.get(node, -1))
    return cuts


def _group(graph: Graph, layers: list[fx.Node], cuts: dict[fx.Node, int]) -> list[tuple[list[fx.Node], fx.Node | None]]:
    """Divide layers into blocks: lists of layers, each with the node that ends its block (None: the output)."""
    place = {node: position for position, node in enumerate(graph.fx.nodes)}
    smallest: list[tuple[list[fx.Node], fx.Node | None]] = []
    for layer, following in zip(layers, [*layers[1:], None], strict=True):
        end = None if following is None else _cut_between(graph, place[layer], place[following], cuts)
        if smallest and smallest[-1][1] is None:
            smallest[-1] = [*smallest[-1][0], layer], end
        else:
            smallest.append(([layer], end))
    groups: list[tuple[list[fx.Node], fx.Node | None]] = []
    chained = False  # whether the last group is a chain that can grow
    for members, end in smallest:
        alone = len(members) == 1
        if alone and chained and len(groups[-1][0]) < CHAIN:
            groups[-1] = groups[-1][0] + members, end
        else:
            groups.append((members, end))
        chained = alone
    return groups


def _cut_between(graph: Graph, layer: int, following: int, cuts: dict[fx.Node, int]) -> fx.Node | None:
    """Return the last cut between two layers, but before pools and reshapes, whose output says less."""
    between = [node for node, position in cuts.items() if layer <= position < following]
    if not between:
        return None
    end = between[-1]
    while graph.preserves_values(end) or graph.matches(end, ops.AVERAGE):
        before = end.all_input_nodes[0]
        if before not in between:
            break
        end = before
    return end


def _subgraph(graph: Graph, start: fx.Node, end: fx.Node | None) -> fx.GraphModule:
    """Return the network between two nodes, the second included (None: the output)."""
    part, inside = fx.Graph(), False
    copied = {start: part.placeholder("x")}
    for node in graph.fx.nodes:
        if (inside or node.op == "get_attr") and node.op != "placeholder":
            copied[node] = part.node_copy(node, copied.__getitem__)
        inside = inside or node is start
        if end is not None and node is end:
            part.output(copied[node])
            break
    return GraphModule(graph.model, part)
