"""Which layers of a quantized ONNX file ONNX Runtime computes in integers, why others are not, and how fast it is."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, Literal

import onnx
from onnx.reference import ReferenceEvaluator
from onnxruntime import GraphOptimizationLevel

from micronet.core.timing import is_slower
from micronet.errors import MicronetError, by_reason, count, first_line, listed
from micronet.evaluation.latency import latencies
from micronet.onnx import graph_view as view
from micronet.onnx.channel_padding import WIDTH, count_padded, restore_channels
from micronet.onnx.float_nodes import has_layers
from micronet.onnx.gates import restore_gates
from micronet.onnx.graph_view import GraphView, WeightedNode
from micronet.onnx.ops import CONTROL, CONVOLUTIONS, DEQUANTIZE, INTEGER_LAYERS, QUANTIZE, RECURRENT, SMOOTH
from micronet.onnx.stored import unpack_weights
from micronet.runtimes.config import RuntimeOptions
from micronet.runtimes.onnxruntime import optimize, session_predictor

_ADDED = re.compile(r"_token_\d+$")  # what ONNX Runtime adds to the name of a node that it replaces
_LISTED = 3
NARROW, THREE_AXES = 16, 3  # channels that a convolution adds up for one output; axes of its kernel
FLOAT_WEIGHTS, NO_TRANSPOSED = "its weights are float", "ONNX Runtime has no int8 ConvTranspose"
FLOAT_TRANSPOSED = "micronet exports ConvTranspose in float"  # for that reason, whatever runs the file
# Measured: with integers in q k^T alone, attention takes 1.3 to 1.5 times as long.
PRODUCTS = "integers are faster there only if softmax has 8 bits too, which would lose small probabilities"


def count_integer_layers(proto: onnx.ModelProto) -> dict[str, Any] | None:
    """Return what ONNX Runtime computes in integers, on this machine's CPU.

    Returns:
        ``convolutions`` and ``linear``: how many layers with stored weights there are, and how many of them become
        integer operators (``all``, ``integer``); ``float``: each other layer -> why; ``products``: how many products
        of two activations stay float; ``attends``: whether there is a softmax; ``others``: recurrent layers, and nodes
        with layers in graphs of their own -> how many; ``narrow``: convolutions in integers that are slower than in
        float; ``activations``: the operators of smooth activations between layers that stay float; ``padded``: how many
        depthwise convolutions have channels of zeros. None for a float file, and if ONNX Runtime refuses the model.
    """
    graph = GraphView(unpack_weights(proto))
    if not graph.qdq:
        return None
    try:
        optimized = optimize(proto.SerializeToString(), GraphOptimizationLevel.ORT_ENABLE_ALL)
    except MicronetError:
        return None
    done = {_ADDED.sub("", node.name) for node in optimized.graph.node if node.op_type in INTEGER_LAYERS}
    smooth = _smooth_before_layers(optimized.graph)
    weighted = {layer.node for layer in graph.layers}
    products = [node for node in graph.nodes if node.op_type == "MatMul" and node not in weighted]
    others = [node.op_type for node in graph.nodes if node.op_type in RECURRENT and node.name not in done]
    others += [node.op_type for node in graph.nodes if node.op_type in CONTROL and has_layers(node)]
    found = {
        "products": sum(node.name not in done for node in products),
        "attends": any(node.op_type == "Softmax" for node in graph.nodes),
        "others": dict(Counter(others)),
        "narrow": [view.layer_name(each.node) for each in graph.layers if each.node.name in done and _is_narrow(each)],
    }
    counts = count_layers(
        (kind_of(layer.node), view.layer_name(layer.node), None if layer.node.name in done else _reason(layer))
        for layer in graph.layers
    )
    return {**counts, **found, "activations": smooth, "padded": count_padded(proto)}


def kind_of(node: Any) -> Literal["convolutions", "linear"]:
    """Return ``convolutions`` or ``linear``, the key under which ``count_layers`` counts a layer."""
    return "convolutions" if node.op_type in CONVOLUTIONS else "linear"


def count_layers(layers: Iterable[tuple[str, str, str | None]]) -> dict[str, Any]:
    """Return ``convolutions``, ``linear`` and ``float`` as ``count_integer_layers`` does.

    ``layers``: the kind and the name of each layer with stored weights, and why a runtime computes it in float, or None
    if it does not.
    """
    counts = {"convolutions": {"integer": 0, "all": 0}, "linear": {"integer": 0, "all": 0}}
    left = {}
    for kind, name, why in layers:
        counts[kind]["all"] += 1
        counts[kind]["integer"] += why is None
        if why is not None:
            left[name] = why
    return {**counts, "float": left}


def _smooth_before_layers(graph: onnx.GraphProto) -> list[str]:
    """Return the smooth activations from which a layer in integers is computed: others cost it no rounding."""
    read, found = set[str](), set[str]()
    for node in reversed(graph.node):
        leads = not read.isdisjoint(node.output)
        if leads or node.op_type in INTEGER_LAYERS:
            read.update(node.input)
        if leads and node.op_type in SMOOTH:
            found.add(node.op_type)
    return sorted(found)


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


def _reason(layer: WeightedNode) -> str:
    """Return why ONNX Runtime computes a layer in float."""
    transposed = layer.node.op_type == "ConvTranspose"
    if layer.weight_qdq is None:
        return NO_TRANSPOSED if transposed else FLOAT_WEIGHTS
    if transposed:
        return f"{NO_TRANSPOSED}, and its weights are integers; export the file again, which stores them in float"
    if layer.input_qdq is None:
        return "its input is float"
    readers = view.fused_consumers(layer.node)
    if layer.node.op_type == "Conv" and readers != {QUANTIZE}:
        reason = f"consumed by {' and '.join(sorted(readers))}" if readers else "a network output"
        return f"its output is not quantized ({reason})"
    return "ONNX Runtime does not fuse it"


def measure_speed(proto: onnx.ModelProto, sample: Any) -> dict[str, Any]:
    """Time a quantized file and the same network in float in turns, with one thread and one sample.

    ``sample``: an array (1, ...), or a tuple of them if the network takes several inputs.

    Returns ``int8_ms`` and ``float_ms``, or ``skipped``: why a runtime refused. If the file is larger than in float,
    which stores equal weights once, also ``int8_bytes`` and ``float_bytes``.
    """
    options = RuntimeOptions(threads=1)
    try:
        plain = without_quantizers(proto)
        sessions = [session_predictor(each.SerializeToString(), options) for each in (proto, plain)]
        ours, theirs = (found.p50_ms for found in latencies(sessions, [sample, sample], one_thread=True))
    except Exception as error:  # a courtesy: whatever a runtime raises must not spoil the export
        return {"skipped": first_line(error)}
    sizes = {"int8_bytes": proto.ByteSize(), "float_bytes": plain.ByteSize() - _repeated_bytes(plain)}
    larger = sizes["int8_bytes"] > sizes["float_bytes"]
    return {"int8_ms": round(ours, 4), "float_ms": round(theirs, 4), **(sizes if larger else {})}


def _repeated_bytes(proto: onnx.ModelProto) -> int:
    """Return the bytes of stored tensors that equal an earlier one."""
    seen, repeated = set[tuple[Any, ...]](), 0
    for tensor in proto.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        key = values.shape, hashlib.sha256(values.tobytes()).digest()
        repeated += values.nbytes if key in seen else 0
        seen.add(key)
    return repeated


def without_quantizers(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model in float: activations are not quantized, and weights are stored dequantized."""
    plain = onnx.ModelProto()
    plain.CopyFrom(unpack_weights(proto))
    restore_gates(plain)
    graph, same = plain.graph, dict[str, str]()
    stored = {tensor.name: tensor for tensor in graph.initializer}
    kept = []
    for node in list(graph.node):
        source = same.get(node.input[0], node.input[0]) if node.input else ""
        if node.op_type == DEQUANTIZE and all(name in stored for name in node.input):
            given = {name: onnx.numpy_helper.to_array(stored[name]) for name in node.input}
            computed: Any = ReferenceEvaluator(node).run(None, given)
            graph.initializer.append(onnx.numpy_helper.from_array(computed[0], node.output[0]))
            continue
        if node.op_type == QUANTIZE or (node.op_type == DEQUANTIZE and node.input[0] in same):
            same[node.output[0]] = source
            continue
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.input[:] = [same.get(name, name) for name in node.input]
        kept.append(copy)
    for entry in graph.output:
        if entry.name in same:
            kept.append(onnx.helper.make_node("Identity", [same[entry.name]], [entry.name]))
    del graph.node[:]
    graph.node.extend(kept)
    restore_channels(plain)
    return plain


def describe(found: dict[str, Any], runtime: str = "ONNX Runtime") -> list[str]:
    """Return lines that say what runs in integers and how fast; if it is slower than float, that is the first line."""
    parts = [
        f"{found[kind]['integer']} of {count(found[kind]['all'], noun)}"
        for kind, noun in (("convolutions", "convolution"), ("linear", "linear layer"))
        if found[kind]["all"]
    ]
    lines = [f"{' and '.join(parts)} run in integer arithmetic"]
    if "int8_ms" in found:
        lines[0] += f"; {found['int8_ms']:.2f} ms vs. {found['float_ms']:.2f} ms in float"
        lines[0] += f" ({runtime}, 1 thread, batch 1)"
    for reason, layers in by_reason(found["float"]).items():
        lines.append(f"float: {listed(layers, _LISTED)}: {reason}")
    if products := found.get("products"):
        why = f", as in attention: {PRODUCTS}" if found.get("attends") else ": only products with weights are quantized"
        lines.append(f"float: {count(products, 'product')} of two activations{why}")
    for kind, number in found.get("others", {}).items():
        what = "layer: it has no int8 form" if kind in RECURRENT else "node with layers inside"
        lines.append(f"float: {number} {kind} {what}")
    if padded := found.get("padded"):
        lines.append(
            f"{count(padded, 'depthwise convolution')} padded with zeros to a multiple of {WIDTH} channels, which ONNX "
            f"Runtime computes at a time; for a smaller file, prune with --regular {WIDTH}"
        )
    if "int8_bytes" in found:
        lines.insert(
            0,
            f"larger than in float: {found['int8_bytes']:,} bytes vs. {found['float_bytes']:,}; each call of a "
            "layer has scales and biases of its own, and each quantizer takes some bytes",
        )
    if is_slower(found.get("int8_ms", 0), found.get("float_ms", 0)):
        lines.insert(
            0, f"slower than float: {found['int8_ms']:.2f} ms vs. {found['float_ms']:.2f} ms; {slow_cause(found)}"
        )
    return lines


def slow_cause(found: dict[str, Any]) -> str:
    """Return why a quantized file is slower than in float, and what helps; ``found``: what was counted."""
    if any(why not in (FLOAT_WEIGHTS, NO_TRANSPOSED, FLOAT_TRANSPOSED) for why in found["float"].values()):
        return (
            "the layers below are computed in float on dequantized weights; exclude them with micronet quantize "
            "--exclude"
        )
    if narrow := found.get("narrow"):
        return (
            f"ONNX Runtime computes convolutions of few channels, or few in a group, more slowly in integers "
            f"({listed(narrow, _LISTED)}); exclude them with micronet quantize --exclude"
        )
    what = f"{' and '.join(found['activations'])} between them" if found.get("activations") else "quantizing"
    cure = "use ReLU instead, or " if found.get("activations") else ""
    cost = f"the cost of {what} outweighs the savings"
    ways = f"{cure}export the float network, or find the layers that are faster in float with micronet compress"
    return f"these layers run in integer arithmetic, but {cost}; {ways}"
