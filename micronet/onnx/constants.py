"""Tensors stored in an ONNX graph that is being rewritten, under names that no other value has."""

from collections.abc import Container
from typing import Any

import numpy as np
import onnx_ir as ir


def value_names(graph: ir.Graph) -> set[str]:
    """Return the names of all values of a graph."""
    values = [*graph.inputs, *(value for node in graph for value in node.outputs)]
    return {str(value.name) for value in values} | set(graph.initializers)


def free_name(name: str, taken: Container[str]) -> str:
    """Return a name that no other value has: files of torch call their values hardsigmoid, hardsigmoid_1, …."""
    while name in taken:
        name += "_"
    return name


def store_floats(graph: ir.Graph, node: ir.Node, role: str, values: Any) -> ir.Value:
    """Store a tensor in float32 that a node is to read; ``role``: what its name says after that of the node."""
    name = free_name(f"{node.name}_{role}", value_names(graph))
    value = ir.Value(name=name, const_value=ir.Tensor(np.array(values, np.float32, order="C"), name=name))
    value.dtype = ir.DataType.FLOAT
    graph.register_initializer(value)
    return value
