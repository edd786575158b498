"""Questions about the operators of a float ONNX network: what they read, and whether they have an integer form."""

from collections.abc import Collection, Iterator

import numpy as np
import onnx_ir as ir

from micronet.onnx.graph_view import array, stored
from micronet.onnx.ops import CLIP_OPS, CONTROL, DEFORMABLE, JOINS, PRODUCTS, RECURRENT, WEIGHTED_OPS
from micronet.quantization.config import RUN_TIME_WEIGHTS

FEWEST_INPUTS = 32  # per output of a layer
PER_WEIGHT, PER_OUTPUT, PER_LAYER = 3, 13, 1280  # bytes: what integers save, and what scales and quantizers take up


def activations(node: ir.Node) -> Iterator[ir.Value]:
    """Yield the float inputs of an operator that are computed at run time."""
    for value in data_inputs(node):
        if value.const_value is None:
            yield value


def data_inputs(node: ir.Node) -> list[ir.Value]:
    """Return the inputs of an operator that hold data: not its shapes, axes, bounds or biases."""
    every = node.inputs if node.op_type in JOINS else node.inputs[:1]
    return [value for value in every if value is not None]


def settled(value: ir.Value, outputs: Collection[ir.Value]) -> ir.Value:
    """Return the tensor behind the Relus and Clips that a quantizer absorbs, or the tensor itself."""
    while value not in outputs and len(value.uses()) == 1 and is_absorbed(value.consumers()[0], outputs):
        value = value.consumers()[0].outputs[0]
    return value


def is_absorbed(node: ir.Node, outputs: Collection[ir.Value]) -> bool:
    """Return True for a Relu or Clip that alone reads its input and cuts nothing inside the range of its own output."""
    source = node.inputs[0] if node.inputs else None
    if node.op_type not in CLIP_OPS or source is None or len(source.uses()) != 1 or source in outputs:
        return False
    if source.producer() is None or source.const_value is not None:
        return False
    bounds = clip_bounds(node)
    return bounds is not None and bounds[0] <= 0 <= bounds[1]


def clip_bounds(node: ir.Node) -> tuple[float, float] | None:
    """Return the bounds of a Relu or Clip, or None if they are computed at run time."""
    if node.op_type == "Relu":
        return 0.0, np.inf
    found = []
    for index, default in ((1, -np.inf), (2, np.inf)):
        given = index < len(node.inputs) and node.inputs[index] is not None
        bound = array(node, index) if given else None
        if given and bound is None:
            return None
        found.append(default if bound is None else float(bound.reshape(-1)[0]))
    return found[0], found[1]


def output_axis(node: ir.Node) -> int:
    """Return the axis of a layer's weight that its output channels are on."""
    if node.op_type == "Gemm":
        return 0 if node.attributes.get_int("transB", 0) else 1
    return 0 if node.op_type == "Conv" else 1


def is_small(node: ir.Node) -> bool:
    """Return True if a layer adds up too few products for integers to gain anything between float operators."""
    weight = stored(node, 1)
    return weight is not None and weight.size // max(1, weight.shape.numpy()[output_axis(node)]) < FEWEST_INPUTS


def makes_smaller(node: ir.Node) -> bool:
    """Return True if a layer's weights in integers save at least twice what its quantizers take up."""
    weight = stored(node, 1)
    if weight is None:
        return False
    return PER_WEIGHT * weight.size >= 2 * (PER_OUTPUT * weight.shape.numpy()[output_axis(node)] + PER_LAYER)


def has_layers(node: ir.Node) -> bool:
    """Return True if there is a layer in the graphs that a node holds."""
    inside = (inner for graph in graphs_in(node) for inner in graph)
    return any(inner.op_type in WEIGHTED_OPS | RECURRENT | {DEFORMABLE} or has_layers(inner) for inner in inside)


def no_integer_form(kind: str) -> str:
    """Return why a layer of a kind that has no integers stays in float."""
    return f"{kind} has no int8 form"


def layers_inside(kind: str) -> str:
    """Return why a node of a kind that has layers in graphs of its own stays in float."""
    return f"layers inside {kind} nodes stay in float"


def graphs_in(node: ir.Node) -> Iterator[ir.Graph]:
    """Yield the graphs that a node holds, such as the branches of an If."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def obstacle(node: ir.Node, signed: bool) -> str | None:
    """Return why a layer cannot run in integers, or None if it can."""
    weight, weight_value = stored(node, 1), node.inputs[1]
    extra = node.inputs[2] if len(node.inputs) > 2 else None
    if node.op_type in PRODUCTS and weight is None and stored(node) is not None:
        return "its weights are the first factor, and only x W has an integer form; export the transpose of x^T W^T"
    if weight is None or weight_value is None or node.inputs[0] is None or node.inputs[0].const_value is not None:
        return RUN_TIME_WEIGHTS
    if extra is not None and extra.const_value is None:
        return "its bias is computed at run time"
    readers = weight_value.consumers()
    if any(reader.op_type in CONTROL or reader.graph is not node.graph for reader in readers):
        return "a loop or a branch also reads its weights"  # the file would hold them twice
    if not np.isfinite(weight.numpy()).all():
        return "its weights are not finite"
    if node.op_type == "ConvTranspose" and not signed:
        return "ONNX Runtime has no int8 ConvTranspose"
    if node.op_type == "ConvTranspose" and node.attributes.get_int("group", 1) > 1:
        return "TensorRT has no grouped int8 ConvTranspose"
    if node.op_type == "MatMul" and len(weight.shape) != 2:
        return "its weight is not a matrix"
    if node.op_type == "Gemm":
        factors = [node.attributes.get_float(name, 1.0) for name in ("alpha", "beta")]
        if factors != [1.0, 1.0] or node.attributes.get_int("transA", 0) != 0:
            return "its factors or its transposed input have no int8 form"
    return None


def is_float(value: ir.Value) -> bool:
    """Return True for a float32 tensor, False for other types and unknown ones."""
    return value.dtype == ir.DataType.FLOAT


def rank(value: ir.Value) -> int:
    """Return the number of a tensor's axes, 0 if it is unknown."""
    return 0 if value.shape is None else len(value.shape)


def is_nearest(node: ir.Node) -> bool:
    """Return True for a Resize that copies values instead of mixing them."""
    return node.attributes.get_string("mode", "nearest") == "nearest"


def is_smaller(value: ir.Value, output: ir.Value) -> bool:
    """Return True if a tensor is broadcast over an axis of the output."""
    if value.shape is None or output.shape is None:
        return False
    missing = len(output.shape) - len(value.shape)
    own = [1] * missing + [0 if isinstance(size, ir.SymbolicDim) else size for size in value.shape]
    return any(mine == 1 and other != 1 for mine, other in zip(own, output.shape, strict=False))
