"""Which layers of an ONNX file ONNX Runtime computes in integers, and why others are not: every command counts here."""

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from onnxruntime import GraphOptimizationLevel

from micronet.errors import MicronetError
from micronet.onnx import graph_view as view
from micronet.onnx.channel_padding import count_padded
from micronet.onnx.graph_view import GraphView, WeightedNode
from micronet.onnx.metadata import left_float, metadata, reason_in
from micronet.onnx.ops import (
    CLIP_OPS,
    INTEGER_LAYERS,
    QUANTIZE,
)
from micronet.onnx.optimized import costly_activations, count_operators
from micronet.onnx.other_layers import computing_convolutions, kind_of, may_be, other_layers
from micronet.onnx.stored import MAX_WEIGHT_BYTES, byte_count, stored_tensors, unpack_weights
from micronet.quantization.config import (
    FIXED_WEIGHT,
    FUNCTION_CALL,
    NO_DEFORMABLE,
    PRODUCT_OF_TWO,
    RUN_TIME_WEIGHTS,
    STORED_FACTOR,
)
from micronet.runtimes.onnxruntime import check_size, optimize

_ADDED = re.compile(r"_token_\d+$")  # what ONNX Runtime adds to the name of a node that it replaces
NARROW, THREE_AXES = 16, 3  # channels that a convolution adds up for one output; axes of its kernel
FLOAT_WEIGHTS, NO_TRANSPOSED = "its weights are float", "ONNX Runtime has no int8 ConvTranspose"
FLOAT_TRANSPOSED = "micronet exports ConvTranspose in float"  # for that reason, whatever runs the file
# Recorded by names of torch.fx; the file has nodes for them.
CALLS = (FUNCTION_CALL, FIXED_WEIGHT, PRODUCT_OF_TWO, STORED_FACTOR, RUN_TIME_WEIGHTS, NO_DEFORMABLE)
_COMPUTED = "its weight is computed"  # recorded by the name of a call or a module; the file may have a node for it


def count_integer_layers(proto: onnx.ModelProto) -> dict[str, Any] | None:
    """Return what ``count_computed`` does; None for a float file, and if ONNX Runtime refuses the model."""
    try:
        found = count_computed(proto)
    except MicronetError:
        return None
    return found if found["quantized"] else None


def count_computed(proto: onnx.ModelProto, file: Path | None = None) -> dict[str, Any]:
    """Return what ONNX Runtime computes in integers, on this machine's CPU.

    Args:
        proto: A model, float or quantized.
        file: What it was read from, if its weights may exceed one protobuf message.

    Returns:
        ``quantized``: whether it holds integers at all; ``convolutions``, ``linear`` and ``recurrent``: how many layers
        with stored weights there are, and how many of them become integer operators (``all``, ``integer``), with those
        in the bodies of branches and loops; ``float``: each other layer -> why, by the reason that micronet wrote into
        the file, if any; ``dequantized``: those of them whose weights are integers; ``products``: how many products of
        two activations stay float; ``attends``: whether there is a softmax; ``narrow``: convolutions in integers that
        are slower than in float; ``activations``: the smooth activations in float between layers, if there are many;
        ``padded``: how many depthwise convolutions have channels of zeros; ``from_artifact``: whether the file was
        exported by micronet, whose networks can be pruned; ``operators`` and ``integer_operators``: of those that
        compute anything.

    Raises:
        MicronetError: ONNX Runtime refuses the model, or it is too large to be passed on without its file.
    """
    size = sum(byte_count(tensor) for _, tensor in stored_tensors(proto.graph, *proto.functions))
    named = proto if size >= MAX_WEIGHT_BYTES else _with_names(proto)
    graph = GraphView(unpack_weights(named))
    if file is None or named is not proto:
        check_size(size)
    source = file if file is not None and named is proto else named.SerializeToString()
    optimized = optimize(source, GraphOptimizationLevel.ORT_ENABLE_ALL)
    integers = [node for node in optimized.graph.node if node.op_type in INTEGER_LAYERS]
    done = {_ADDED.sub("", node.name) for node in integers if node.name} | _name_by_weight(graph, integers)
    return {
        **_count_by_reason(graph, done, left_float(proto)),
        "quantized": bool(graph.qdq) or any(node.op_type in INTEGER_LAYERS for node in graph.nodes),
        "attends": any(node.op_type == "Softmax" for node in graph.nodes),
        "narrow": [view.layer_name(each.node) for each in graph.layers if each.node.name in done and _is_narrow(each)],
        "activations": costly_activations(optimized.graph),
        "padded": count_padded(proto),
        "from_artifact": bool(metadata(proto).get("history")),
        **count_operators(optimized.graph),
    }


def _count_by_reason(graph: GraphView, done: set[str], recorded: Mapping[str, str] | None) -> dict[str, Any]:
    """Return what ``count_computed`` does of layers and products.

    Args:
        graph: The model.
        done: The names of the nodes that ONNX Runtime computes in integers.
        recorded: The layers that micronet left in float and why; None if it did not write that.
    """
    reasons = recorded or {}
    products = [node for node in graph.nodes if _is_product(node) and node.name not in done]
    all_recorded = graph.qdq and recorded is not None
    nodes = {str(node.name) for node in graph.nodes}
    # Recorded by names that no node has: modules that are not called, and layers whose weight the forward computes.
    unnamed = {name: why for name, why in reasons.items() if why not in CALLS and not _names_node(name, nodes)}
    computed = {name: why for name, why in unnamed.items() if why.startswith(_COMPUTED)}
    factors = {each.node for each in graph.layers if all_recorded and _is_factor(each, reasons, computed)}
    with_weights = {each.node for each in graph.layers}
    constants = view.computed_constants(graph.nodes)
    factors |= {
        node
        for node in products
        if any(view.stored(node, at) or node.inputs[at] in constants for at in _factor_places(node, with_weights))
    }
    layers = [each for each in graph.layers if each.node not in factors]
    whys = (_why_float(each, done, reasons, computed) for each in layers)
    found = [(kind_of(each.node), view.layer_name(each.node), why) for each, why in zip(layers, whys, strict=True)]
    counts = count_layers([*found, *other_layers(graph, done, reasons, computed)])
    for node in graph.nodes:
        if node in factors and node.name not in done:
            name = view.layer_name(node)  # of a module, which may have a layer that stays float, too
            counts["float"][view.title(node) if name in counts["float"] else name] = STORED_FACTOR
    floats = [each.node for each in graph.layers if each.weight_qdq is None]
    floats += [node for node in computing_convolutions(graph) if node.inputs[1] in constants]
    counted = [node for node in floats if reason_in(reasons, str(node.name)) is None]
    twice = {name for name in computed for node in counted if may_be(node, name)}
    counts["float"] |= {name: why for name, why in unnamed.items() if name not in twice}
    stored = factors | {layer.node for layer in layers}
    dequantized = [each.node for each in layers if each.weight_qdq and each.node.name not in done]
    return {
        **counts,
        "dequantized": [view.layer_name(node) for node in dequantized],
        "products": sum(node not in stored for node in products),
    }


def _is_product(node: ir.Node) -> bool:
    """Return True for a matrix product, and an einsum that adds up products of several tensors."""
    if node.op_type != "Einsum" or len(node.inputs) < 2:
        return bool(node.op_type == "MatMul")
    terms, _, result = node.attributes["equation"].as_string().replace(" ", "").partition("->")
    return not result or any(letter.isalpha() and letter not in result for letter in terms)


def _factor_places(node: ir.Node, layers: Collection[ir.Node]) -> Iterable[int]:
    """Return which inputs of a product may be stored without making one of the ``layers`` of it."""
    return [0] if node in layers else range(len(node.inputs))


def _with_names(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model all of whose nodes have names, by which they are found again in the optimized one."""
    if all(node.name for node in proto.graph.node):
        return proto
    named = onnx.ModelProto()
    named.CopyFrom(proto)
    for node in named.graph.node:
        node.name = node.name or f"{node.op_type} producing {next(iter(node.output), '')}"
    return named


def _name_by_weight(graph: GraphView, integers: Iterable[onnx.NodeProto]) -> set[str]:
    """Name the nodes without a name; return which of them have weights that some operators in integers read.

    These are in models too large to be passed on with names.
    """
    read = {name for node in integers for name in node.input}
    layers = [layer for layer in graph.layers if not layer.node.name]
    for node in graph.nodes:
        node.name = view.title(node)
    return {str(layer.node.name) for layer in layers if layer.weight.name in read}


def count_layers(layers: Iterable[tuple[str, str, str | None]]) -> dict[str, Any]:
    """Return ``convolutions``, ``linear``, ``recurrent`` and ``float`` as ``count_computed`` does.

    ``layers``: the kind and the name of each layer with stored weights, and why a runtime computes it in float, or None
    if it does not.
    """
    counts = {kind: {"integer": 0, "all": 0} for kind in ("convolutions", "linear", "recurrent")}
    left = {}
    for kind, name, why in layers:
        counts[kind]["all"] += 1
        counts[kind]["integer"] += why is None
        if why is not None:
            left[name] = why
    return {**counts, "float": left}


def _is_factor(layer: WeightedNode, recorded: Mapping[str, str], computed: Mapping[str, str]) -> bool:
    """Return True for a product with a stored tensor, in a file of which micronet recorded all layers in float."""
    if layer.node.op_type != "MatMul" or layer.weight_qdq is not None:
        return False
    if reason_in(recorded, str(layer.node.name)) is not None:
        return False
    return STORED_FACTOR in recorded.values() or not any(may_be(layer.node, name) for name in computed)


def _names_node(name: str, nodes: set[str]) -> bool:
    return name in nodes or any(node.startswith(f"{name}.") for node in nodes)


def _is_narrow(layer: WeightedNode) -> bool:
    """Return True for a convolution that adds up few channels: a grouped one, or a 3-D one.

    Measured in ONNX Runtime with AVX2 and VNNI: integers take 1.2 to 10 times as long as floats with 16 to 1 channels
    per group, and 3 times as long in a 3-D convolution of 3 channels; depthwise ones have a kernel of their own.
    """
    node, (outputs, channels, *kernel) = layer.node, layer.weight.shape.numpy()
    groups = node.attributes.get_int("group", 1)
    if node.op_type != "Conv" or channels >= NARROW:
        return False
    return len(kernel) == THREE_AXES if groups == 1 else (channels, groups) != (1, outputs)


def _why_float(
    layer: WeightedNode, done: set[str], recorded: Mapping[str, str], computed: Mapping[str, str]
) -> str | None:
    """Return why ONNX Runtime computes a layer in float, or None if it does not.

    ``recorded``: the layers that micronet left in float and why; ``computed``: those without a node of that name, whose
    weight the forward computes.
    """
    if layer.node.name in done:
        return None
    transposed = layer.node.op_type == "ConvTranspose"
    if layer.weight_qdq is None:
        calls = (why for why in (FUNCTION_CALL, FIXED_WEIGHT) if why in recorded.values())
        own = NO_TRANSPOSED if transposed else next(calls, FLOAT_WEIGHTS)
        own = next((why for name, why in computed.items() if not transposed and may_be(layer.node, name)), own)
        return reason_in(recorded, str(layer.node.name)) or own
    if transposed:
        return f"{NO_TRANSPOSED}, and its weights are integers; export the file again, which stores them in float"
    if layer.input_qdq is None:
        return "its input is float"
    readers = view.fused_consumers(layer.node)
    if layer.node.op_type == "Conv" and readers != {QUANTIZE}:
        reason = f"consumed by {' and '.join(sorted(readers))}" if readers else "a network output"
        return f"its output is not quantized ({reason})"
    for clip in (reader for reader in layer.node.outputs[0].consumers() if reader.op_type in CLIP_OPS):
        quantizers = [view.qdq_node(each) for each in clip.outputs[0].consumers() if each.op_type == QUANTIZE]
        if any(not view.is_absorbed(clip, each) for each in quantizers):
            cause = (
                f"{clip.op_type} clips values that the integers behind it can hold, so ONNX Runtime does not fuse it"
            )
            return f"{cause}; quantize without --a-sign signed"
    return "ONNX Runtime does not fuse it"
