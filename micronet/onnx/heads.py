"""The ends of float ONNX networks: first and last layers, and heads that 8 bits would destroy.

What destroys a head is the law of ``micronet.quantization.heads``.
"""

from collections.abc import Iterable, Mapping

import numpy as np
import onnx
import onnx_ir as ir
import torch

from micronet.onnx.feeds import Feed
from micronet.onnx.float_nodes import settled
from micronet.onnx.insertion import Insertion, ValueRange
from micronet.onnx.integer_plan import Planner
from micronet.onnx.ops import RECURRENT, SIZES, SUMS, WEIGHTED_OPS
from micronet.onnx.sessions import session_for
from micronet.quantization.heads import ChannelRange, DestroyedHead, destroyed_channel


def find_destroyed(
    proto: onnx.ModelProto, ranges: Mapping[str, ValueRange], feeds: Iterable[Feed], *, signed: bool = False
) -> dict[str, str]:
    """Return the heads whose quantized output would keep nothing of a channel: name -> reason.

    Only the heads are computed, once, and the ranges of all other tensors stay what they are.

    Args:
        proto: A float model from ``prepare``.
        ranges: The ranges of its tensors.
        feeds: The calibration inputs.
        signed: For TensorRT.
    """
    graph = ir.from_proto(proto).graph
    plan = Planner(graph, signed, ranges.keys()).plan()
    grids = Insertion(graph, plan, ranges, signed, per_channel=True, bits=8).grids()
    outputs = {node: settled(node.outputs[0], graph.outputs) for node in heads(graph) if node in plan.nodes}
    outputs = {node: value for node, value in outputs.items() if value in grids}
    names = [str(value.name) for value in outputs.values()]
    seen = {node: ChannelRange(-1 if node.op_type == "MatMul" else 1) for node in outputs}
    if not outputs:
        return {}
    session = session_for(proto, names)
    for feed in feeds:
        for each, values in zip(seen.values(), session(feed), strict=True):
            each.add(torch.from_numpy(np.ascontiguousarray(values)))
    found = {node: destroyed_channel(seen[node], float(grids[value].scale)) for node, value in outputs.items()}
    return {
        str(node.name): str(DestroyedHead(str(node.name), channel))
        for node, channel in found.items()
        if channel is not None
    }


def first_and_last(graph: ir.Graph) -> list[ir.Node]:
    """Return the layers that read no other layer's results, and those whose results no other layer reads."""
    layers = [node for node in graph if node.op_type in WEIGHTED_OPS | RECURRENT]
    computed, read = _depending(graph, layers), set[ir.Value | None]()
    for node in reversed(graph):
        if node.op_type not in SIZES and (node in layers or not read.isdisjoint(node.outputs)):
            read.update(node.inputs)
    return [node for node in layers if computed.isdisjoint(node.inputs) or read.isdisjoint(node.outputs)]


def heads(graph: ir.Graph) -> list[ir.Node]:
    """Return the layers whose results reach an output through no other layer, nor a sum with another's results."""
    layers = [node for node in graph if node.op_type in WEIGHTED_OPS | RECURRENT]
    computed = _depending(graph, layers)
    return [node for node in layers if _is_head(node, set(layers), computed)]


def _depending(graph: ir.Graph, layers: list[ir.Node]) -> set[ir.Value]:
    """Return the tensors that depend on layers."""
    computed: set[ir.Value] = set()
    for node in graph:  # in the order of execution
        if node.op_type not in SIZES and (node in layers or not computed.isdisjoint(node.inputs)):
            computed.update(node.outputs)
    return computed


def _is_head(layer: ir.Node, layers: set[ir.Node], computed: set[ir.Value]) -> bool:
    waiting = list(layer.outputs)
    seen = set(waiting)
    while waiting:
        value = waiting.pop()
        if value.is_graph_output():
            return True
        for reader in value.consumers():
            summed = reader.op_type in SUMS and len(computed & set(reader.inputs)) > 1
            if reader not in layers and reader.op_type not in SIZES and not summed:
                waiting += (output for output in reader.outputs if output not in seen)
                seen.update(reader.outputs)
    return False
