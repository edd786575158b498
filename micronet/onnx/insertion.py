"""Write the integers of a plan into a float ONNX network: Q/DQ pairs, int8 weights and int32 biases."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from micronet.onnx.float_nodes import clip_bounds, data_inputs, output_axis
from micronet.onnx.graph_view import array, store
from micronet.onnx.integer_plan import Plan
from micronet.onnx.ops import CLIP_OPS, DEQUANTIZE, JOINS, QUANTIZE, WEIGHTED_OPS
from micronet.quantization.functional import range_qparams

ValueRange = tuple[float, float]  # the smallest and the largest value that the grid covers
BIAS_MAX = 2**30  # of an int32 bias; the rest is for the sum of the products
FLOAT_OUTPUT = "_float"  # ends the name of what is quantized into an output of the network, which keeps the name
SMALLEST_SCALE = 2.0**-60


@dataclass(frozen=True)
class Grid:
    """The scale and the zero point of a tensor."""

    scale: NDArray[np.float32]
    zero_point: NDArray[Any]


@dataclass(frozen=True)
class Insertion:
    """Writes a plan into a graph.

    Attributes:
        graph: The graph of the plan's nodes, changed in place.
        plan: What to quantize.
        ranges: The range of every tensor of the plan, by name.
        signed: int8 activations with zero point 0 and float biases, for TensorRT; otherwise uint8.
        per_channel: One weight scale per output channel instead of one per layer.
        bits: 7 or 8, of the weights.
    """

    graph: ir.Graph
    plan: Plan
    ranges: Mapping[str, ValueRange]
    signed: bool
    per_channel: bool
    bits: int

    def write(self) -> None:
        """Insert everything; sort the graph afterwards."""
        grids, chosen, quantized = self.grids(), set(self.plan.nodes), dict[ir.Value, ir.Value]()
        for node in self.plan.nodes:
            if node.op_type in WEIGHTED_OPS:
                self._write_weight(node, grids[node.inputs[0]])  # type: ignore[index]  # a layer has an input
            elif node.op_type in JOINS and node.outputs[0] not in self.plan.scaled:
                self._write_constants(node)
        for value, grid in grids.items():
            self._write_pair(value, grid, chosen, quantized)

    def grids(self) -> dict[ir.Value, Grid]:
        """Return the grid of every tensor of the plan: of all that share it, the widest range."""
        widest: dict[ir.Value, ValueRange] = {}
        for value, root in self.plan.roots.items():
            low, high = _clipped(value, self.ranges[str(value.name)])
            old = widest.get(root, (low, high))
            widest[root] = min(low, old[0]), max(high, old[1])
        found = {root: self._grid(ends) for root, ends in widest.items()}
        for value, (source, factor) in self.plan.scaled.items():
            if value in self.plan.roots:
                grid = found[self.plan.roots[source]]
                found[value] = Grid((grid.scale * np.float32(factor)).astype(np.float32), grid.zero_point)
        return {value: found[root] for value, root in self.plan.roots.items()}

    def _grid(self, ends: ValueRange) -> Grid:
        qmin, qmax = (-128, 127) if self.signed else (0, 255)
        low, high = (torch.tensor(end, dtype=torch.float32) for end in ends)
        scale, zero_point = range_qparams(low, high, qmin, qmax, symmetric=self.signed)
        return Grid(scale.numpy(), zero_point.numpy().astype(np.int8 if self.signed else np.uint8))

    def _write_pair(
        self, value: ir.Value, grid: Grid, chosen: set[ir.Node], quantized: dict[ir.Value, ir.Value]
    ) -> None:
        """Quantize a tensor for its integer readers or, if an integer operator computes it, for all readers.

        ``quantized``: the integers of the tensors done already, which scaled ones share.
        """
        name = str(value.name)
        computed = value in self.plan.computed
        scale, zero_point = self._store(f"{name}_scale", grid.scale), self._store(f"{name}_zero_point", grid.zero_point)
        readers = [(node, index) for node, index in value.uses() if computed or node in chosen]
        if value in self.plan.scaled:
            quantized[value] = quantized[self.plan.scaled[value][0]]
        else:
            quantize = ir.node(QUANTIZE, [value, scale, zero_point], name=f"{name}_{QUANTIZE}")
            quantize.outputs[0].name = f"{name}_quantized"
            quantized[value] = quantize.outputs[0]
            self.graph.append(quantize)
        dequantize = ir.node(DEQUANTIZE, [quantized[value], scale, zero_point], name=f"{name}_{DEQUANTIZE}")
        self.graph.append(dequantize)
        result = dequantize.outputs[0]
        result.name, result.dtype, result.shape = f"{name}_dequantized", ir.DataType.FLOAT, value.shape
        for node, index in readers:
            node.replace_input_with(index, result)
        if computed and value in self.graph.outputs:
            value.name, result.name = f"{name}{FLOAT_OUTPUT}", name
            for index, output in enumerate(self.graph.outputs):
                if output is value:
                    self.graph.outputs[index] = result

    def _write_weight(self, node: ir.Node, grid: Grid) -> None:
        weight, axis = np.asarray(array(node, 1), np.float32), output_axis(node)
        bias = array(node, 2) if len(node.inputs) > 2 and node.inputs[2] is not None else None
        others = tuple(index for index in range(weight.ndim) if index != axis) if self.per_channel else None
        largest = np.abs(weight).max(axis=others) if weight.size else np.zeros(1)
        qmax = 2 ** (self.bits - 1) - 1
        scale = np.maximum(np.atleast_1d(largest) / qmax, SMALLEST_SCALE)
        if bias is not None and not self.signed and node.op_type in ("Conv", "Gemm"):
            bound = np.abs(bias.astype(np.float64)).reshape(-1) / (float(grid.scale) * BIAS_MAX)
            scale = np.maximum(scale, bound if self.per_channel and bound.size == scale.size else bound.max(initial=0))
        scale = scale.astype(np.float32)
        shape = [1] * weight.ndim
        shape[axis] = scale.size
        integers = np.clip(np.round(weight / scale.reshape(shape)), -qmax, qmax).astype(np.int8)
        self._replace(node, 1, integers, scale, axis)
        if bias is not None and not self.signed and bias.ndim == 1 and node.op_type in ("Conv", "Gemm"):
            step = (scale.astype(np.float64) * float(grid.scale)).astype(np.float32)
            rounded = np.clip(np.round(bias / step.astype(np.float64)), -(2**31), 2**31 - 1).astype(np.int32)
            self._replace(node, 2, rounded, step, 0)

    def _replace(
        self, node: ir.Node, index: int, integers: NDArray[Any], scale: NDArray[np.float32], axis: int
    ) -> None:
        """Give an input stored as integers its own DequantizeLinear."""
        value = node.inputs[index]
        assert value is not None
        name = f"{node.name}_{value.name}"
        per_axis = scale.size > 1 or self.per_channel
        own = scale if per_axis else scale.reshape(())
        inputs = [
            self._store(f"{name}_quantized", integers),
            self._store(f"{name}_scale", own),
            self._store(f"{name}_zero_point", np.zeros_like(own, dtype=integers.dtype)),
        ]
        attributes = {"axis": axis} if per_axis else {}
        dequantize = ir.node(DEQUANTIZE, inputs, attributes, name=f"{name}_{DEQUANTIZE}")
        dequantize.outputs[0].name = f"{name}_dequantized"
        self.graph.append(dequantize)
        node.replace_input_with(index, dequantize.outputs[0])

    def _write_constants(self, node: ir.Node) -> None:
        """Quantize the constant operand of an Add or a Mul; a single value loses nothing."""
        for index, value in enumerate(node.inputs):
            if value is None or value.const_value is None or value not in data_inputs(node):
                continue
            values = value.const_value.numpy()
            grid = self._grid((min(0.0, float(values.min(initial=0))), max(0.0, float(values.max(initial=0)))))
            limits = np.iinfo(grid.zero_point.dtype)
            integers = np.round(values / grid.scale) + grid.zero_point
            name = f"{node.name}_{value.name}"
            inputs = [
                self._store(f"{name}_quantized", np.clip(integers, limits.min, limits.max).astype(limits.dtype)),
                self._store(f"{name}_scale", grid.scale),
                self._store(f"{name}_zero_point", grid.zero_point),
            ]
            dequantize = ir.node(DEQUANTIZE, inputs, name=f"{name}_{DEQUANTIZE}")
            dequantize.outputs[0].name = f"{name}_dequantized"
            self.graph.append(dequantize)
            node.replace_input_with(index, dequantize.outputs[0])

    def _store(self, name: str, values: NDArray[Any]) -> ir.Value:
        return store(self.graph, name, values)


def _clipped(value: ir.Value, ends: ValueRange) -> ValueRange:
    """Return a range without what the Relu or Clip that computes the tensor cuts off."""
    node = value.producer()
    bounds = clip_bounds(node) if node is not None and node.op_type in CLIP_OPS else None
    return ends if bounds is None else (max(ends[0], bounds[0]), min(ends[1], bounds[1]))
