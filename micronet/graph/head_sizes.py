"""Sizes from which a forward computes the width of attention's heads, such as ``C // heads`` of ``B, N, C = x.shape``.

The size of an axis that a layer with weights reads or gives is a number of the network, the same for every input.
Around attention, operations may be called with it as a number, which can change with the heads if it is a size there.
"""

import operator
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp, TensorMetadata
from torch.nn import functional as F

from micronet.graph import ops
from micronet.graph.graph_module import GraphModule
from micronet.graph.sources import computed_only_from
from micronet.models.modes import eval_mode, state_kept

_LAYERS = (*ops.CONVOLUTIONS, nn.Linear)
_ARITHMETIC = {operator.floordiv, operator.mul, operator.add, operator.sub, operator.pow, operator.truediv}


def before_heads(model: nn.Module, graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes whose results reach attention without a layer with weights in between."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if not _is_layer(model, node) and any(user in found or ops.MIXES_HEADS.matches(user) for user in node.users):
            found.add(node)
    return found


def reads_sizes(model: nn.Module, graph: fx.Graph) -> bool:
    """Return True if operations around attention compute with sizes of tensors, which layers may fix."""
    return bool(_asked(model, graph))


def find_head_sizes(model: nn.Module, graph: fx.Graph, inputs: tuple[Any, ...]) -> dict[str, int]:
    """Return the sizes that a network's layers fix, of those that operations around attention compute with.

    Args:
        model: The network.
        graph: Its graph in eval mode.
        inputs: An example.

    Returns:
        The name of each node that reads such a size -> the size.
    """
    if not (asked := _asked(model, graph)):
        return {}
    network = GraphModule(model, graph)
    with state_kept(model), eval_mode(model, network), torch.no_grad():
        ShapeProp(network).propagate(*inputs)
    metas = {node.name: node.meta.get("tensor_meta") for node in network.graph.nodes}
    found = {}
    for node, (x, axis) in asked.items():
        meta = metas[x.name]
        rank = len(meta.shape) if isinstance(meta, TensorMetadata) else 0
        if -rank <= axis < rank and axis % rank in _fixed_axes(model, x, rank):
            found[node.name] = meta.shape[axis]
    return found


def fix_head_sizes(model: nn.Module, graph: fx.Graph, sizes: Mapping[str, int]) -> None:
    """Call a graph's operations around attention with numbers in place of what they compute from these sizes."""
    values = _values(graph, sizes)
    for node in _around_heads(model, graph, _numbers(graph)):
        node.args, node.kwargs = fx.node.map_arg((node.args, node.kwargs), partial(_or_node, values))
    for node in reversed(graph.nodes):
        if not node.users and (node.target in _ARITHMETIC or node.name in sizes):
            graph.erase_node(node)


def _or_node(values: Mapping[fx.Node, float], node: fx.Node) -> Any:
    return values.get(node, node)


def _asked(model: nn.Module, graph: fx.Graph) -> dict[fx.Node, tuple[fx.Node, int]]:
    """Return the nodes that read sizes with which operations around attention compute: the tensor and axis of each."""
    numbers, found = _numbers(graph), dict[fx.Node, tuple[fx.Node, int]]()
    waiting = [arg for node in _around_heads(model, graph, numbers) for arg in node.all_input_nodes]
    while waiting:
        node = waiting.pop()
        if node not in numbers:
            continue
        numbers.remove(node)  # once
        axis = _axis_read(node)
        if axis is None:
            waiting += node.all_input_nodes
        else:
            found[node] = axis
    return found


def _numbers(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes that read sizes, or compute numbers from such nodes alone."""
    return computed_only_from(graph, lambda node: _axis_read(node) is not None, lambda node: node.target in _ARITHMETIC)


def _is_layer(model: nn.Module, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(model.get_submodule(str(node.target)), _LAYERS)


def _around_heads(model: nn.Module, graph: fx.Graph, numbers: set[fx.Node]) -> list[fx.Node]:
    """Return the operations between attention and the layers with weights before and after it, but no arithmetic."""
    found = before_heads(model, graph)
    for node in graph.nodes:
        behind = any(source in found or ops.MIXES_HEADS.matches(source) for source in node.all_input_nodes)
        if behind and not _is_layer(model, node):
            found.add(node)
    return [node for node in graph.nodes if node in found and node.op != "output" and node not in numbers]


def _axis_read(node: Any) -> tuple[fx.Node, int] | None:
    """Return a tensor and the axis whose size a node reads."""
    if node.op == "call_method" and node.target == "size" and len(node.args) == 2:
        x, axis = node.args
    elif node.target is operator.getitem and _is_shape(node.args[0]):
        x, axis = node.args[0].args[0], node.args[1]
    else:
        return None
    return (x, axis) if isinstance(axis, int) else None


def _is_shape(node: Any) -> bool:
    if not isinstance(node, fx.Node):
        return False
    return bool(node.target is getattr and node.args[1] == "shape") or (node.target == "size" and len(node.args) == 1)


def _fixed_axes(model: nn.Module, x: fx.Node, rank: int) -> set[int]:
    """Return the axes of a tensor whose sizes are those of the layers that give or read it."""
    found = set()
    for node in (x, *x.users):
        module = model.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, (nn.Linear, nn.LayerNorm)) or _multiplies_stored(node, x):
            found.add(rank - 1)
        elif isinstance(module, ops.CONVOLUTIONS) and len(module.kernel_size) + 2 == rank:
            found.add(1)
    return found


def _multiplies_stored(node: fx.Node, x: fx.Node) -> bool:
    """Return True if a node multiplies a tensor, or gives it as its product, with a stored weight."""
    weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
    stored = isinstance(weight, fx.Node) and weight.op == "get_attr"
    return node.target is F.linear and stored and (node is x or node.args[:1] == (x,))


def _values(graph: fx.Graph, sizes: Mapping[str, int]) -> dict[fx.Node, float]:
    """Return the numbers that nodes compute from these sizes alone."""
    values: dict[fx.Node, float] = {}
    for node in graph.nodes:
        if node.name in sizes:
            values[node] = sizes[node.name]
        elif node.target in _ARITHMETIC and len(node.args) == 2:
            numbers = [values.get(arg) if isinstance(arg, fx.Node) else arg for arg in node.args]
            if all(isinstance(number, (int, float)) for number in numbers):
                values[node] = node.target(*(int(each) if isinstance(each, int) else each for each in numbers))
    return values
