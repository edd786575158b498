"""Rewriting a whole ONNX graph: half precision, 4-bit storage, preprocessing, Q/DQ behind a flatten.

Each function changes the model in place and leaves what it computes as it was, but for the rounding it is asked for.
"""

import copy
from collections.abc import Iterable, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from micronet.data.dataset import DataSpec
from micronet.errors import MicronetError
from micronet.runtimes.config import RuntimeOptions
from micronet.runtimes.onnxruntime import open_session, run

HALF_MAX, HALF_LEAST = 65504.0, 2.0**-14  # the largest finite half, the least normal one
INT4 = (-8, 7)
RESHAPES = ("Reshape", "Flatten")


def to_half(proto: onnx.ModelProto, images: NDArray[np.float32]) -> tuple[onnx.ModelProto, dict[str, str]]:
    """Return a float model with half tensors, float32 in and out, and the nodes that stay in float32, each with why.

    Those are the nodes whose values are beyond half's range on ``images`` (N, C, H, W), or whose stored tensors are.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    kept = _beyond_half(proto, images)
    half = convert_float_to_float16(proto, keep_io_types=True, node_block_list=list(kept), disable_shape_infer=False)
    del half.graph.value_info[:]
    OnnxModel.graph_topological_sort(half.graph)  # the casts come last
    return half, kept


def kept_line(kept: dict[str, str]) -> str:
    """Tell which nodes stay in float32, and why."""
    return f"kept in float32: {', '.join(f'{name} ({why} for half)' for name, why in kept.items())}"


def _beyond_half(proto: onnx.ModelProto, images: NDArray[np.float32]) -> dict[str, str]:
    exposed = copy.deepcopy(proto)
    produced = [node.output[0] for node in proto.graph.node]
    inferred = onnx.shape_inference.infer_shapes(proto).graph
    kinds = {info.name: info.type.tensor_type.elem_type for info in [*inferred.value_info, *inferred.output]}
    outputs = [output.name for output in proto.graph.output]
    floats = [name for name in produced if kinds.get(name) == TensorProto.FLOAT and name not in outputs]
    exposed.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in floats)
    session = open_session(exposed.SerializeToString(), RuntimeOptions(), "the exported model")
    values = run(session, images)
    beyond = {name: _misfit(value) for name, value in zip([*outputs, *floats], values, strict=True)}
    beyond |= {tensor.name: _misfit(numpy_helper.to_array(tensor)) for tensor in proto.graph.initializer}
    return {
        node.name: why
        for node in proto.graph.node
        if (why := next(filter(None, map(beyond.get, (*node.input, *node.output))), None))
    }


def _misfit(value: NDArray[np.generic]) -> str | None:
    """Say why half cannot hold a tensor: its largest value is too large, or so small that it is not normal."""
    largest = float(np.abs(value).max()) if value.dtype == np.float32 and value.size else 0.0
    if largest == 0 or HALF_LEAST <= largest <= HALF_MAX:
        return None
    return "too small" if largest < HALF_LEAST else "too large"


def to_int4(proto: onnx.ModelProto) -> int:
    """Store every weight whose integers fit 4 bits two a byte; return how many tensors that were.

    Raises MicronetError where there is none.
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
        unit = float(np.gcd.reduce(np.abs(integers).astype(np.int64), axis=None) or 1)  # few bits lie widely in int8
        if integers.min() / unit < INT4[0] or integers.max() / unit > INT4[1]:
            continue
        for name, values in zip(node.input[::2], (integers / unit, np.zeros(scale.shape)), strict=True):
            kept = values.astype(np.int64)
            stored[name].CopyFrom(helper.make_tensor(name, TensorProto.INT4, kept.shape, kept.ravel().tolist()))
        stored[node.input[1]].CopyFrom(numpy_helper.from_array((scale * unit).astype(np.float32), node.input[1]))
        done += 1
    if not done:
        raise MicronetError("--int4-storage: no weight of this network has 4 bits or fewer; quantize with --w-bits 4")
    return done


def embed_preprocessing(proto: onnx.ModelProto, spec: DataSpec) -> None:
    """Let the model take 8-bit pixels (N, C, H, W) and normalise them itself.

    Raises MicronetError where the normalisation is not known.
    """
    if spec.mean is None or spec.std is None:
        raise MicronetError("--embed-preprocessing: the artifact does not tell how its images are normalised")
    graph = proto.graph
    pixels, normalised = graph.input[0].name, f"{graph.input[0].name}.normalised"
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name == pixels:
                node.input[index] = normalised
    std = np.array(spec.std, np.float32).reshape(1, -1, 1, 1)
    mean = np.array(spec.mean, np.float32).reshape(1, -1, 1, 1)
    graph.initializer.extend(
        [
            numpy_helper.from_array(1 / (255 * std), "preprocessing.factor"),
            numpy_helper.from_array(-mean / std, "preprocessing.shift"),
        ]
    )
    steps = [
        helper.make_node("Cast", [pixels], ["preprocessing.float"], "preprocessing.Cast", to=TensorProto.FLOAT),
        helper.make_node("Mul", ["preprocessing.float", "preprocessing.factor"], ["preprocessing.scaled"]),
        helper.make_node("Add", ["preprocessing.scaled", "preprocessing.shift"], [normalised]),
    ]
    steps[1].name, steps[2].name = "preprocessing.Mul", "preprocessing.Add"
    _put_first(graph, steps)
    graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8


def quantize_behind_reshapes(proto: onnx.ModelProto) -> None:
    """Move signed Q/DQ pairs in front of a reshape behind it: ONNX Runtime does not load them otherwise.

    Rounding works value by value, so the order is of no consequence.
    """
    graph = proto.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    for reshape in [node for node in graph.node if node.op_type in RESHAPES]:
        dequantize = makers.get(reshape.input[0])
        if dequantize is None or dequantize.op_type != "DequantizeLinear":
            continue
        quantize = makers.get(dequantize.input[0])
        if quantize is None or quantize.op_type != "QuantizeLinear":
            continue
        if stored[quantize.input[2]].data_type != TensorProto.INT8:
            continue
        pair = [copy.deepcopy(quantize), copy.deepcopy(dequantize)]
        reshape.input[0] = quantize.input[0]
        outside = reshape.output[0]
        reshape.output[0] = f"{outside}.float"
        pair[0].input[0], pair[0].output[0] = reshape.output[0], f"{outside}.integers"
        pair[1].input[0], pair[1].output[0] = pair[0].output[0], outside
        alone = sum(dequantize.output[0] in node.input for node in graph.node) == 0
        for node, was in zip(pair, (quantize, dequantize), strict=True):
            if alone:
                graph.node.remove(was)
            else:
                _own_zero_point(graph, node, f"{outside}.{node.op_type}")
        at = list(graph.node).index(reshape) + 1
        for node in reversed(pair):
            graph.node.insert(at, node)


def _own_zero_point(graph: onnx.GraphProto, node: onnx.NodeProto, name: str) -> None:
    node.name = name
    own = copy.deepcopy(next(tensor for tensor in graph.initializer if tensor.name == node.input[2]))
    own.name = f"{name}.zero_point"
    graph.initializer.append(own)
    node.input[2] = own.name


def _put_first(graph: onnx.GraphProto, nodes: Sequence[onnx.NodeProto]) -> None:
    rest: Iterable[onnx.NodeProto] = [copy.deepcopy(node) for node in graph.node]
    del graph.node[:]
    graph.node.extend([*nodes, *rest])
