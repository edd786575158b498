"""How many operators of a quantized model ONNX Runtime computes in integers."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import onnx
from onnxruntime import GraphOptimizationLevel

from micronet.errors import MicronetError
from micronet.onnx.graph_view import GraphView, stored
from micronet.onnx.ops import (
    COMPUTE_NOTHING,
    CONTROL,
    CONVOLUTIONS,
    FLOAT_LAYERS,
    INTEGER_CONVOLUTIONS,
    INTEGER_LAYERS,
    INTEGER_PRODUCTS,
    PRODUCTS,
)
from micronet.runtimes.onnxruntime import optimize

# A noun, the operators of the file, and the integer operators that ONNX Runtime turns them into.
KERNELS = (
    ("convolutions", CONVOLUTIONS, INTEGER_CONVOLUTIONS),
    ("matrix products", PRODUCTS, INTEGER_PRODUCTS),
    ("additions", {"Add"}, {"QLinearAdd"}),
)


def count_integers(proto: onnx.ModelProto) -> dict[str, int]:
    """Return how many operators, and how many layers among them, run in integers after ONNX Runtime's optimization.

    Operators that only move values or compute shapes do not count; those in the bodies of loops and branches do.
    """
    optimized = optimize(proto.SerializeToString(), GraphOptimizationLevel.ORT_ENABLE_ALL).graph
    kinds = [node.op_type for node in _nodes(optimized) if node.op_type not in COMPUTE_NOTHING | CONTROL]
    integer = [kind for kind in kinds if kind in INTEGER_LAYERS or kind.startswith("QLinear")]
    layers = [kind for kind in kinds if kind in INTEGER_LAYERS | FLOAT_LAYERS]
    return {
        "operators": len(kinds),
        "integer_operators": len(integer),
        "layers": len(layers),
        "integer_layers": sum(kind in INTEGER_LAYERS for kind in layers),
    }


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Yield the nodes of a graph and of the graphs that they hold."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _nodes(inner)


def count_integer_ops(proto: onnx.ModelProto, file: Path | None = None) -> dict[str, dict[str, int]] | None:
    """Count the convolutions, matrix products and additions, ``all`` and those that ONNX Runtime runs as ``integer``.

    ``file``: what the model was read from, if its weights may exceed one protobuf message. None if ONNX Runtime refuses
    the model.
    """
    try:
        optimized = optimize(file or proto.SerializeToString(), GraphOptimizationLevel.ORT_ENABLE_ALL)
    except MicronetError:
        return None
    nodes = GraphView(proto).nodes
    # Adding a constant does not join two branches.
    joining = [node for node in nodes if node.op_type != "Add" or not (stored(node, 0) or stored(node, 1))]
    before, after = (Counter(node.op_type for node in found) for found in (joining, optimized.graph.node))
    return {
        noun: {"integer": sum(after[op] for op in integer), "all": sum(before[op] for op in given | integer)}
        for noun, given, integer in KERNELS
    }
