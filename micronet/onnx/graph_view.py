"""A read-only view of an ONNX graph for the linter: its Q/DQ nodes, its layers, and which node reads which tensor.

Only the main graph is covered, not the subgraphs of If and Loop.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, numpy_helper

WEIGHTED_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# Operators that only select or move values: ONNX Runtime carries quantization across them, in both directions.
MOVING_OPS = ("MaxPool", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice")
QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
CLIP_OPS = ("Relu", "Clip")
EIGHT_BITS: dict[int, tuple[int, int]] = {TensorProto.INT8: (-128, 127), TensorProto.UINT8: (0, 255)}
HALF_STEP = 0.5  # a bound this close to the end of the range clips nothing; ONNX Runtime uses the same tolerance
SAFE_WEIGHT = 64  # 255 * (64 + 64) just fits the 16 bits in which the fast kernels add two products


class QDQNode(NamedTuple):
    """A QuantizeLinear or DequantizeLinear node.

    ``dtype``: its integer type, a TensorProto.DataType. ``scale``, ``zero_point``: None if computed at run time.
    """

    node: NodeProto
    dtype: int
    scale: NDArray[np.generic] | None
    zero_point: NDArray[np.generic] | None

    @property
    def integers(self) -> str:
        """The name of the integer type."""
        return str(TensorProto.DataType.Name(self.dtype))


class WeightedNode(NamedTuple):
    """A convolution or matrix product with a stored weight.

    ``weight_qdq``: the weight's Q/DQ node, None if the weight is float. ``input_qdq``: the input's, None if the input
    is float. ``first``, ``last``: no other such node precedes or follows it. ``inputs``, ``outputs``: channels.
    """

    node: NodeProto
    weight: TensorProto
    weight_qdq: QDQNode | None
    input_qdq: QDQNode | None
    first: bool
    last: bool
    inputs: int
    outputs: int

    @property
    def quantized(self) -> bool:
        """Whether both the weight and the input are quantized."""
        return self.weight_qdq is not None and self.input_qdq is not None

    @property
    def saturates(self) -> bool:
        """Whether int8 weights and 8-bit inputs can overflow the fast kernels of x86 processors without VNNI."""
        if self.input_qdq is None or self.input_qdq.dtype not in EIGHT_BITS:
            return False
        if self.weight_qdq is None or self.weight.data_type != TensorProto.INT8:
            return False
        return bool((np.abs(numpy_helper.to_array(self.weight).astype(np.int16)) > SAFE_WEIGHT).any())


class GraphView:
    """Lookups in the main graph of a model."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        graph = proto.graph
        self.nodes = [node for node in graph.node if node.op_type != "Constant"]
        self.constants = {tensor.name: tensor for tensor in graph.initializer} | _constants(graph.node)
        self.producer = {name: node for node in self.nodes for name in node.output}
        self._consumers: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            for name in filter(None, node.input):
                self._consumers.setdefault(name, []).append(node)
        self.qdq = [self._qdq(node) for node in self.nodes if node.op_type in (QUANTIZE, DEQUANTIZE)]
        self.activations = [
            each for each in self.qdq if each.node.op_type == QUANTIZE and each.node.input[0] not in self.constants
        ]
        self.layers = self._layers()

    def activation_quantizers(self, *dtypes: int) -> list[QDQNode]:
        """Return the QuantizeLinear nodes of activations with these integer types."""
        return [each for each in self.activations if each.dtype in dtypes]

    def stored_qdq(self, *dtypes: int) -> list[QDQNode]:
        """Return the Q/DQ nodes of stored tensors with these integer types, or with any type if none is given."""
        stored = [each for each in self.qdq if each.node.input[0] in self.constants]
        return [each for each in stored if not dtypes or each.dtype in dtypes]

    def odd_widths(self, multiple: int) -> list[tuple[WeightedNode, int, str]]:
        """Return (layer, width, side) for every width that is not a multiple, the most wasteful first.

        The channels of the image and the outputs of the last layer cannot be chosen, so they are left out.
        """
        sides = [(layer, layer.inputs, "inputs") for layer in self.layers if not layer.first]
        sides += [(layer, layer.outputs, "outputs") for layer in self.layers if not layer.last]
        odd = [(layer, width, side) for layer, width, side in sides if width % multiple]
        return sorted(odd, key=lambda entry: entry[1] % -multiple / entry[1])

    def consumers(self, node: NodeProto) -> list[NodeProto]:
        """Return the nodes that read a node's first output."""
        return self._consumers.get(node.output[0], [])

    def origin(self, name: str) -> NodeProto | None:
        """Return the node that computed a tensor's values, looking through operators that only move them."""
        node = self.producer.get(name)
        while node is not None and node.op_type in MOVING_OPS:
            node = self.producer.get(node.input[0])
        return node

    def is_dequantized(self, name: str) -> bool:
        """Return True if a tensor's values come from a DequantizeLinear."""
        origin = self.origin(name)
        return origin is not None and origin.op_type == DEQUANTIZE

    def is_absorbed(self, clip: NodeProto, quantizer: QDQNode) -> bool:
        """Return True if a Relu or Clip clips nothing that the 8-bit quantizer after it does not clip too."""
        if quantizer.dtype not in EIGHT_BITS or quantizer.scale is None or quantizer.zero_point is None:
            return True
        qmin, qmax = EIGHT_BITS[quantizer.dtype]
        if clip.op_type == "Relu":
            return bool(np.all(quantizer.zero_point == qmin))
        low, high = (self._bound(clip, index) for index in (1, 2))
        zero_point, scale = quantizer.zero_point.astype(np.float64), quantizer.scale.astype(np.float64)
        absorbs_low = low is None or np.all(low <= (qmin + HALF_STEP - zero_point) * scale)
        absorbs_high = high is None or np.all(high >= (qmax - HALF_STEP - zero_point) * scale)
        return bool(absorbs_low and absorbs_high)

    def fused_consumers(self, node: NodeProto) -> set[str]:
        """Return the operators that read a layer's output once a clip, and then moves of its values, are fused."""
        readers = self.consumers(node)
        for ops in (CLIP_OPS, MOVING_OPS):
            while len(readers) == 1 and readers[0].op_type in ops:
                readers = self.consumers(readers[0])
        return {reader.op_type for reader in readers}

    def is_requantized(self, node: NodeProto) -> bool:
        """Return True if a QuantizeLinear reads a node's output, directly or after moves."""
        return any(
            reader.op_type == QUANTIZE or (reader.op_type in MOVING_OPS and self.is_requantized(reader))
            for reader in self.consumers(node)
        )

    def _bound(self, node: NodeProto, index: int) -> float | None:
        tensor = self.constants.get(node.input[index]) if len(node.input) > index else None
        return None if tensor is None else float(numpy_helper.to_array(tensor).item())

    def _qdq(self, node: NodeProto) -> QDQNode:
        zero_point = self.constants.get(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        scale = self.constants.get(node.input[1])
        if zero_point is not None:
            dtype = zero_point.data_type
        elif node.input[0] in self.constants and node.op_type == DEQUANTIZE:
            dtype = self.constants[node.input[0]].data_type
        else:
            dtype = next((a.i for a in node.attribute if a.name == "output_dtype" and a.i), TensorProto.UINT8)
        default = np.zeros(1, np.int32) if len(node.input) < 3 or not node.input[2] else None
        return QDQNode(
            node,
            dtype,
            None if scale is None else numpy_helper.to_array(scale),
            default if zero_point is None else numpy_helper.to_array(zero_point),
        )

    def _layers(self) -> list[WeightedNode]:
        downstream = _layer_tensors(self.nodes)
        upstream = _layer_tensors(self.nodes, backwards=True)
        found = []
        for node in (node for node in self.nodes if node.op_type in WEIGHTED_OPS):
            weight, weight_qdq = self._weight(node.input[1])
            if weight is None or len(weight.dims) < 2:
                continue
            first, last = node.input[0] not in downstream, node.output[0] not in upstream
            widths = self._widths(node, weight)
            found.append(WeightedNode(node, weight, weight_qdq, self._input_qdq(node.input[0]), first, last, *widths))
        return found

    def _weight(self, name: str) -> tuple[TensorProto | None, QDQNode | None]:
        """Return the stored tensor behind a weight, and its Q/DQ node."""
        origin = self.origin(name)
        if origin is None:
            return self.constants.get(name), None
        if origin.op_type not in (QUANTIZE, DEQUANTIZE):
            return None, None
        if origin.input[0] in self.constants:
            return self.constants[origin.input[0]], self._qdq(origin)
        return self._weight(origin.input[0])

    def _input_qdq(self, name: str) -> QDQNode | None:
        origin = self.origin(name)
        if origin is None or origin.op_type != DEQUANTIZE:
            return None
        quantize = self.producer.get(origin.input[0])
        return self._qdq(quantize if quantize is not None and quantize.op_type == QUANTIZE else origin)

    def _widths(self, node: NodeProto, weight: TensorProto) -> tuple[int, int]:
        """Return a layer's input and output channels."""
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        groups, (first, second) = attributes.get("group", 1), weight.dims[:2]
        if node.op_type == "Conv":
            return second * groups, first
        if node.op_type == "ConvTranspose":
            return first, second * groups
        producer = self.producer.get(node.input[1])
        transposed = attributes.get("transB", 0) ^ (producer is not None and producer.op_type == "Transpose")
        rows, columns = weight.dims[-2:]
        return (columns, rows) if transposed else (rows, columns)


def title(node: NodeProto) -> str:
    """Return a node's name, or a description of a node without one."""
    return node.name or f"{node.op_type} that computes {node.output[0]}"


def _constants(nodes: Iterable[NodeProto]) -> dict[str, TensorProto]:
    return {
        node.output[0]: attribute.t
        for node in nodes
        if node.op_type == "Constant"
        for attribute in node.attribute
        if attribute.name == "value"
    }


def _layer_tensors(nodes: list[NodeProto], backwards: bool = False) -> set[str]:
    """Return the tensors that depend on some layer or, backwards, the tensors on which some layer depends."""
    found: set[str] = set()
    for node in reversed(nodes) if backwards else nodes:  # ONNX lists nodes in execution order
        source, target = (node.output, node.input) if backwards else (node.input, node.output)
        if node.op_type in WEIGHTED_OPS or not found.isdisjoint(source):
            found.update(filter(None, target))
    return found
