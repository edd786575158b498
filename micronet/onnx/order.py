"""The order of the nodes of an ONNX graph, which a reader may rely on.

ONNX Runtime takes nodes in any order, and ``quantize_dynamic`` writes an If ahead of what only its branches read.
"""

import copy
from collections.abc import Iterable
from graphlib import CycleError, TopologicalSorter
from typing import Any

import onnx

from micronet.onnx.stored import inner_graphs


def sort_nodes(graph: Any) -> bool:
    """Put the nodes of a graph or a function behind those whose results they read, in place.

    Returns:
        Whether any were not; all keep their places if not.

    Raises:
        ValueError: Nodes read each other's results.
    """
    writers = {name: index for index, node in enumerate(graph.node) for name in node.output if name}
    before = {index: {writers[name] for name in _read(node) & writers.keys()} for index, node in enumerate(graph.node)}
    if all(max(writing, default=-1) < index for index, writing in before.items()):
        return False
    try:
        nodes = [copy.deepcopy(graph.node[index]) for index in TopologicalSorter(before).static_order()]
    except CycleError as error:
        names = dict.fromkeys(graph.node[index].name or graph.node[index].op_type for index in error.args[1])
        raise ValueError(f"the nodes {', '.join(names)} read each other's results") from error
    del graph.node[:]
    graph.node.extend(nodes)
    return True


def _read(node: onnx.NodeProto) -> set[str]:
    """Return the names of the tensors that a node reads, and those that its inner graphs read from outside."""
    return {*node.input}.union(*map(_read_outside, inner_graphs(node)))


def _read_outside(graph: onnx.GraphProto) -> set[str]:
    own: Iterable[Any] = (*graph.input, *graph.initializer)
    made = {each.name for each in own}.union(*(node.output for node in graph.node))
    return {each.name for each in graph.output}.union(*map(_read, graph.node)) - made
