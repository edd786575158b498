"""Rewrites of a whole ONNX graph: half precision, 4-bit storage, preprocessing, the order of operators.

Each function changes the model in place and does not change what it computes, apart from the intended rounding.
"""

import copy
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from micronet.data.dataset import DataSpec
from micronet.errors import MicronetError
from micronet.runtimes.config import RuntimeOptions
from micronet.runtimes.onnxruntime import open_session, run

HALF_MAX, HALF_MIN = 65504.0, 2.0**-14  # the largest finite and the smallest normal float16
INT4_MIN, INT4_MAX = -8, 7
RESHAPES = ("Reshape", "Flatten")


def to_half(proto: onnx.ModelProto, images: NDArray[np.float32]) -> tuple[onnx.ModelProto, dict[str, str]]:
    """Convert a float model to float16; its inputs and outputs stay float32.

    Args:
        proto: The float32 model.
        images: (N, C, H, W); a node whose values on them, or whose weights, do not fit float16 stays in float32.

    Returns:
        The converted model, and the nodes that stay in float32: name -> ``"too large"`` or ``"too small"``.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    blocked = _outside_half(proto, images)
    half = convert_float_to_float16(proto, keep_io_types=True, node_block_list=list(blocked), disable_shape_infer=False)
    del half.graph.value_info[:]
    OnnxModel.graph_topological_sort(half.graph)  # the converter appends its casts at the end
    return half, blocked


def kept_line(kept: dict[str, str]) -> str:
    """Describe the nodes that stay in float32."""
    return f"kept in float32: {', '.join(f'{name} ({reason} for half)' for name, reason in kept.items())}"


def _outside_half(proto: onnx.ModelProto, images: NDArray[np.float32]) -> dict[str, str]:
    """Return the nodes with a tensor that float16 cannot hold, and the reason."""
    exposed = copy.deepcopy(proto)
    produced = [node.output[0] for node in proto.graph.node]
    inferred = onnx.shape_inference.infer_shapes(proto).graph
    dtypes = {info.name: info.type.tensor_type.elem_type for info in [*inferred.value_info, *inferred.output]}
    outputs = [output.name for output in proto.graph.output]
    floats = [name for name in produced if dtypes.get(name) == TensorProto.FLOAT and name not in outputs]
    exposed.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in floats)
    session = open_session(exposed.SerializeToString(), RuntimeOptions(), "the exported model")
    values = run(session, images)
    reasons = {name: _half_misfit(value) for name, value in zip([*outputs, *floats], values, strict=True)}
    reasons |= {tensor.name: _half_misfit(numpy_helper.to_array(tensor)) for tensor in proto.graph.initializer}
    return {
        node.name: reason
        for node in proto.graph.node
        if (reason := next(filter(None, map(reasons.get, (*node.input, *node.output))), None))
    }


def _half_misfit(value: NDArray[np.generic]) -> str | None:
    """Return why float16 cannot hold a tensor, judged by its largest magnitude, or None."""
    largest = float(np.abs(value).max()) if value.dtype == np.float32 and value.size else 0.0
    if largest == 0 or HALF_MIN <= largest <= HALF_MAX:
        return None
    return "too small" if largest < HALF_MIN else "too large"


def to_int4(proto: onnx.ModelProto) -> int:
    """Store every weight whose integers fit 4 bits as INT4, two per byte.

    Returns:
        The number of tensors stored so.

    Raises:
        MicronetError: No weight fits 4 bits.
    """
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    done = 0
    for node in proto.graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in stored:
            continue
        if stored[node.input[0]].data_type != TensorProto.INT8:
            continue
        if len(node.input) > 2 and numpy_helper.to_array(stored[node.input[2]]).any():
            continue
        integers, scale = (numpy_helper.to_array(stored[name]).astype(np.float64) for name in node.input[:2])
        unit = float(np.gcd.reduce(np.abs(integers).astype(np.int64), axis=None) or 1)  # int8 may hold a coarser grid
        if integers.min() / unit < INT4_MIN or integers.max() / unit > INT4_MAX:
            continue
        for name, values in zip(node.input[::2], (integers / unit, np.zeros(scale.shape)), strict=True):
            int4 = values.astype(np.int64)
            stored[name].CopyFrom(helper.make_tensor(name, TensorProto.INT4, int4.shape, int4.ravel().tolist()))
        stored[node.input[1]].CopyFrom(numpy_helper.from_array((scale * unit).astype(np.float32), node.input[1]))
        done += 1
    if not done:
        raise MicronetError("--int4-storage: no weight of this network has at most 4 bits; quantize it with --w-bits 4")
    return done


def embed_preprocessing(proto: onnx.ModelProto, spec: DataSpec) -> None:
    """Make the model take 8-bit pixels, (N, C, H, W) uint8, and normalize them itself.

    Raises:
        MicronetError: The mean and standard deviation are not known.
    """
    if spec.mean is None or spec.std is None:
        raise MicronetError(
            "--embed-preprocessing: the artifact does not record how its images are normalized; leave the option out, "
            "or make the artifact with micronet train or micronet import --data"
        )
    graph = proto.graph
    pixels, normalized = graph.input[0].name, f"{graph.input[0].name}.normalised"
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name == pixels:
                node.input[index] = normalized
    std = np.array(spec.std, np.float32).reshape(1, -1, 1, 1)
    mean = np.array(spec.mean, np.float32).reshape(1, -1, 1, 1)
    graph.initializer.extend(
        [
            numpy_helper.from_array(1 / (255 * std), "preprocessing.factor"),
            numpy_helper.from_array(-mean / std, "preprocessing.shift"),
        ]
    )
    nodes = [
        helper.make_node("Cast", [pixels], ["preprocessing.float"], "preprocessing.Cast", to=TensorProto.FLOAT),
        helper.make_node("Mul", ["preprocessing.float", "preprocessing.factor"], ["preprocessing.scaled"]),
        helper.make_node("Add", ["preprocessing.scaled", "preprocessing.shift"], [normalized]),
    ]
    nodes[1].name, nodes[2].name = "preprocessing.Mul", "preprocessing.Add"
    _prepend(graph, nodes)
    graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8


def clip_before_pools(proto: onnx.ModelProto) -> None:
    """Reorder MaxPool, Relu to Relu, MaxPool, so that ONNX Runtime fuses the Relu into the convolution before them.

    Both are monotone and select values, so the result is the same bit for bit.
    """
    graph = proto.graph
    readers = Counter(name for node in graph.node for name in node.input)
    readers.update(output.name for output in graph.output)
    producers = {name: node for node in graph.node for name in node.output}
    for relu in [node for node in graph.node if node.op_type == "Relu"]:
        pool = producers.get(relu.input[0])
        if pool is not None and pool.op_type == "MaxPool" and len(pool.output) == 1 and readers[pool.output[0]] == 1:
            first, second = copy.deepcopy(relu), copy.deepcopy(pool)
            first.input[0], first.output[0] = pool.input[0], pool.output[0]
            second.input[0], second.output[0] = pool.output[0], relu.output[0]
            pool.CopyFrom(first)
            relu.CopyFrom(second)


def quantize_after_reshapes(proto: onnx.ModelProto) -> None:
    """Move int8 Q/DQ pairs that precede a reshape behind it, because ONNX Runtime cannot load them otherwise.

    Rounding works value by value, so the result is the same.
    """
    graph = proto.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}
    for reshape in [node for node in graph.node if node.op_type in RESHAPES]:
        dequantize = producers.get(reshape.input[0])
        if dequantize is None or dequantize.op_type != "DequantizeLinear":
            continue
        quantize = producers.get(dequantize.input[0])
        if quantize is None or quantize.op_type != "QuantizeLinear":
            continue
        if stored[quantize.input[2]].data_type != TensorProto.INT8:
            continue
        pair = [copy.deepcopy(quantize), copy.deepcopy(dequantize)]
        reshape.input[0] = quantize.input[0]
        result = reshape.output[0]
        reshape.output[0] = f"{result}.float"
        pair[0].input[0], pair[0].output[0] = reshape.output[0], f"{result}.integers"
        pair[1].input[0], pair[1].output[0] = pair[0].output[0], result
        unread = all(dequantize.output[0] not in node.input for node in graph.node)
        for node, original in zip(pair, (quantize, dequantize), strict=True):
            if unread:
                graph.node.remove(original)
            else:
                _copy_zero_point(graph, node, f"{result}.{node.op_type}")
        position = list(graph.node).index(reshape) + 1
        for node in reversed(pair):
            graph.node.insert(position, node)


def _copy_zero_point(graph: onnx.GraphProto, node: onnx.NodeProto, name: str) -> None:
    """Name a node, and give it a zero point of its own."""
    node.name = name
    own = copy.deepcopy(next(tensor for tensor in graph.initializer if tensor.name == node.input[2]))
    own.name = f"{name}.zero_point"
    graph.initializer.append(own)
    node.input[2] = own.name


def _prepend(graph: onnx.GraphProto, nodes: Sequence[onnx.NodeProto]) -> None:
    rest: Iterable[onnx.NodeProto] = [copy.deepcopy(node) for node in graph.node]
    del graph.node[:]
    graph.node.extend([*nodes, *rest])
