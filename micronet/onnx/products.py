"""Write products with stored weights as MatMul(x, W) and Gemm(x, W), the only ones that run in integers.

W x = (x^T W^T)^T, also for batches of matrices, and alike for Gemm; an Einsum that adds up the last axis of x is a
MatMul. Of transposes that follow each other, perhaps with functions of single values between them, both are dropped.
"""

from collections.abc import Iterable
from typing import TypeVar

import onnx_ir as ir

from micronet.onnx.constants import free_name, store_floats, value_names
from micronet.onnx.float_nodes import FEWEST_INPUTS, rank
from micronet.onnx.graph_view import array
from micronet.onnx.ops import FUSED_BY_GEMM

MATRIX = 2  # axes
T = TypeVar("T")


def rewrite_einsum(graph: ir.Graph, node: ir.Node) -> None:
    """Write "…d,dk->…k" as a MatMul, in place; either factor may be the weight, and its axes in any order."""
    terms, _, result = node.attributes["equation"].as_string().replace(" ", "").partition("->")
    factors, stored = terms.split(","), [array(node, index) for index in range(len(node.inputs))]
    weights = [index for index, values in enumerate(stored) if values is not None]
    if len(factors) != 2 or len(weights) != 1 or not result:
        return
    place = weights[0]
    axes, data, values = factors[place], factors[1 - place], stored[place]
    summed, made = data[-1:], result[-1:]
    letters = data.replace("...", "")
    if values is None or sorted(axes) != sorted(summed + made) or f"{data[:-1]}{made}" != result:
        return
    if made in letters or not summed.isalpha() or len(set(letters)) < len(letters):
        return
    node.attributes.pop("equation")
    node.op_type = "MatMul"
    source = node.inputs[1 - place]
    node.replace_input_with(0, source)
    node.replace_input_with(1, store_floats(graph, node, "weight", values if axes[0] == summed else values.T))


def rewrite_matmul(graph: ir.Graph, node: ir.Node) -> None:
    """Write the product of a weight with a vector, a matrix or a batch of matrices, in place."""
    weight, data = array(node, 0), node.inputs[1]
    if weight is None or weight.ndim != MATRIX or data is None or data.const_value is not None or rank(data) == 0:
        return
    if rank(data) >= MATRIX:
        if weight.shape[1] < FEWEST_INPUTS and not _is_transposed(data):
            return  # it would stay in float all the same
        data = _transposed(graph, node, data)
        _transpose_output(graph, node)
    node.replace_input_with(0, data)
    node.replace_input_with(1, store_floats(graph, node, "weight", weight.T))


def rewrite_gemm(graph: ir.Graph, node: ir.Node) -> None:
    """Write a Gemm whose input is transposed or whose weight comes first, in place."""
    if array(node, 1) is not None:
        if node.attributes.get_int("transA", 0) and node.inputs[0] is not None and array(node, 0) is None:
            node.replace_input_with(0, _transposed(graph, node, node.inputs[0]))
            node.attributes.pop("transA")
        return
    weight, data, bias = array(node, 0), node.inputs[1], array(node, 2) if len(node.inputs) > 2 else None
    if weight is None or data is None or (bias is None and any(node.inputs[2:])):
        return
    is_stored_turned, is_read_turned = (node.attributes.get_int(name, 0) for name in ("transA", "transB"))
    inputs, outputs = weight.shape[:: 1 if is_stored_turned else -1]
    if bias is not None and bias.size > 1 and bias.shape != (outputs, 1):
        return  # it differs along the other axis
    if not is_read_turned:
        if inputs < FEWEST_INPUTS and not _is_transposed(data):
            return
        data = _transposed(graph, node, data)
    node.replace_input_with(1, node.inputs[0])
    node.replace_input_with(0, data)
    if bias is not None and bias.size > 1:
        node.replace_input_with(2, store_floats(graph, node, "bias", bias.ravel()))
    node.attributes.pop("transA", None)
    node.attributes["transB"] = ir.AttrInt64("transB", 1 - is_stored_turned)
    _transpose_output(graph, node)


def _is_transposed(value: ir.Value) -> bool:
    """Return True if no Transpose is needed to undo one, however many functions of its values are behind it."""
    node = value.producer()
    if node is None or len(value.uses()) > 1 or value.is_graph_output():
        return node is not None and _swaps(node)
    source = node.inputs[0] if node.inputs else None
    return _swaps(node) or (node.op_type in FUSED_BY_GEMM and source is not None and _is_transposed(source))


def _swaps(node: ir.Node) -> bool:
    perm = list(node.attributes.get_ints("perm", ()))
    return node.op_type == "Transpose" and len(perm) >= MATRIX and perm == _swapped(range(len(perm)))


def _transposed(graph: ir.Graph, reader: ir.Node, value: ir.Value) -> ir.Value:
    """Return matrices transposed, which a node is to read alone if functions that compute them change."""
    node = value.producer()
    if node is None or not _is_transposed(value):
        perm = _swapped(range(rank(value) or MATRIX))
        before = ir.node("Transpose", [value], {"perm": perm}, name=f"{reader.name}_Transpose")
        result = before.outputs[0]
        result.name = free_name(f"{reader.name}_transposed", value_names(graph))
        result.type, result.shape = value.type, _transposed_shape(value.shape)
        graph.insert_before(reader, before)
        return result
    source = node.inputs[0]
    if source is None or _swaps(node):
        return source or value
    node.replace_input_with(0, _transposed(graph, node, source))
    value.shape = _transposed_shape(value.shape)
    return value


def _transpose_output(graph: ir.Graph, node: ir.Node) -> None:
    """Let a Transpose compute what a node did."""
    value = node.outputs[0]
    perm = _swapped(range(rank(value) or MATRIX))
    after = ir.node("Transpose", [value], {"perm": perm}, name=f"{node.name}_Transpose_output")
    result = after.outputs[0]
    result.type, result.shape = value.type, value.shape
    value.replace_all_uses_with(result, replace_graph_outputs=True)
    after.replace_input_with(0, value)
    value.name, result.name = free_name(f"{value.name}_transposed", value_names(graph)), value.name
    value.shape = _transposed_shape(value.shape)
    graph.insert_after(node, after)


def _transposed_shape(shape: ir.Shape | None) -> ir.Shape | None:
    return None if shape is None else ir.Shape(_swapped(shape))


def _swapped(axes: Iterable[T]) -> list[T]:
    """Return axes with the last two, those of matrices, swapped."""
    *batch, rows, columns = axes
    return [*batch, columns, rows]
