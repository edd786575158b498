"""Float ONNX files with weights in 16 bits: those of the layers that stay in float keep their size."""

import math
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from micronet.onnx.ops import RECURRENT, WEIGHTED_OPS
from micronet.onnx.stored import stored_tensors

FEWEST = 128  # values; a Cast takes as many bytes as fewer would save


def stores_halves(proto: onnx.ModelProto) -> bool:
    """Return True if a model stores weights in 16 bits, and none of a layer in 32."""
    types = {name: tensor.data_type for name, tensor in stored_tensors(proto.graph) if math.prod(tensor.dims) >= FEWEST}
    return TensorProto.FLOAT16 in types.values() and not any(
        types.get(name) == TensorProto.FLOAT for name in _read_by_layers(proto.graph)
    )


def store_halves(proto: onnx.ModelProto) -> None:
    """Store the float weights of a model in 16 bits, in place, with Casts that runtimes compute as they load it.

    A weight that was in 16 bits has other values after a batch norm was folded into it, and is rounded again.
    """
    graph, casts = proto.graph, []
    weights = _read_by_layers(graph)
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or tensor.name not in weights or math.prod(tensor.dims) < FEWEST:
            continue
        values, name = numpy_helper.to_array(tensor), tensor.name
        if _fits(values):
            tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}_half"))
            casts.append(helper.make_node("Cast", [tensor.name], [name], f"{name}_Cast", to=TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _read_by_layers(graph: onnx.GraphProto) -> set[str]:
    return {name for node in graph.node if node.op_type in WEIGHTED_OPS | RECURRENT for name in node.input[1:]}


def _fits(values: NDArray[Any]) -> bool:
    return bool(np.abs(values).max(initial=0) <= np.finfo(np.float16).max)
