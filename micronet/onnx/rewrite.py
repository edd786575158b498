"""Rewrites of a whole ONNX graph: tidying up, half precision, preprocessing, the order of operators.

No function changes what the model computes, apart from the intended rounding.
"""

import ast
import re
from collections import Counter
from collections.abc import Sequence
from traceback import StackSummary

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx_ir.convenience import replace_nodes_and_values
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass

from micronet.data.batches import Normalize
from micronet.data.dataset import DataSpec
from micronet.errors import MicronetError
from micronet.graph.user_lines import user_line
from micronet.onnx.graph_view import array, producer, store, stored
from micronet.onnx.ops import DEQUANTIZE, LINE, QUANTIZE, RESHAPES
from micronet.runtimes.onnxruntime import exposing_session, run

HALF_MAX, HALF_MIN = 65504.0, 2.0**-14  # the largest finite and the smallest normal float16
# Attributes that torch's exporter writes although they equal the operator's defaults.
_DEFAULTS = {
    QUANTIZE: {"axis": 1, "block_size": 0, "output_dtype": 0, "saturate": 1, "precision": 0},
    DEQUANTIZE: {"axis": 1, "block_size": 0, "output_dtype": 0},
}
_INPUTS = ("q", "scale", "zero_point")  # of QuantizeLinear and DequantizeLinear
_SCOPES = "pkg.torch.onnx.name_scopes"
_CALL = "pkg.torch.onnx.fx_node"
_STACK = "pkg.torch.onnx.stack_trace"
_FRAME = re.compile(r'File "(.+)", line (\d+), in .*\n(.*)')
_NAME = re.compile(r"quantize_dequantize\S*\(args = \(.*, ([\w.]+)\), kwargs")


def tidy(model: ir.Model, *, keep_lines: bool = False) -> None:
    """Name every node after its module, drop traces and unused tensors, and unshare zero points, all in place.

    Torch's exporter writes a stack trace into every node. The traces take more bytes than a small network's weights,
    and they show the paths of the machine on which the export ran. ``keep_lines``: keep the last line of the user's
    code, for messages, as the metadata LINE; for models that are not written to a file.
    """
    graph = model.graph
    lines = {node: _line(node) for node in graph} if keep_lines else {}
    used: Counter[str] = Counter()
    for node in graph:
        name = f"{_owner(node)}.{node.op_type}".lstrip(".")
        used[name] += 1
        node.name = name if used[name] == 1 else f"{name}.{used[name]}"
        for key, default in _DEFAULTS.get(node.op_type, {}).items():
            if key in node.attributes and node.attributes[key].value == default:
                del node.attributes[key]
    ClearMetadataAndDocStringPass()(model)
    for node, line in lines.items():
        if line:
            node.metadata_props[LINE] = line
    for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
        value.metadata_props.clear()
    unshare_initializers(graph)
    _shorten_names(graph)
    RemoveUnusedNodesPass()(model)


def _line(node: ir.Node) -> str:
    """Return " at FILE:LINE (code)", or "" if a node's stack trace has no line of the user's."""
    frames = _FRAME.findall(node.metadata_props.get(_STACK, ""))
    return user_line(StackSummary.from_list([(file, int(number), "", code) for file, number, code in frames]))


def _owner(node: ir.Node) -> str:
    """Return a node's module; a quantizer's is in its call, because the scopes omit quantizers of traced networks."""
    if node.op_type == QUANTIZE and (named := _NAME.search(node.metadata_props.get(_CALL, ""))):
        return named[1]
    scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    return str(scopes[-2]) if len(scopes) > 1 else ""


def _unshare_dequantizers(graph: ir.Graph) -> None:
    """Give every reader of a stored tensor its own DequantizeLinear; a layer that is called twice gets two.

    Otherwise ONNX Runtime splits them, shares their initializers, and then refuses its exact int8 mode.
    """
    for node in graph:
        if node.op_type != DEQUANTIZE or stored(node) is None:
            continue
        result = node.outputs[0]
        for number, (reader, index) in enumerate(list(result.uses())[1:], 2):
            twin = _copied(node, node.inputs, ir.Value(name=f"{result.name}.reader_{number}"))
            twin.name = f"{node.name}_{number}"
            graph.insert_after(node, twin)
            reader.replace_input_with(index, twin.outputs[0])


def store_quantized(graph: ir.Graph) -> None:
    """Store the integers of constants that a QuantizeLinear computes from stored floats, such as position embeddings.

    The file is smaller, and OpenVINO fails on an addition that reads such a pair.
    """
    for node in [each for each in graph if each.op_type == QUANTIZE]:
        values, scale, zero_point = (array(node, index) for index in range(3))
        if values is None or scale is None or zero_point is None or scale.size > 1 or zero_point.dtype.kind not in "iu":
            continue
        kind = np.iinfo(zero_point.dtype)
        integers = (np.rint(values / scale) + zero_point).clip(kind.min, kind.max)
        stored_values = store(graph, f"{node.outputs[0].name}.q", integers.astype(kind.dtype))  # a name of its own
        for reader, index in list(node.outputs[0].uses()):
            reader.replace_input_with(index, stored_values)
        graph.remove(node, safe=True)


def unshare_initializers(graph: ir.Graph) -> None:
    """Give every Q and DQ node its own zero point, and every reader of a stored tensor a DQ with inputs of its own.

    ONNX Runtime's exact int8 mode refuses the shared ones of the exporter ("Attempt to replace the existing tensor").
    """
    _unshare_dequantizers(graph)
    taken: set[ir.Value | None] = set()
    for node in graph:
        if node.op_type not in _DEFAULTS:
            continue
        for index, value in enumerate(node.inputs):
            tensor = stored(node, index)
            if tensor is None or (index != 2 and stored(node) is None):
                continue
            if value in taken:
                node.replace_input_with(index, store(graph, f"{node.name}.{_INPUTS[index]}", tensor.numpy()))
            taken.add(node.inputs[index])


def _shorten_names(graph: ir.Graph) -> None:
    """Rename stored tensors from ``layer.weight_quantizer.scale`` to ``layer.weight.scale``."""
    short = [(value, name.replace("_quantizer.", ".")) for name, value in graph.initializers.items()]
    if len({name for _, name in short}) == len(short):
        for value, name in short:
            value.name = name


def to_half(proto: onnx.ModelProto, images: NDArray[np.float32]) -> tuple[onnx.ModelProto, dict[str, str]]:
    """Convert a float32 model to float16; its inputs and outputs stay float32.

    A node whose weights, or whose values on the images (N, C, H, W), do not fit float16 stays in float32.

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


def _outside_half(proto: onnx.ModelProto, images: NDArray[np.float32]) -> dict[str, str]:
    """Return the nodes with a tensor that float16 cannot hold, and the reason."""
    outputs = [output.name for output in proto.graph.output]
    names = [*outputs, *(node.output[0] for node in proto.graph.node if node.output[0] not in outputs)]
    values = run(exposing_session(proto, names[len(outputs) :]), images)
    reasons = {name: _half_misfit(value) for name, value in zip(names, values, strict=True)}
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


def check_preprocessing(spec: DataSpec) -> None:
    """Raise MicronetError unless a spec says how images are normalized."""
    if spec.inputs is not None:
        raise MicronetError(
            "--embed-preprocessing builds the normalization of images into the file, but this network takes other "
            "inputs, which are not normalized; drop the option"
        )
    if spec.mean is None or spec.std is None:
        raise MicronetError(
            "--embed-preprocessing: the artifact does not record how its images are normalized; drop the option, or "
            "create the artifact with micronet train or micronet import --data"
        )


def embed_preprocessing(proto: onnx.ModelProto, spec: DataSpec) -> onnx.ModelProto:
    """Return a model that takes pixels, (N, C, H, W) uint8, and normalizes them as the spec says."""
    check_preprocessing(spec)
    model = ir.from_proto(proto)
    graph, pixels, normalize = model.graph, model.graph.inputs[0], Normalize(spec)
    readers = pixels.uses()
    factor = store(graph, "preprocessing.factor", normalize.scale.numpy().reshape(1, -1, 1, 1))
    shift = store(graph, "preprocessing.shift", normalize.shift.numpy().reshape(1, -1, 1, 1))
    cast = ir.node("Cast", [pixels], {"to": ir.DataType.FLOAT}, name="preprocessing.Cast")
    scaled = ir.node("Mul", [*cast.outputs, factor], name="preprocessing.Mul")
    shifted = ir.node("Add", [*scaled.outputs, shift], name="preprocessing.Add")
    for node, name in ((cast, "float"), (scaled, "scaled"), (shifted, "normalized")):
        node.outputs[0].name = f"preprocessing.{name}"
    for reader, index in readers:
        reader.replace_input_with(index, shifted.outputs[0])
    graph.insert_before(graph[0], (cast, scaled, shifted))
    pixels.dtype = ir.DataType.UINT8
    embedded = ir.to_proto(model)
    del embedded.graph.value_info[:]
    return embedded


def clip_before_pools(model: ir.Model) -> None:
    """Reorder MaxPool, Relu to Relu, MaxPool, so that ONNX Runtime fuses the Relu into the convolution before them.

    Both are monotone and select values, so the result is the same bit for bit.
    """
    for relu in model.graph:
        pool = producer(relu) if relu.op_type == "Relu" else None
        if pool is None or pool.op_type != "MaxPool" or len(pool.outputs) > 1 or _is_shared(pool.outputs[0]):
            continue
        clipped = _copied(relu, pool.inputs, ir.Value(name=pool.outputs[0].name))
        pooled = _copied(pool, clipped.outputs, ir.Value())
        replace_nodes_and_values(model.graph, pool, [pool, relu], [clipped, pooled], relu.outputs, pooled.outputs)


def quantize_after_reshapes(model: ir.Model) -> None:
    """Move int8 Q/DQ pairs that precede a reshape behind it, because ONNX Runtime cannot load them otherwise.

    Rounding works value by value, so the result is the same.
    """
    for reshape in model.graph:
        dequantize = producer(reshape) if reshape.op_type in RESHAPES else None
        if dequantize is None or dequantize.op_type != DEQUANTIZE:
            continue
        quantize, zero_point = producer(dequantize), array(dequantize, 2)
        if quantize and quantize.op_type == QUANTIZE and zero_point is not None and zero_point.dtype == np.int8:
            _move_behind(model.graph, reshape, quantize, dequantize)
    RemoveUnusedNodesPass()(model)
    unshare_initializers(model.graph)


def _move_behind(graph: ir.Graph, reshape: ir.Node, quantize: ir.Node, dequantize: ir.Node) -> None:
    """Move a Q/DQ pair behind a reshape; if other nodes read the pair too, the reshape gets one of its own."""
    unshaped, shared = reshape.outputs[0], _is_shared(dequantize.outputs[0])
    result = ir.Value(name=unshaped.name, type=unshaped.type, shape=unshaped.shape)
    unshaped.replace_all_uses_with(result, replace_graph_outputs=True)
    unshaped.name = f"{result.name}.float"
    reshape.replace_input_with(0, quantize.inputs[0])
    q = _copied(quantize, [unshaped, *quantize.inputs[1:]], ir.Value(name=f"{result.name}.integers"))
    dq = _copied(dequantize, [*q.outputs, *dequantize.inputs[1:]], result)
    graph.insert_after(reshape, [q, dq])
    if shared:
        q.name, dq.name = f"{result.name}.{QUANTIZE}", f"{result.name}.{DEQUANTIZE}"


def _is_shared(value: ir.Value) -> bool:
    """Return True if a value has several readers, the network's output among them."""
    return len(value.uses()) + value.is_graph_output() > 1


def _copied(node: ir.Node, inputs: Sequence[ir.Value | None], output: ir.Value) -> ir.Node:
    """Return a node of the same name and attributes."""
    return ir.Node(node.domain, node.op_type, inputs, node.attributes.values(), outputs=[output], name=node.name)
