"""What an ONNX model costs: its parameters, and its multiply-accumulates for one sample."""

import math
from collections.abc import Sequence
from typing import Any

import onnx

from micronet.onnx.ops import CONVOLUTIONS, DEFORMABLE, DEQUANTIZE, INTEGER_LAYERS, PRODUCTS, RECURRENT, WEIGHTED_OPS
from micronet.onnx.sharing import SMALLEST_BYTES
from micronet.onnx.stored import content_key

NORMS = ("BatchNormalization", "InstanceNormalization", "LayerNormalization", "GroupNormalization", "RMSNormalization")
NOTHING = slice(0)
# An operator -> those of its inputs that hold parameters if they are constant.
PARAMETERS = {
    **dict.fromkeys((*CONVOLUTIONS, "PRelu"), slice(1, None)),
    DEFORMABLE: slice(1, 4, 2),  # the offsets are between the weight and the bias
    **dict.fromkeys((*PRODUCTS, "Add", "Mul", "Einsum"), slice(None)),
    **dict.fromkeys(RECURRENT, slice(1, 4)),
    **dict.fromkeys(NORMS, slice(1, 3)),
    "Gather": slice(1),
}
UNKNOWN = [0, 0]  # sizes
# Products whose multiply-accumulates no formula here gives.
UNCOUNTED = INTEGER_LAYERS | {"Attention", "MultiHeadAttention", "GroupQueryAttention", "Einsum"}


def stored_parameters(graph: Any) -> int:
    """Count the parameters of layers that a graph holds, one by one; statistics, scales and indices are none.

    Equal integers are those of one layer that is called several times: a graph that was read has a copy for each call.
    """
    constants = _constants(graph)
    found: dict[Any, onnx.TensorProto] = {}
    for node in graph.node:
        for name in node.input[PARAMETERS.get(node.op_type, NOTHING)]:
            found |= {_identity(tensor): tensor for tensor in constants.get(name, {}).values()}
    sizes = [math.prod(t.dims) for t in found.values() if t.dims and t.data_type != onnx.TensorProto.INT64]
    return sum(sizes)


def _identity(tensor: onnx.TensorProto) -> Any:
    """Return what tells a stored tensor from others: its content, if it is surely a weight's own, or its name."""
    weight = tensor.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
    if not weight or tensor.ByteSize() < SMALLEST_BYTES:
        return tensor.name
    return tensor.data_type, content_key(onnx.numpy_helper.to_array(tensor))


def for_one_sample(proto: onnx.ModelProto, shapes: Sequence[tuple[int, ...]]) -> onnx.ModelProto:
    """Return a model for one sample. ``shapes``: of its inputs, without the batch."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(proto)
    for entry, shape in zip(_inputs(fixed), shapes, strict=False):
        dims = entry.type.tensor_type.shape.dim
        for dim, value in zip(dims, shape if len(shape) == len(dims) else (1, *shape), strict=False):
            dim.dim_value = value
    return fixed


def input_shapes(proto: onnx.ModelProto) -> list[tuple[int, ...]]:
    """Return the shapes of a model's inputs, without the batch; free sizes are 0."""
    return [tuple(dim.dim_value for dim in entry.type.tensor_type.shape.dim)[1:] for entry in _inputs(proto)]


def _inputs(proto: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    stored = {tensor.name for tensor in proto.graph.initializer}  # old files also list these as inputs
    return [entry for entry in proto.graph.input if entry.name not in stored]


def count_macs(proto: onnx.ModelProto) -> int | None:
    """Count the multiply-accumulates of convolutions, matrix products and recurrent layers in a model of fixed sizes.

    Returns None if sizes inside the model are unknown, or if it has other products, such as fused attention.
    """
    graph = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
    stored = {tensor.name: list(tensor.dims) for tensor in proto.graph.initializer}
    sizes = stored | {
        info.name: [dim.dim_value for dim in info.type.tensor_type.shape.dim]
        for info in (*graph.input, *graph.value_info, *graph.output)
    }
    total = 0
    for node in graph.node:
        if node.op_type in UNCOUNTED:
            return None
        if node.op_type in WEIGHTED_OPS | RECURRENT | {DEFORMABLE}:
            macs = _macs(node.op_type, [sizes.get(name) or UNKNOWN for name in (*node.input[:3], node.output[0])])
            if not macs:
                return None
            total += macs
    return total


def _macs(kind: str, sizes: list[list[int]]) -> int:
    """Return the multiply-accumulates of an operator from the sizes of its first inputs and its output; 0: unknown."""
    first, second, output = sizes[0], sizes[1], sizes[-1]
    if kind == "ConvTranspose":  # multiplies each input value, the others compute each output value
        return math.prod(first) * math.prod(second[1:])
    if kind == "Conv":
        return math.prod(output) * math.prod(second[1:])
    if kind == DEFORMABLE:  # at every place of the offsets
        return sizes[2][0] * math.prod(sizes[2][2:]) * math.prod(second)
    if kind in RECURRENT:
        return first[0] * first[1] * (math.prod(second) + math.prod(sizes[2]))
    if kind == "Gemm":
        return output[0] * math.prod(second)
    return math.prod(output) * first[-1]


def _constants(graph: Any) -> dict[str, dict[str, onnx.TensorProto]]:
    """Return every tensor computed from stored tensors alone, with those; of a dequantized one, with its integers."""
    found = {tensor.name: {tensor.name: tensor} for tensor in graph.initializer}
    for node in graph.node:
        names = [name for name in node.input if name]
        if names and all(name in found for name in names):
            parts = names[:1] if node.op_type == DEQUANTIZE else names
            stored = {key: tensor for name in parts for key, tensor in found[name].items()}
            found |= dict.fromkeys(node.output, stored)
    return found
