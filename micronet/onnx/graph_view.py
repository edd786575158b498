"""A view of an ONNX graph: its Q/DQ nodes, its layers, which node reads which tensor, and stored tensors.

Only the main graph is covered, not the subgraphs of If and Loop.
"""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from micronet.errors import MicronetError, first_line
from micronet.onnx.ops import CLIP_OPS, DEQUANTIZE, MOVING_OPS, QUANTIZE, WEIGHTED_OPS
from micronet.onnx.stored import node_lists

EIGHT_BITS = {ir.DataType.INT8: (-128, 127), ir.DataType.UINT8: (0, 255)}
HALVES = ir.DataType.FLOAT16, ir.DataType.BFLOAT16
HALF_STEP = 0.5  # a bound this close to the end of the range clips nothing; ONNX Runtime uses the same tolerance
SAFE_WEIGHT = 64  # 255 * (64 + 64) just fits the 16 bits in which the fast kernels add two products


class QDQNode(NamedTuple):
    """A QuantizeLinear or DequantizeLinear node. A scale or zero point is None if it is computed at run time."""

    node: ir.Node
    dtype: ir.DataType  # of the integers
    scale: NDArray[np.generic] | None
    zero_point: NDArray[np.generic] | None


class WeightedNode(NamedTuple):
    """A convolution or matrix product with a stored weight."""

    node: ir.Node
    weight: ir.TensorProtocol
    weight_qdq: QDQNode | None  # None if the weight is float
    input_qdq: QDQNode | None  # None if the input is float
    first: bool  # no other such node precedes it
    last: bool  # no other such node follows it
    inputs: int  # channels
    outputs: int

    @property
    def quantized(self) -> bool:
        """Whether both the weight and the input are quantized."""
        return self.weight_qdq is not None and self.input_qdq is not None

    @property
    def saturates(self) -> bool:
        """Whether int8 weights and 8-bit inputs can overflow the fast kernels of x86 processors without VNNI."""
        int8 = self.weight_qdq is not None and self.weight.dtype == ir.DataType.INT8
        if not int8 or self.input_qdq is None or self.input_qdq.dtype not in EIGHT_BITS:
            return False
        return bool((np.abs(self.weight.numpy().astype(np.int16)) > SAFE_WEIGHT).any())


class GraphView:
    """Lookups in the main graph of a model; raises MicronetError if onnx_ir cannot read it."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        try:
            model = ir.from_proto(_without_maps(proto))
        except ir.serde.SerdeError as error:
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            raise MicronetError(f"the ONNX model is damaged ({first_line(cause)}); export it again") from error
        LiftConstantsToInitializersPass(size_limit=0)(model)
        self.nodes = list(model.graph)
        self.qdq = [qdq_node(node) for node in self.nodes if node.op_type in (QUANTIZE, DEQUANTIZE)]
        self.stored = [each for each in self.qdq if stored(each.node) is not None]
        computed = [each for each in self.qdq if stored(each.node) is None]
        self.activations = [each for each in computed if each.node.op_type == QUANTIZE]
        self.layers = self._layers()

    def _layers(self) -> list[WeightedNode]:
        downstream = _layer_tensors(self.nodes)
        upstream = _layer_tensors(self.nodes, backwards=True)
        found = []
        for node in (node for node in self.nodes if node.op_type in WEIGHTED_OPS):
            weight, weight_qdq = _weight(node.inputs[1])
            if weight is None or len(weight.shape) < 2:
                continue
            first, last = node.inputs[0] not in downstream, node.outputs[0] not in upstream
            widths = _widths(node, weight)
            found.append(WeightedNode(node, weight, weight_qdq, _input_qdq(node.inputs[0]), first, last, *widths))
        return found


def _without_maps(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model without the types of maps, which onnx_ir does not know and classifiers of scikit-learn return."""

    def typed(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
        graphs = list(node_lists(model.graph, *model.functions))
        lists = [[*getattr(each, "input", ()), *getattr(each, "output", ()), *each.value_info] for each in graphs]
        return [each for values in lists for each in values if isinstance(each, onnx.ValueInfoProto) and _has_map(each)]

    if not typed(proto):
        return proto
    plain = onnx.ModelProto()
    plain.CopyFrom(proto)
    for each in typed(plain):
        each.ClearField("type")
    return plain


def _has_map(value: onnx.ValueInfoProto) -> bool:
    kind = value.type
    while (inner := kind.WhichOneof("value")) in ("sequence_type", "optional_type"):
        kind = getattr(kind, inner).elem_type
    return bool(inner == "map_type")


def producer(node: ir.Node, index: int = 0) -> ir.Node | None:
    """Return the node that computes an input, or None if it is stored or the network's."""
    value = node.inputs[index]
    return None if value is None else value.producer()


def store(graph: ir.Graph, name: str, values: Any) -> ir.Value:
    """Add a stored tensor to a graph; the name must be new there."""
    value = ir.val(name, const_value=ir.tensor(np.asarray(values), name=name))
    graph.register_initializer(value)
    return value


def stored(node: ir.Node, index: int = 0) -> ir.TensorProtocol | None:
    """Return the tensor of an input, or None if it is absent or computed at run time."""
    value = node.inputs[index] if index < len(node.inputs) else None
    return None if value is None else value.const_value


def array(node: ir.Node, index: int = 0) -> NDArray[Any] | None:
    """Return the values of an input, or None if it is absent or computed at run time."""
    tensor = stored(node, index)
    return None if tensor is None else tensor.numpy()


def computed_constants(nodes: Iterable[ir.Node]) -> set[ir.Value]:
    """Return the tensors that nodes, in order, compute from stored ones alone."""
    found: set[ir.Value] = set()
    for node in nodes:
        inputs = [value for value in node.inputs if value is not None]
        if inputs and all(value.const_value is not None or value in found for value in inputs):
            found.update(node.outputs)
    return found


def is_dequantized(value: ir.Value | None) -> bool:
    """Return True if a tensor's values come from a DequantizeLinear."""
    origin = source_of(value)
    return origin is not None and origin.op_type == DEQUANTIZE


def is_absorbed(clip: ir.Node, quantizer: QDQNode) -> bool:
    """Return True if a Relu or Clip clips nothing that the 8-bit quantizer after it does not clip too."""
    if quantizer.dtype not in EIGHT_BITS or quantizer.scale is None or quantizer.zero_point is None:
        return True
    qmin, qmax = EIGHT_BITS[quantizer.dtype]
    if clip.op_type == "Relu":
        return bool(np.all(quantizer.zero_point == qmin))
    low, high = (array(clip, index) for index in (1, 2))
    zero_point, scale = quantizer.zero_point.astype(np.float64), quantizer.scale.astype(np.float64)
    absorbs_low = low is None or np.all(low <= (qmin + HALF_STEP - zero_point) * scale)
    absorbs_high = high is None or np.all(high >= (qmax - HALF_STEP - zero_point) * scale)
    return bool(absorbs_low and absorbs_high)


def fused_consumers(node: ir.Node) -> set[str]:
    """Return the operators that read a layer's output once a clip, and then moves of its values, are fused."""
    readers = node.outputs[0].consumers()
    for ops in (CLIP_OPS, MOVING_OPS):
        while len(readers) == 1 and readers[0].op_type in ops:
            readers = readers[0].outputs[0].consumers()
    return {reader.op_type for reader in readers}


def is_requantized(node: ir.Node) -> bool:
    """Return True if a QuantizeLinear reads a node's output, directly or after moves."""
    return any(
        reader.op_type == QUANTIZE or (reader.op_type in MOVING_OPS and is_requantized(reader))
        for reader in node.outputs[0].consumers()
    )


def of_type(nodes: list[QDQNode], dtype: ir.DataType) -> list[QDQNode]:
    """Return the nodes whose integers have a type."""
    return [each for each in nodes if each.dtype == dtype]


def title(node: ir.Node) -> str:
    """Return a node's name, or a description of a node without one."""
    return node.name or f"{node.op_type} producing {node.outputs[0].name}"


def layer_name(node: ir.Node) -> str:
    """Return the name of the layer that a node belongs to, as --exclude takes it."""
    return re.sub(rf"\.{node.op_type}([._]\d+)?$", "", title(node))


def source_of(value: ir.Value | None) -> ir.Node | None:
    """Return the node that computed a tensor's values, looking through operators that only move them."""
    node = None if value is None else value.producer()
    while node is not None and node.op_type in MOVING_OPS:
        node = producer(node)
    return node


def qdq_node(node: ir.Node) -> QDQNode:
    """Return a QuantizeLinear or DequantizeLinear with what it stores."""
    typed = stored(node, 2) or (stored(node) if node.op_type == DEQUANTIZE else None)
    dtype = typed.dtype if typed else ir.DataType(node.attributes.get_int("output_dtype", 0) or ir.DataType.UINT8)
    symmetric = len(node.inputs) < 3 or node.inputs[2] is None
    return QDQNode(node, dtype, array(node, 1), np.zeros(1, np.int32) if symmetric else array(node, 2))


def _weight(value: ir.Value | None) -> tuple[ir.TensorProtocol | None, QDQNode | None]:
    """Return the stored tensor behind a weight, and its Q/DQ node."""
    origin = source_of(value)
    if origin is None:
        return None if value is None else value.const_value, None
    if origin.op_type == "Cast":
        tensor = stored(origin)
        return (tensor if tensor is not None and tensor.dtype in HALVES else None), None
    if origin.op_type not in (QUANTIZE, DEQUANTIZE):
        return None, None
    tensor = stored(origin)
    return _weight(origin.inputs[0]) if tensor is None else (tensor, qdq_node(origin))


def _input_qdq(value: ir.Value | None) -> QDQNode | None:
    origin = source_of(value)
    if origin is None or origin.op_type != DEQUANTIZE:
        return None
    quantize = producer(origin)
    return qdq_node(quantize if quantize is not None and quantize.op_type == QUANTIZE else origin)


def _widths(node: ir.Node, weight: ir.TensorProtocol) -> tuple[int, int]:
    """Return a layer's input and output channels."""
    shape = weight.shape.numpy()
    groups, (first, second) = node.attributes.get_int("group", 1), shape[:2]
    if node.op_type == "Conv":
        return second * groups, first
    if node.op_type == "ConvTranspose":
        return first, second * groups
    before = producer(node, 1)
    transposed = node.attributes.get_int("transB", 0) ^ (before is not None and before.op_type == "Transpose")
    rows, columns = shape[-2:]
    return (columns, rows) if transposed else (rows, columns)


def _layer_tensors(nodes: list[ir.Node], backwards: bool = False) -> set[ir.Value]:
    """Return the tensors that depend on some layer or, backwards, the tensors on which some layer depends."""
    found: set[ir.Value] = set()
    for node in reversed(nodes) if backwards else nodes:  # ONNX lists nodes in execution order
        source, target = (node.outputs, node.inputs) if backwards else (node.inputs, node.outputs)
        if node.op_type in WEIGHTED_OPS or not found.isdisjoint(source):
            found.update(value for value in target if value is not None)
    return found
