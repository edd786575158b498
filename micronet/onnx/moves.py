"""Q/DQ pairs behind operators that only move values, without which ONNX Runtime computes the next layer in float.

It carries integers through some such operators by itself (``MOVING_OPS``); through the others only if a pair on the
same grid follows. Values on a grid stay what they are there, so no pair added here changes any value.
"""

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from micronet.onnx.graph_view import array, producer
from micronet.onnx.ops import BLOCKS, CLIP_OPS, COMPUTED_IN_INTEGERS, DEQUANTIZE, MOVING_OPS, QUANTIZE

ABSORBS_PADS = {"Conv", "MaxPool", "AveragePool"}  # ONNX Runtime merges these with a padding before them
ADDED = "micronet.added"  # metadata of nodes that the torch network does not have: the operator they replace, if any


def requantize_moves(model: ir.Model) -> None:
    """Add a Q/DQ pair, in place, behind each operator that blocks a grid on its way to an integer operator."""
    grids: dict[ir.Value, ir.Node] = {}  # a tensor -> the DequantizeLinear whose grid its values lie on
    for node in list(model.graph):
        if node.op_type == DEQUANTIZE:
            source = producer(node)
            if source is not None and source.op_type == QUANTIZE:
                grids[node.outputs[0]] = node
            continue
        found = _common_grid(node, grids)
        if found is None:
            continue
        for output in node.outputs:
            grids[output] = found
            if node.op_type in BLOCKS and _reaches_layer(output):
                grids[add_pair(model.graph, node, output, found.inputs[1:])] = found


def quantize_before_concats(model: ir.Model) -> None:
    """Put a Q/DQ pair, in place, between each layer and a concatenation that all readers round to one grid.

    Without it, ONNX Runtime computes the layer in float. No value changes: it is only rounded earlier.
    """
    for node in [node for node in model.graph if node.op_type == "Concat"]:
        grid = _read_grid(node.outputs[0])
        if grid is None:
            continue
        for value in node.inputs:
            source = None if value is None else value.producer()
            if source is not None and source.op_type in {"Conv", *CLIP_OPS} and len(source.outputs[0].uses()) == 1:
                add_pair(model.graph, source, source.outputs[0], grid.inputs[1:])


def _read_grid(value: ir.Value) -> ir.Node | None:
    """Return a QuantizeLinear on whose grid all readers of a tensor round it, directly or once it is moved on."""
    found: list[ir.Node] = []
    for reader in value.consumers():
        each = _read_grid(reader.outputs[0]) if reader.op_type in MOVING_OPS else reader
        if each is None or each.op_type != QUANTIZE or grid_of(each) is None:
            return None
        found.append(each)
    return found[0] if found and len({grid_of(each) for each in found}) == 1 else None


def _common_grid(node: ir.Node, grids: dict[ir.Value, ir.Node]) -> ir.Node | None:
    """Return the grid shared by all tensors that an operator moves; None if they differ, or if it also computes."""
    if node.op_type not in BLOCKS and node.op_type not in MOVING_OPS:
        return None
    if node.op_type == "Resize" and node.attributes.get_string("mode", "nearest") != "nearest":
        return None
    if node.op_type == "Pad" and node.attributes.get_string("mode", "constant") == "constant":
        absorbed = any(reader.op_type in ABSORBS_PADS for reader in node.outputs[0].consumers())
        if absorbed or not _pads_with_zeros(node):  # zero lies on every grid
            return None
    moved = node.inputs if node.op_type == "Concat" else node.inputs[:1]
    found = [grids.get(value) for value in moved if value is not None]
    first = found[0] if found else None
    grid = None if first is None else grid_of(first)
    return first if grid is not None and all(each and grid_of(each) == grid for each in found) else None


def _pads_with_zeros(pad: ir.Node) -> bool:
    if len(pad.inputs) < 3 or pad.inputs[2] is None:
        return True
    value = array(pad, 2)
    return value is not None and not value.any()


def grid_of(node: ir.Node) -> tuple[float, int, Any] | None:
    """Return the scale, the zero point and its type of a Q or DQ node; None if they are not stored numbers."""
    scale, zero_point = array(node, 1), array(node, 2)
    if scale is None or zero_point is None or scale.size > 1:
        return None
    return float(scale), int(zero_point), zero_point.dtype


def _reaches_layer(value: ir.Value) -> bool:
    """Return True if an integer operator could read a tensor, directly or once it is moved on."""
    waiting, seen = [value], {value}
    while waiting:
        for reader in waiting.pop().consumers():
            if reader.op_type in COMPUTED_IN_INTEGERS:
                return True
            if reader.op_type in BLOCKS or reader.op_type in MOVING_OPS:
                waiting += (output for output in reader.outputs if output not in seen)
                seen.update(reader.outputs)
    return False


def add_pair(graph: ir.Graph, node: ir.Node, output: ir.Value, grid: Sequence[ir.Value | None]) -> ir.Value:
    """Put a Q/DQ pair between an operator and those who read its output; return the pair's output.

    ``grid``: a scale and a zero point, which nodes may share until ``unshare_initializers``.
    """
    readers = [(reader, index) for reader, index in output.uses() if reader.op_type != QUANTIZE]
    name = f"{output.name}.added"
    quantize = ir.node(QUANTIZE, [output, *grid], name=name, metadata_props={ADDED: ""})
    dequantize = ir.node(
        DEQUANTIZE, [*quantize.outputs, *grid], name=f"{name}.{DEQUANTIZE}", metadata_props={ADDED: ""}
    )
    quantize.outputs[0].name, dequantize.outputs[0].name = f"{output.name}.integers", name
    quantize.outputs[0].shape = dequantize.outputs[0].shape = output.shape
    if grid[1] is not None and grid[1].dtype is not None and output.dtype is not None:
        quantize.outputs[0].dtype, dequantize.outputs[0].dtype = grid[1].dtype, output.dtype
    for reader, index in readers:
        reader.replace_input_with(index, dequantize.outputs[0])
    graph.insert_after(node, [quantize, dequantize])
    return dequantize.outputs[0]
