"""What a linter asks of an ONNX graph: its grids (QuantizeLinear, DequantizeLinear), its layers and who reads what.

Only the main graph is seen; graphs inside If and Loop are not.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, numpy_helper

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# Operators that only move values: ONNX Runtime carries a grid from their input to their output.
MOVES = ("MaxPool", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice")
QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
CLIPS = ("Relu", "Clip")
EIGHT_BITS: dict[int, tuple[int, int]] = {TensorProto.INT8: (-128, 127), TensorProto.UINT8: (0, 255)}
ROUNDS_AWAY = 0.5  # of a step: a bound as near as this to the grid's end cuts nothing (so ONNX Runtime has it)
SAFE_WEIGHT = 64  # 255 * (64 + 64) just fits the 16 bits in which fast kernels add two products


class Grid(NamedTuple):
    """What a Q or DQ node quantizes to.

    ``kind``: the integers' type, as TensorProto numbers it. ``scale``, ``zero_point``: None where computed on the run.
    """

    node: NodeProto
    kind: int
    scale: NDArray[np.generic] | None
    zero_point: NDArray[np.generic] | None

    @property
    def integers(self) -> str:
        """Name the type of the integers."""
        return str(TensorProto.DataType.Name(self.kind))


class Layer(NamedTuple):
    """A layer with a stored weight.

    ``grid``: the weight's, None where it is float. ``activation``: its input's grid, None where that is float.
    ``first``, ``last``: no other layer before, or behind it. ``inputs``, ``outputs``: channels.
    """

    node: NodeProto
    weight: TensorProto
    grid: Grid | None
    activation: Grid | None
    first: bool
    last: bool
    inputs: int
    outputs: int

    @property
    def quantized(self) -> bool:
        """Whether both weight and activations have a grid."""
        return self.grid is not None and self.activation is not None

    @property
    def saturates(self) -> bool:
        """Whether its int8 weights and 8-bit activations can be too large for the fast kernels of x86 without VNNI."""
        if self.activation is None or self.activation.kind not in EIGHT_BITS:
            return False
        if self.grid is None or self.weight.data_type != TensorProto.INT8:
            return False
        return bool((np.abs(numpy_helper.to_array(self.weight).astype(np.int16)) > SAFE_WEIGHT).any())


class GraphView:
    """The look-ups of one model's main graph."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        graph = proto.graph
        self.nodes = [node for node in graph.node if node.op_type != "Constant"]
        self.stored = {tensor.name: tensor for tensor in graph.initializer} | _constants(graph.node)
        self.made = {name: node for node in self.nodes for name in node.output}
        self._readers: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            for name in filter(None, node.input):
                self._readers.setdefault(name, []).append(node)
        self.grids = [self._grid(node) for node in self.nodes if node.op_type in (QUANTIZE, DEQUANTIZE)]
        self.activations = [
            grid for grid in self.grids if grid.node.op_type == QUANTIZE and grid.node.input[0] not in self.stored
        ]
        self.layers = self._layers()

    def quantizers(self, *kinds: int) -> list[Grid]:
        """Return the grids of activations whose integers are of these kinds."""
        return [grid for grid in self.activations if grid.kind in kinds]

    def constants(self, *kinds: int) -> list[Grid]:
        """Return the grids of stored tensors whose integers are of these kinds, of all where none is given."""
        stored = [grid for grid in self.grids if grid.node.input[0] in self.stored]
        return [grid for grid in stored if not kinds or grid.kind in kinds]

    def odd_widths(self, multiple: int) -> list[tuple[Layer, int, str]]:
        """Return layer, width and side of every width that is no multiple, the one that wastes most first.

        The image's channels and the last layer's outputs are what they must be.
        """
        sides = [(layer, layer.inputs, "inputs") for layer in self.layers if not layer.first]
        sides += [(layer, layer.outputs, "outputs") for layer in self.layers if not layer.last]
        odd = [(layer, width, side) for layer, width, side in sides if width % multiple]
        return sorted(odd, key=lambda entry: entry[1] % -multiple / entry[1])

    def readers(self, node: NodeProto) -> list[NodeProto]:
        """Return the nodes that read a node's first output."""
        return self._readers.get(node.output[0], [])

    def source(self, name: str) -> NodeProto | None:
        """Return the node that made a tensor's values, whatever moved them since."""
        node = self.made.get(name)
        while node is not None and node.op_type in MOVES:
            node = self.made.get(node.input[0])
        return node

    def is_dequantized(self, name: str) -> bool:
        """Return whether a tensor's values come from a DequantizeLinear."""
        source = self.source(name)
        return source is not None and source.op_type == DEQUANTIZE

    def absorbed(self, node: NodeProto, grid: Grid) -> bool:
        """Return whether a Relu or Clip does nothing that the 8-bit grid behind it does not do too."""
        if grid.kind not in EIGHT_BITS or grid.scale is None or grid.zero_point is None:
            return True
        qmin, qmax = EIGHT_BITS[grid.kind]
        if node.op_type == "Relu":
            return bool(np.all(grid.zero_point == qmin))
        low, high = (self._bound(node, index) for index in (1, 2))
        point, scale = grid.zero_point.astype(np.float64), grid.scale.astype(np.float64)
        above = low is None or np.all(low <= (qmin + ROUNDS_AWAY - point) * scale)
        below = high is None or np.all(high >= (qmax - ROUNDS_AWAY - point) * scale)
        return bool(above and below)

    def ends(self, node: NodeProto) -> set[str]:
        """Return what kinds of operator read a node's output, of a lone Relu or Clip what reads that."""
        readers = self.readers(node)
        if len(readers) == 1 and readers[0].op_type in CLIPS:
            return self.ends(readers[0])
        return {reader.op_type for reader in readers}

    def requantized(self, node: NodeProto) -> bool:
        """Return whether a QuantizeLinear reads a node's output, perhaps moved."""
        return any(
            reader.op_type == QUANTIZE or (reader.op_type in MOVES and self.requantized(reader))
            for reader in self.readers(node)
        )

    def _bound(self, node: NodeProto, index: int) -> float | None:
        tensor = self.stored.get(node.input[index]) if len(node.input) > index else None
        return None if tensor is None else float(numpy_helper.to_array(tensor).item())

    def _grid(self, node: NodeProto) -> Grid:
        point = self.stored.get(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        scale = self.stored.get(node.input[1])
        if point is not None:
            kind = point.data_type
        elif node.input[0] in self.stored and node.op_type == DEQUANTIZE:
            kind = self.stored[node.input[0]].data_type
        else:
            kind = next((a.i for a in node.attribute if a.name == "output_dtype" and a.i), TensorProto.UINT8)
        zero = np.zeros(1, np.int32) if len(node.input) < 3 or not node.input[2] else None
        return Grid(
            node,
            kind,
            None if scale is None else numpy_helper.to_array(scale),
            zero if point is None else numpy_helper.to_array(point),
        )

    def _layers(self) -> list[Layer]:
        inner = _touched(self.nodes)
        outer = _touched(self.nodes, backwards=True)
        found = []
        for node in (node for node in self.nodes if node.op_type in WEIGHTED):
            weight, grid = self._weight(node.input[1])
            if weight is None or len(weight.dims) < 2:
                continue
            first, last = node.input[0] not in inner, node.output[0] not in outer
            inputs, outputs = self._widths(node, weight)
            found.append(Layer(node, weight, grid, self._activation(node.input[0]), first, last, inputs, outputs))
        return found

    def _weight(self, name: str) -> tuple[TensorProto | None, Grid | None]:
        """Return the stored tensor behind a weight, and its grid."""
        source = self.source(name)
        if source is None:
            return self.stored.get(name), None
        if source.op_type not in (QUANTIZE, DEQUANTIZE):
            return None, None
        if source.input[0] in self.stored:
            return self.stored[source.input[0]], self._grid(source)
        return self._weight(source.input[0])

    def _activation(self, name: str) -> Grid | None:
        source = self.source(name)
        if source is None or source.op_type != DEQUANTIZE:
            return None
        quantize = self.made.get(source.input[0])
        return self._grid(quantize if quantize is not None and quantize.op_type == QUANTIZE else source)

    def _widths(self, node: NodeProto, weight: TensorProto) -> tuple[int, int]:
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        groups, (first, second) = attributes.get("group", 1), weight.dims[:2]
        if node.op_type == "Conv":
            return second * groups, first
        if node.op_type == "ConvTranspose":
            return first, second * groups
        maker = self.made.get(node.input[1])
        turned = attributes.get("transB", 0) ^ (maker is not None and maker.op_type == "Transpose")
        rows, columns = weight.dims[-2:]
        return (columns, rows) if turned else (rows, columns)


def title(node: NodeProto) -> str:
    """Name a node for a reader."""
    return node.name or f"{node.op_type} that makes {node.output[0]}"


def _constants(nodes: Iterable[NodeProto]) -> dict[str, TensorProto]:
    return {
        node.output[0]: attribute.t
        for node in nodes
        if node.op_type == "Constant"
        for attribute in node.attribute
        if attribute.name == "value"
    }


def _touched(nodes: list[NodeProto], backwards: bool = False) -> set[str]:
    """Return the tensors that some layer has a part in; backwards: those that some layer reads, however late."""
    found: set[str] = set()
    for node in reversed(nodes) if backwards else nodes:  # ONNX lists nodes in the order they run
        source, target = (node.output, node.input) if backwards else (node.input, node.output)
        if node.op_type in WEIGHTED or not found.isdisjoint(source):
            found.update(filter(None, target))
    return found
