"""Float ONNX files with weights in 16 bits: those of the layers that stay in float keep their size."""

import math

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from micronet.onnx.ops import RECURRENT, WEIGHTED_OPS
from micronet.onnx.stored import stored_tensors

FEWEST = 128  # values; a Cast takes as many bytes as fewer would save


def stores_halves(proto: onnx.ModelProto) -> bool:
    """Return True if a model stores more of its floats in 16 bits than in 32."""
    sizes: dict[int, int] = {TensorProto.FLOAT: 0, TensorProto.FLOAT16: 0}
    for _, tensor in stored_tensors(proto.graph):
        if tensor.data_type in sizes:
            sizes[tensor.data_type] += math.prod(tensor.dims)
    return sizes[TensorProto.FLOAT16] > sizes[TensorProto.FLOAT]


def store_halves(proto: onnx.ModelProto) -> None:
    """Store the float weights of a model that 16 bits hold, in place, with Casts that runtimes compute as they load it.

    Those that a batch norm was folded into, or that always had 32 bits, stay in 32.
    """
    graph, casts = proto.graph, []
    weights = {name for node in graph.node if node.op_type in WEIGHTED_OPS | RECURRENT for name in node.input[1:]}
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or tensor.name not in weights or math.prod(tensor.dims) < FEWEST:
            continue
        values, name = numpy_helper.to_array(tensor), tensor.name
        halves = values.astype(np.float16)
        if np.array_equal(halves, values):
            tensor.CopyFrom(numpy_helper.from_array(halves, f"{name}_half"))
            casts.append(helper.make_node("Cast", [tensor.name], [name], f"{name}_Cast", to=TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
