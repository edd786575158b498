"""Write operators of a float ONNX network as others that ONNX Runtime computes in integers; the values stay the same.

HardSwish and HardSigmoid become Add, Clip and Mul (Howard et al. 2019, arXiv:1905.02244, section 5.2); division by and
subtraction of constants become Mul and Add; the mean over height and width becomes a GlobalAveragePool; the factors of
a Gemm move into its weight and its bias, and the bias gets one value per output; ``products`` is about the rest.
"""

from collections.abc import Callable, Container

import numpy as np
import onnx_ir as ir
from onnx_ir.convenience import replace_nodes_and_values

from micronet.onnx.constants import free_name, store_floats, value_names
from micronet.onnx.graph_view import array
from micronet.onnx.products import rewrite_einsum, rewrite_gemm, rewrite_matmul

IMAGE_AXES = ([2, 3], [-2, -1])


def simplify(graph: ir.Graph, operators: Container[str] | None = None) -> None:
    """Rewrite what can be rewritten, in place; ``operators``: only these."""
    taken = value_names(graph)
    for node in list(graph):
        rewrite = _REWRITES.get(node.op_type)
        if rewrite is None or (operators is not None and node.op_type not in operators):
            continue
        if node.domain not in ("", "ai.onnx") or node.outputs[0].dtype != ir.DataType.FLOAT:
            continue
        made = rewrite(graph, node)
        if made is None:
            continue
        for number, each in enumerate(made):
            each.name = f"{node.name}_{each.op_type}_{number}"
            each.outputs[0].name = free_name(f"{node.outputs[0].name}_{number}", taken)
            taken.add(each.outputs[0].name)
            each.outputs[0].dtype = ir.DataType.FLOAT
            each.outputs[0].shape = each.outputs[0].shape or node.outputs[0].shape
        replace_nodes_and_values(graph, node, [node], made, node.outputs, made[-1].outputs)


def _hard_swish(graph: ir.Graph, node: ir.Node) -> list[ir.Node]:
    x = node.inputs[0]
    shifted = ir.node("Add", [x, store_floats(graph, node, "three", 3.0)])
    clipped = ir.node(
        "Clip", [shifted.outputs[0], store_floats(graph, node, "zero", 0.0), store_floats(graph, node, "six", 6.0)]
    )
    gate = ir.node("Mul", [clipped.outputs[0], store_floats(graph, node, "sixth", 1 / 6)])
    return [shifted, clipped, gate, ir.node("Mul", [x, gate.outputs[0]])]


def _hard_sigmoid(graph: ir.Graph, node: ir.Node) -> list[ir.Node] | None:
    slope, offset = node.attributes.get_float("alpha", 0.2), node.attributes.get_float("beta", 0.5)
    if slope <= 0 or node.inputs[0] is None:
        return None
    shifted = ir.node("Add", [node.inputs[0], store_floats(graph, node, "offset", offset / slope)])
    bounds = [store_floats(graph, node, "zero", 0.0), store_floats(graph, node, "one", 1 / slope)]
    clipped = ir.node("Clip", [shifted.outputs[0], *bounds])
    return [shifted, clipped, ir.node("Mul", [clipped.outputs[0], store_floats(graph, node, "slope", slope)])]


def _division(graph: ir.Graph, node: ir.Node) -> list[ir.Node] | None:
    divisor = array(node, 1)
    is_erf = any(reader.op_type == "Erf" for reader in node.outputs[0].consumers())  # ONNX Runtime fuses GELU itself
    if divisor is None or is_erf or not np.isfinite(1 / divisor.astype(np.float64)).all():
        return None
    factor = store_floats(graph, node, "factor", (1 / divisor.astype(np.float64)).astype(np.float32))
    return [ir.node("Mul", [node.inputs[0], factor])]


def _difference(graph: ir.Graph, node: ir.Node) -> list[ir.Node] | None:
    subtrahend = array(node, 1)
    if subtrahend is None:
        return None
    return [ir.node("Add", [node.inputs[0], store_floats(graph, node, "negative", -subtrahend)])]


def _mean(graph: ir.Graph, node: ir.Node) -> list[ir.Node] | None:
    source, given = node.inputs[0], array(node, 1) if len(node.inputs) > 1 else None
    axes = given.tolist() if given is not None else list(node.attributes.get_ints("axes", ()))
    if source is None or source.shape is None or len(source.shape) != 4 or sorted(axes) not in IMAGE_AXES:
        return None
    pool = ir.node("GlobalAveragePool", [source])
    if node.attributes.get_int("keepdims", 1):
        return [pool]
    pool.outputs[0].shape = ir.Shape([*source.shape[:2], 1, 1])
    squeezed = ir.Value(name=free_name(f"{node.name}_axes", value_names(graph)))
    squeezed.const_value = ir.tensor(np.array([2, 3]), name=squeezed.name)
    graph.register_initializer(squeezed)
    return [pool, ir.node("Squeeze", [pool.outputs[0], squeezed])]


def _gemm(graph: ir.Graph, node: ir.Node) -> None:
    """Rewrite a Gemm in place, so that it keeps its name."""
    rewrite_gemm(graph, node)
    given = node.inputs[2] if len(node.inputs) > 2 else None
    weight, bias = array(node, 1), array(node, 2) if given is not None else None
    if weight is None or (given is not None and bias is None):
        return
    outputs = weight.shape[0 if node.attributes.get_int("transB", 0) else 1]
    if (alpha := node.attributes.get_float("alpha", 1.0)) != 1:
        node.replace_input_with(1, store_floats(graph, node, "weight", alpha * weight))
        node.attributes.pop("alpha")
    if bias is not None and (bias.size == 1 or (bias.size == outputs == bias.shape[-1])):
        beta = node.attributes.pop("beta", None)
        if beta is not None or bias.shape != (outputs,):
            factor = 1.0 if beta is None else beta.as_float()
            node.replace_input_with(
                2, store_floats(graph, node, "bias", np.broadcast_to(factor * bias.ravel(), outputs))
            )


_REWRITES: dict[str, Callable[[ir.Graph, ir.Node], list[ir.Node] | None]] = {
    "HardSwish": _hard_swish, "HardSigmoid": _hard_sigmoid, "Div": _division, "Sub": _difference, "ReduceMean": _mean,
    "Gemm": _gemm, "MatMul": rewrite_matmul, "Einsum": rewrite_einsum,
}  # fmt: skip
