"""What the nodes of a graph compute from."""

import operator
from collections.abc import Callable

from torch import fx

from micronet.graph.ops import SELECTS
from micronet.graph.size import is_size


def computed_only_from(
    graph: fx.Graph, is_source: Callable[[fx.Node], bool], passes: Callable[[fx.Node], bool] = lambda _: True
) -> set[fx.Node]:
    """Return a graph's sources, and the nodes that compute from such nodes alone; ``passes``: which nodes may."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if is_source(node) or (inputs and found.issuperset(inputs) and passes(node)):
            found.add(node)
    return found


def is_selected(node: fx.Node) -> bool:
    """Return True if a node gives the elements that a mask selects, or their places."""
    if node.target is not operator.getitem:
        return SELECTS.matches(node)
    source, index = node.args[:2]
    indices: list[fx.Node] = []
    fx.map_arg(index, indices.append)
    of_tuple = isinstance(source, fx.Node) and source.target is not operator.getitem and SELECTS.matches(source)
    return of_tuple or not all(map(is_size, indices))
