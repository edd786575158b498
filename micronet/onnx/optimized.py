"""Counts in the graph that ONNX Runtime makes of a model: its operators, and what integers cost between its layers."""

import onnx

from micronet.onnx.ops import COMPUTE_NOTHING, CONTROL, DEQUANTIZE, INTEGER_LAYERS, QUANTIZE, SMOOTH
from micronet.onnx.stored import node_lists


def count_operators(graph: onnx.GraphProto) -> dict[str, int]:
    """Count the operators that compute anything, with those in the bodies of branches and loops."""
    kinds = [node.op_type for each in node_lists(graph) for node in each.node]
    kinds = [kind for kind in kinds if kind not in COMPUTE_NOTHING | CONTROL]
    integer = sum(kind in INTEGER_LAYERS or kind.startswith("QLinear") for kind in kinds)
    return {"operators": len(kinds), "integer_operators": integer}


def costly_activations(graph: onnx.GraphProto) -> list[str]:
    """Return the smooth activations that may make a file slow: there are about as many as layers and as roundings.

    Counted are those from which a layer in integers is computed: others cost it no rounding. An activation explains the
    quantizer ahead of it and the one behind it, and as many may be at the inputs and outputs of the network.
    """
    read, found = set[str](), list[str]()
    for node in reversed(graph.node):
        leads = not read.isdisjoint(node.output)
        if leads or node.op_type in INTEGER_LAYERS:
            read.update(node.input)
        if leads and node.op_type in SMOOTH:
            found.append(node.op_type)
    layers = sum(node.op_type in INTEGER_LAYERS for node in graph.node)
    roundings = sum(node.op_type in (QUANTIZE, DEQUANTIZE) for node in graph.node)
    return sorted(set(found)) if 2 * len(found) >= layers and 4 * len(found) >= roundings else []
