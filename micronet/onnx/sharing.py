"""Store equal tensors once: weights of a layer that is called several times, or that several layers share."""

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from micronet.onnx.ops import DEQUANTIZE, QUANTIZE
from micronet.onnx.stored import PACKED_BITS, content_key, node_lists

SMALLEST_BYTES = 256  # less than a node and its names take


def share_weights(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model that stores equal tensors once, and of which a runtime makes the same as of the given one.

    All readers of equal floats read the same ones. Of equal integers of 8 bits or more, every DequantizeLinear but one
    reads a Reshape, which runtimes compute when they load the file: ONNX Runtime's exact int8 mode
    (``session.x64quantprecision``) stores other integers in place of a weight, and refuses to do so for two readers of
    it ("Attempt to replace the existing tensor"). Each Reshape reads the one before, since equal ones become one.
    """
    repeated = _repeated(proto.graph)
    if not repeated:
        return proto
    shared = onnx.ModelProto()
    shared.CopyFrom(proto)
    graph, reshapes, shapes = shared.graph, list[onnx.NodeProto](), dict[str, onnx.TensorProto]()
    same = {name: kept for name, (kept, dequantized) in repeated.items() if not dequantized}
    last = dict[str, str]()  # a stored tensor -> the last Reshape of it
    for tensor in [each for each in graph.initializer if each.name in repeated]:
        if tensor.name not in same:
            shape = f"shape.{'x'.join(map(str, tensor.dims))}"
            shapes[shape] = numpy_helper.from_array(np.array(tensor.dims, np.int64), shape)
            kept, _ = repeated[tensor.name]
            reshapes.append(helper.make_node("Reshape", [last.get(kept, kept), shape], [tensor.name]))
            last[kept] = tensor.name
        graph.initializer.remove(tensor)
    for node in (node for part in node_lists(graph) for node in part.node):
        node.input[:] = [same.get(name, name) for name in node.input]
    graph.initializer.extend(shapes.values())
    nodes = [*reshapes, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    return shared


def _repeated(graph: onnx.GraphProto) -> dict[str, tuple[str, bool]]:
    """Return the stored tensors that equal an earlier one -> its name, and whether it is read as a weight's integers.

    Those of 4 bits count as floats here: the exact mode leaves them as they are. Scales and zero points stay as they
    are: runtimes look for them where they are read.
    """
    fixed = {each.name for part in node_lists(graph) for each in (*part.input, *part.output)}
    quantizers = [node for node in graph.node if node.op_type in (QUANTIZE, DEQUANTIZE)]
    fixed |= {name for node in quantizers for name in node.input[1:]}
    integers = {node.input[0] for node in quantizers if node.op_type == DEQUANTIZE}
    first, found = dict[Any, str](), dict[str, tuple[str, bool]]()
    for tensor in graph.initializer:
        if tensor.ByteSize() < SMALLEST_BYTES or tensor.name in fixed or tensor.data_type == onnx.TensorProto.STRING:
            continue
        dequantized = tensor.name in integers and tensor.data_type not in PACKED_BITS
        content = content_key(numpy_helper.to_array(tensor))
        kept = first.setdefault((tensor.data_type, dequantized, content), tensor.name)
        if kept != tensor.name:
            found[tensor.name] = kept, dequantized
    return found
