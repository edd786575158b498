"""Which operators of a float ONNX network run in integers, and which tensors must be quantized for that.

The network stays correct whatever is chosen; the choice decides speed and accuracy. ONNX Runtime computes an operator
in integers if its inputs come from DequantizeLinear and, in most cases, a QuantizeLinear reads its output. A Relu or
Clip between the operator and that QuantizeLinear costs nothing.

Convolutions and matrix products with stored weights come first. The operators between them follow if their inputs are
quantized anyway and an integer operator reads their output. The ends of a network (the decoding of boxes, softmax, …)
stay in float: they take little time, and often join values of very different ranges.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from micronet.onnx.float_nodes import (
    activations,
    data_inputs,
    has_layers,
    is_absorbed,
    is_float,
    is_nearest,
    is_small,
    is_smaller,
    layers_inside,
    makes_smaller,
    no_integer_form,
    obstacle,
    rank,
    settled,
)
from micronet.onnx.ops import (
    CLIP_OPS,
    CONTROL,
    CONVOLUTIONS,
    DEFORMABLE,
    FOR_TENSORRT,
    FUNCTIONS,
    FUSED_BY_GEMM,
    JOINS,
    MOVES,
    RECURRENT,
    WEIGHTED_OPS,
)
from micronet.quantization.config import NO_DEFORMABLE

NO_RANGE = "no usable range for its input or output"


@dataclass(frozen=True)
class Plan:
    """What to quantize."""

    nodes: list[ir.Node]  # that run in integers
    roots: dict[ir.Value, ir.Value]  # every tensor with a Q/DQ pair -> the tensor whose grid it shares, often itself
    computed: set[ir.Value]  # those that an integer operator writes, so all readers read the quantized values
    scaled: dict[ir.Value, tuple[ir.Value, float]]  # products with a number: only the scale differs from the factor's
    floats: dict[str, str]  # layers that stay in float -> why


@dataclass
class Planner:
    """Finds the plan of a graph.

    Attributes:
        graph: A float network; the types of its tensors are known.
        signed: For TensorRT, which fuses elementwise functions itself.
        allowed: The names of the tensors that have ranges; None: all.
        excluded: Layers to leave in float -> why.
    """

    graph: ir.Graph
    signed: bool = False
    allowed: Collection[str] | None = None
    excluded: Mapping[str, str] | None = None
    floats: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.outputs = set(self.graph.outputs)
        self.layers = {node for node in self.graph if self._is_integer_layer(node)}
        self.read = {node.inputs[0] for node in self.layers}  # by layers
        usual = FOR_TENSORRT if self.signed else JOINS | FUNCTIONS | MOVES
        absorbed = {node for node in self.graph if is_absorbed(node, self.outputs)}
        self.others = {
            node
            for node in self.graph
            if (node.op_type in usual or (node.op_type in CLIP_OPS and node not in absorbed))
            and self._is_possible(node)
        }

    def plan(self) -> Plan:
        """Return the plan: each of its operators has quantized inputs and a reader in integers."""
        self._drop_unfed()
        self._drop_isolated()
        self._drop_unfed()
        nodes = [node for node in self.graph if node in self.layers or node in self.others]
        scaled = {node.outputs[0]: pair for node in nodes if (pair := self._scaling(node)) is not None}
        roots = self._grids(nodes, scaled)
        return Plan(nodes, roots, {value for value in roots if self._is_integer(value)}, scaled, self.floats)

    def _scaling(self, node: ir.Node) -> tuple[ir.Value, float] | None:
        """Return the tensor and the number > 0 that a Mul multiplies, or None for other operators."""
        constants = [value.const_value for value in data_inputs(node) if value.const_value is not None]
        inputs = list(activations(node))
        if node.op_type != "Mul" or len(inputs) != 1 or len(constants) != 1 or constants[0].size != 1:
            return None
        factor = float(constants[0].numpy().reshape(-1)[0])
        same = settled(node.outputs[0], self.outputs) is node.outputs[0] and len(constants[0].shape) <= rank(inputs[0])
        return (inputs[0], factor) if factor > 0 and same else None

    def _is_integer_layer(self, node: ir.Node) -> bool:
        if node.op_type in RECURRENT:
            self.floats[node.name or ""] = no_integer_form(node.op_type)
        if node.op_type == DEFORMABLE:
            self.floats[node.name or ""] = NO_DEFORMABLE
        if node.op_type in CONTROL and has_layers(node):
            self.floats[node.name or ""] = layers_inside(node.op_type)
        if node.op_type not in WEIGHTED_OPS or not is_float(node.outputs[0]):
            return False
        why = (self.excluded or {}).get(node.name or "") or obstacle(node, self.signed)
        ends = [node.inputs[0], *([settled(node.outputs[0], self.outputs)] if self._needs_output(node) else [])]
        if why is None and not all(map(self._has_range, ends)):
            why = NO_RANGE
        if why is not None:
            self.floats[node.name or ""] = why
        return why is None

    def _needs_output(self, node: ir.Node) -> bool:
        """Return True if a layer only runs in integers with a quantized output, or else is fused in float first."""
        readers = node.outputs[0].consumers()
        if node.op_type in CONVOLUTIONS or len(readers) != 1:
            return node.op_type in CONVOLUTIONS
        if node.op_type == "MatMul":  # ONNX Runtime looks for the quantizer behind the clip, if that has one reader
            clipped = readers[0].outputs[0]
            is_read_once = len(clipped.uses()) == 1 and clipped not in self.outputs
            return readers[0].op_type in CLIP_OPS and is_read_once and not self.signed
        return node.op_type == "Gemm" and readers[0].op_type in FUSED_BY_GEMM

    def _has_range(self, value: ir.Value | None) -> bool:
        return value is not None and is_float(value) and (self.allowed is None or value.name in self.allowed)

    def _is_possible(self, node: ir.Node) -> bool:
        """Return True if a node's tensors are float, with ranges, and its constants are finite."""
        if node.domain not in ("", "ai.onnx") or (node.op_type == "Resize" and not is_nearest(node)):
            return False
        constants = [constant for value in data_inputs(node) if (constant := value.const_value) is not None]
        if node.op_type not in ("Add", "Mul") and constants:
            return False
        if any(
            not np.isfinite(constant.numpy()).all() for constant in constants if constant.dtype == ir.DataType.FLOAT
        ):
            return False
        if node.op_type == "MaxPool" and len(node.outputs) > 1 and node.outputs[1].uses():
            return False
        inputs, outputs = list(activations(node)), (settled(value, self.outputs) for value in self._used(node))
        return bool(inputs) and all(map(self._has_range, (*inputs, *outputs)))

    def _used(self, node: ir.Node) -> list[ir.Value]:
        return [value for value in node.outputs if value.uses() or value in self.outputs]

    def _is_fed(self, node: ir.Node) -> bool:
        inputs = list(activations(node))
        fed = [value for value in inputs if value in self.read or self._is_integer(value)]
        return bool(fed) and all(value in fed or is_smaller(value, node.outputs[0]) for value in inputs)

    def _is_wanted(self, node: ir.Node) -> bool:
        """Return True if an integer operator reads a node's output; moves may always stay in integers."""
        return self._is_move(node) or self._reaches_integers(settled(node.outputs[0], self.outputs))

    def _is_move(self, node: ir.Node) -> bool:
        return node.op_type in MOVES or self._scaling(node) is not None

    def _reaches_integers(self, value: ir.Value) -> bool:
        if value in self.read:
            return True
        return any(
            reader in self.others
            and (not self._is_move(reader) or any(self._reaches_integers(out) for out in reader.outputs))
            for reader in value.consumers()
        )

    def _is_integer(self, value: ir.Value) -> bool:
        """Return True if an integer operator writes a tensor, directly or through a Relu or Clip that is absorbed."""
        node = value.producer()
        while node is not None and is_absorbed(node, self.outputs):
            node = node.inputs[0].producer() if node.inputs[0] is not None else None
        if node is None or (node in self.layers and not self._needs_output(node)):
            return False
        return node in self.layers or node in self.others

    def _drop_unfed(self) -> None:
        """Drop operators between layers until each of the rest has quantized inputs and a reader in integers."""
        while True:
            kept = {node for node in self.others if self._is_fed(node) and self._is_wanted(node)}
            if kept == self.others:
                return
            self.others = kept

    def _drop_isolated(self) -> None:
        """Leave layers in float that add up few products and stand between float operators, unless all of them do."""
        every, small = set(self.layers), dict[str, str]()
        for node in [node for node in self.graph if node in self.layers]:
            value = node.inputs[0]
            origin = value.producer() if value is not None else None
            while origin is not None and origin.op_type in MOVES and origin.inputs[0] is not None:
                origin = origin.inputs[0].producer()
            if value is None or origin is None or self._is_integer(value):
                continue
            if is_small(node) and not self._reaches_integers(settled(node.outputs[0], self.outputs)):
                self.layers.discard(node)
                small[node.name or ""] = "too small to benefit from integer arithmetic"
        if not self.layers:  # with large ones in integers, the file is smaller at least
            self.layers = {node for node in every if makes_smaller(node)}
        kept = {node.name or "" for node in self.layers}
        self.floats |= {name: why for name, why in small.items() if name not in kept}
        self.read = {node.inputs[0] for node in self.layers}

    def _grids(self, nodes: list[ir.Node], scaled: Collection[ir.Value]) -> dict[ir.Value, ir.Value]:
        """Return the tensors to quantize, each with the one whose grid it has."""
        found: dict[ir.Value, None] = {}
        for node in nodes:
            found.update(dict.fromkeys(activations(node)))
            if node in self.others or self._needs_output(node):
                found.update(dict.fromkeys(settled(value, self.outputs) for value in self._used(node)))
        roots = {value: value for value in found}

        def root(value: ir.Value) -> ir.Value:
            while roots[value] is not value:
                value = roots[value]
            return value

        for node in nodes:
            if node.op_type in MOVES:
                for value in node.outputs:
                    if value in roots and node.inputs[0] in roots:
                        roots[root(value)] = root(node.inputs[0])
            elif node.op_type == "Concat":
                # One grid saves a rounding, where nothing else reads the input.
                joined = settled(node.outputs[0], self.outputs)
                for value in activations(node):
                    if len(value.uses()) == 1 and value not in self.outputs and root(value) not in scaled:
                        roots[root(value)] = root(joined)
        return {value: root(value) for value in roots}
