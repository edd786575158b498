"""What the nodes of a graph compute from."""

from collections.abc import Callable

from torch import fx


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
