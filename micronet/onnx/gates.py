"""Integers through x * sigmoid(x) and hardswish, x * hardsigmoid(x).

ONNX Runtime looks a sigmoid up in a table and multiplies integers. A hard sigmoid is a sum that saturates at both ends:
clip(x + 3, 0, 6) / 6. Both take a fraction of the time of the float operators between two quantized layers otherwise.
"""

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from micronet.onnx.graph_view import store
from micronet.onnx.moves import ADDED, add_pair, grid_of
from micronet.onnx.ops import DEQUANTIZE, QUANTIZE

Gate = Callable[[NDArray[np.float64]], NDArray[np.float64]]
GATE_STEP = 1 / 255  # so that a gate of 1 is exact
HARD_SHIFT, HARD_WIDTH = 3, 6  # hardsigmoid(x) = clip(x + 3, 0, 6) / 6
LARGEST_SHIFT = 0.9  # steps of the output; with less than 1, no result moves by more than one step


def quantize_gates(model: ir.Model) -> None:
    """Quantize the gates between two quantized tensors, in place, where no result moves by more than one step."""
    for node in list(model.graph):
        if node.op_type == "Sigmoid":
            _quantize_sigmoid(model.graph, node)
        elif node.op_type == "HardSwish" and _is_close(node.inputs[0], node.outputs[0], _hard_sigmoid):
            _replace_hard_swish(model.graph, node)


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.exp(-np.logaddexp(0, -x))  # exp(-x) alone overflows


def _hard_sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.clip(x + HARD_SHIFT, 0, HARD_WIDTH) / HARD_WIDTH


def _quantize_sigmoid(graph: ir.Graph, gate: ir.Node) -> None:
    """Add a Q/DQ pair behind a sigmoid if all it does is to multiply its own input."""
    out = gate.outputs[0]
    product = out.consumers()[0] if len(out.uses()) == 1 and not out.is_graph_output() else None
    if product is None or product.op_type != "Mul" or set(product.inputs) != {gate.inputs[0], out}:
        return
    if _is_close(gate.inputs[0], product.outputs[0], _sigmoid):
        add_pair(graph, gate, out, _grid(graph, gate, "gate", GATE_STEP))


def _replace_hard_swish(graph: ir.Graph, node: ir.Node) -> None:
    """Write hardswish as a saturating sum of integers, which is then read as six times as fine, and a product."""
    x, out = node.inputs[0], node.outputs[0]
    # Of the input's rank: where all axes behind the channels are 1, ONNX Runtime adds a scalar to one value at a time.
    rank = 0 if x is None or x.shape is None else len(x.shape)
    shift = store(graph, f"{node.name}.shift", np.full([1] * rank, 255, np.uint8))
    three = ir.node(DEQUANTIZE, [shift, *_grid(graph, node, "shift", HARD_SHIFT / 255)], name=f"{node.name}.shift")
    total = ir.node("Add", [x, *three.outputs], name=f"{node.name}.Add")
    quantize = ir.node(QUANTIZE, [*total.outputs, *_grid(graph, node, "sum", HARD_WIDTH / 255)])
    gate = ir.node(DEQUANTIZE, [*quantize.outputs, *_grid(graph, node, "gate", GATE_STEP)])
    product = ir.node("Mul", [x, *gate.outputs], name=f"{node.name}.Mul")
    quantize.name, gate.name = f"{node.name}.added", f"{node.name}.added.{DEQUANTIZE}"
    for each in (three, total, quantize, gate):
        each.outputs[0].name = f"{each.name}.output"
    for each in (three, total, quantize, gate, product):
        each.metadata_props[ADDED] = node.op_type
    for each in (total, quantize, gate, product):
        each.outputs[0].shape = out.shape
        each.outputs[0].dtype = ir.DataType.UINT8 if each is quantize else ir.DataType.FLOAT
    name = out.name
    out.replace_all_uses_with(product.outputs[0])
    graph.insert_before(node, [three, total, quantize, gate, product])
    graph.remove(node, safe=True)
    product.outputs[0].name = name


def restore_gates(proto: onnx.ModelProto) -> None:
    """Write hardswish as one operator again, in place, where ``quantize_gates`` replaced it."""
    for node in list(proto.graph.node):
        replaced = next((entry.value for entry in node.metadata_props if entry.key == ADDED), "")
        if replaced and node.op_type == "Mul":  # the last of these nodes, which reads the operator's input first
            node.op_type, node.name = replaced, node.name.removesuffix(".Mul")
            del node.input[1:]
        elif replaced:
            proto.graph.node.remove(node)


def _is_close(x: ir.Value | None, out: ir.Value, function: Gate) -> bool:
    """Return True if rounding the gate moves no output by ``LARGEST_SHIFT``, tried with all 256 inputs.

    ``x`` must be quantized, and ``out`` read by a quantizer alone, both with 8 bits.
    """
    before, after = None if x is None else x.producer(), out.consumers()
    if before is None or before.op_type != DEQUANTIZE or out.is_graph_output():
        return False
    if len(after) != 1 or after[0].op_type != QUANTIZE:
        return False
    grid, step = grid_of(before), grid_of(after[0])
    if grid is None or step is None or not grid[2] == step[2] == np.uint8:
        return False
    values: NDArray[np.float64] = (np.arange(256.0) - grid[1]) * grid[0]
    gate = function(values)
    ends = -step[1], 255 - step[1]
    exact, rounded = ((values * each / step[0]).clip(*ends) for each in (gate, np.rint(gate / GATE_STEP) * GATE_STEP))
    return bool(np.abs(exact - rounded).max() < LARGEST_SHIFT)


def _grid(graph: ir.Graph, node: ir.Node, name: str, step: float) -> list[ir.Value]:
    """Store the scale and the zero point of a grid of unsigned integers that begins at 0."""
    scale = store(graph, f"{node.name}.{name}.scale", np.float32(step))
    return [scale, store(graph, f"{node.name}.{name}.zero_point", np.uint8(0))]
