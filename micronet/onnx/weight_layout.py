"""How weights are stored for ONNX Runtime: matrices as ``MatMul`` reads them, integers only where it uses integers."""

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from micronet.onnx.graph_view import EIGHT_BITS, array, fused_consumers, producer, source_of, store
from micronet.onnx.operators import INT32_MAX
from micronet.onnx.ops import DEQUANTIZE, QUANTIZE

MATRIX = 2  # axes


def transpose_weights(graph: ir.Graph) -> None:
    """Store a quantized weight transposed where a graph transposes it, in place.

    ``nn.Linear`` of inputs with more than two axes becomes ``MatMul(x, Transpose(DequantizeLinear(w)))``. In some of
    them ONNX Runtime fuses the transpose with the product first, which then stays float.
    """
    for node in [node for node in graph if node.op_type == "Transpose"]:
        source = node.inputs[0].producer() if node.inputs[0] is not None else None
        if source is None or source.op_type != "DequantizeLinear" or not _is_own(source):
            continue
        perm, weight = node.attributes.get("perm"), source.inputs[0]
        if weight is None or weight.const_value is None:
            continue
        stored = weight.const_value.numpy()
        if stored.ndim != MATRIX or (perm is not None and list(perm.as_ints()) != [1, 0]):
            continue
        array, axis = stored.T.copy(), source.attributes.get("axis")
        weight.const_value = ir.tensor(array, name=weight.name)
        weight.shape = ir.Shape(array.shape)
        source.attributes["axis"] = ir.AttrInt64("axis", 1 - (1 if axis is None else axis.as_int() % 2))
        result = source.outputs[0]
        result.shape = ir.Shape(array.shape)
        node.outputs[0].replace_all_uses_with(result)
        graph.remove(node, safe=True)


def store_transposed_in_float(graph: ir.Graph) -> None:
    """Store the quantized weights of transposed convolutions as floats of the same values, in place.

    ONNX Runtime has no integer form of them, and would compute these floats anew in every run.
    """
    for node in [node for node in graph if node.op_type == "ConvTranspose"]:
        source = producer(node, 1)
        if source is None or source.op_type != DEQUANTIZE or len(source.outputs[0].uses()) > 1:
            continue
        q, scale, zero_point = (array(source, position) for position in range(3))
        if q is None or scale is None:
            continue
        zero_point = np.zeros_like(q, shape=scale.shape) if zero_point is None else zero_point
        axis = source.attributes.get_int("axis", 1) % q.ndim
        shape = [-1 if scale.ndim and position == axis else 1 for position in range(q.ndim)]
        scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
        values = (q.astype(np.int64) - zero_point).astype(np.float32) * scale
        value = source.outputs[0]
        given = [each for each in source.inputs if each is not None]
        stored = ir.val(value.name, const_value=ir.tensor(values, name=value.name))
        node.replace_input_with(1, stored)
        graph.remove(source, safe=True)
        for each in given:
            if not each.uses():
                graph.initializers.pop(str(each.name))
        graph.register_initializer(stored)


def keep_in_float(graph: ir.Graph) -> None:
    """Keep ONNX Runtime from rounding the float weights of layers that read integers, in place.

    Its optimizer WeightBiasQuantization, which only our sessions disable, would round them to 8 bits per tensor. It
    skips layers whose input has one scale per channel, and layers whose bias is not stored as a float tensor. So
    convolutions read their input with one scale per channel, all equal, because their fastest form needs a float bias;
    other layers get an int32 bias, of zeros if they had none.
    """
    for node in [node for node in graph if node.op_type in ("Conv", "ConvTranspose", "Gemm")]:
        source, weight = source_of(node.inputs[0]), array(node, 1)  # ONNX Runtime moves pairs behind what moves values
        if source is None or source.op_type != DEQUANTIZE or weight is None or weight.dtype != np.float32:
            continue
        channels = weight.shape[1] * node.attributes.get_int("group", 1)
        if node.op_type == "Conv" and channels > 1 and producer(node) is source:
            _read_by_channels(graph, node, source, channels)
            continue
        rows = 0 if node.op_type == "Conv" or node.attributes.get_int("transB", 0) == 1 else 1
        outputs = channels if node.op_type == "ConvTranspose" else weight.shape[rows]
        has_bias = len(node.inputs) > 2 and node.inputs[2] is not None
        bias = array(node, 2) if has_bias else np.zeros(outputs, np.float32)
        if bias is None or bias.ndim != 1:  # the optimizer only takes stored vectors
            continue
        unit = np.float32(np.abs(bias).max() / (INT32_MAX // 2)) or np.float32(1)  # keeps all digits of a float
        node.resize_inputs(3)
        _read_integers(graph, node, np.rint(bias / np.float64(unit)).astype(np.int32), unit, {})


def _read_by_channels(graph: ir.Graph, node: ir.Node, source: ir.Node, channels: int) -> None:
    """Let a convolution dequantize its input itself, with one scale for each channel, all equal."""
    parts = [array(source, index) if index < len(source.inputs) else None for index in (1, 2)]
    if parts[0] is None or parts[0].size > 1:
        return
    name = f"{node.name}.input"
    inputs = [source.inputs[0]]
    for kind, values in zip(("scale", "zero_point"), parts, strict=True):
        if values is not None:
            inputs.append(store(graph, f"{name}.channels.{kind}", np.repeat(values.ravel(), channels)))
    own = ir.node(DEQUANTIZE, inputs, {"axis": 1}, name=f"{name}.{DEQUANTIZE}")
    own.outputs[0].name = f"{name}.float"
    graph.insert_before(node, own)
    node.replace_input_with(0, own.outputs[0])


def _read_integers(graph: ir.Graph, node: ir.Node, q: NDArray[Any], unit: Any, attributes: dict[str, int]) -> None:
    """Give a node a bias that is stored in integers of a unit."""
    stored = [store(graph, f"{node.name}.bias.{name}", values) for name, values in (("q", q), ("scale", unit))]
    dequantize = ir.node(DEQUANTIZE, stored, attributes, name=f"{node.name}.bias.{DEQUANTIZE}")
    dequantize.outputs[0].name = f"{node.name}.bias.float"
    graph.insert_before(node, dequantize)
    node.replace_input_with(2, dequantize.outputs[0])


def _is_own(node: ir.Node) -> bool:
    """Return True if a node alone reads a stored tensor, by scales of one per row or column, and one other reads it."""
    weight, result = node.inputs[0], node.outputs[0]
    block = node.attributes.get("block_size")
    stored = weight is not None and weight.is_initializer() and len(weight.uses()) == 1
    return stored and len(result.uses()) == 1 and not result.is_graph_output() and (block is None or not block.as_int())


def quantize_biases(graph: ir.Graph) -> None:
    """Store the float biases of quantized layers in int32, in the unit of their sums, in place.

    A layer that is called several times has an input scale for each call, so torch has no integers of its bias. With a
    float bias, ONNX Runtime computes a convolution in float, unless an optimizer that we disable stores these integers.
    """
    for node in [node for node in graph if node.op_type in ("Conv", "Gemm") and len(node.inputs) > 2]:
        bias, read, weight = array(node, 2), source_of(node.inputs[0]), producer(node, 1)
        if bias is None or bias.dtype != np.float32 or bias.ndim != 1 or read is None or weight is None:
            continue
        if node.op_type == "Conv" and fused_consumers(node) != {QUANTIZE}:
            continue
        own, rows = _scale(read), _scale(weight)
        if own is None or rows is None or own.size > 1 or rows.size not in (1, bias.size):
            continue
        unit = own.astype(np.float64).ravel() * rows.astype(np.float64).ravel() + np.zeros(bias.size)
        q = np.rint(bias / unit)
        if not (np.abs(q) <= INT32_MAX).all():
            continue
        _read_integers(graph, node, q.astype(np.int32), unit.astype(np.float32), {"axis": 0})


def _scale(node: ir.Node) -> NDArray[Any] | None:
    """Return the stored scale of a node that dequantizes 8 bits; None for another node."""
    eight_bits = node.op_type == DEQUANTIZE and node.inputs[0] is not None and node.inputs[0].dtype in EIGHT_BITS
    return array(node, 1) if eight_bits else None
