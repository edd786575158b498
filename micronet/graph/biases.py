"""Biases that a forward computes, such as the joined biases of BEiT's queries and values, apart from their layers."""

import operator
from collections.abc import Collection

from torch import fx
from torch.nn import functional as F

BIAS = "adds a bias"  # the mark of such an addition, in its node's ``meta``


def split_biases(graph: fx.Graph, stored: Collection[str]) -> None:
    """Let linear layers with a stored weight add a computed bias in a node of its own, which has the layer's name.

    The rest of the layer can then become a module (see ``graph.plain``).

    Args:
        graph: A network's graph, changed in place.
        stored: The names of the network's parameters and buffers.
    """
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not F.linear:
            continue
        given = {**dict(zip(("input", "weight", "bias"), node.args, strict=False)), **node.kwargs}
        weight, bias = given.get("weight"), given.get("bias")
        if not (isinstance(bias, fx.Node) and isinstance(weight, fx.Node)):
            continue
        if weight.op != "get_attr" or str(weight.target) not in stored or bias.op == "get_attr":
            continue
        with graph.inserting_before(node):
            product = graph.call_function(F.linear, (given["input"], weight))
        node.target, node.args, node.kwargs = operator.add, (product, bias), {}
        node.meta[BIAS] = True
