"""Rules that find what makes an ONNX file slow or wrong in ONNX Runtime or TensorRT, from the file alone.

The rules were verified with onnxruntime 1.32 on x86 and TensorRT-RTX 1.7; other versions may behave differently.
Subgraphs of If and Loop are not checked.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import onnx
from onnx_ir import DataType, Node, Value
from onnxruntime import GraphOptimizationLevel

from micronet.errors import MicronetError, count
from micronet.onnx import graph_view as view
from micronet.onnx.graph_view import CLIP_OPS, MOVING_OPS, QUANTIZE, GraphView, QDQNode, WeightedNode, title
from micronet.onnx.operator_count import INTEGER_CONVOLUTIONS, INTEGER_PRODUCTS
from micronet.runtimes.onnxruntime import optimize

Target = Literal["ort", "tensorrt", "both"]
Severity = Literal["error", "warning", "note"]
Matches = Iterator[tuple[Node, str]]  # a node, and what is wrong with it
Check = Callable[[GraphView], Matches]
RULES: "list[Rule]" = []  # filled by the ``rule`` decorator below
LISTED = 3  # layers named in a message about the whole file
# Cures. Every option they name exists (tests/onnx/test_lint.py).
FOR_ORT = "micronet export-onnx --target ort, which uses uint8 activations"
FOR_TENSORRT = "micronet quantize --q-type sym --a-sign signed, then micronet export-onnx --target tensorrt"
PTQ = "micronet quantize FLOAT.onnx --mode ptq"
# What is counted: a noun, the operators of the file, and the integer operators that ONNX Runtime turns them into.
KERNELS = (
    ("convolutions", {"Conv", "ConvTranspose"}, INTEGER_CONVOLUTIONS),
    ("matrix products", {"Gemm", "MatMul"}, INTEGER_PRODUCTS),
    ("additions", {"Add"}, {"QLinearAdd"}),
)


class Finding(NamedTuple):
    """A problem. An error: wrong results, or a file that does not load or build; a warning: slow or large."""

    rule: str
    severity: Severity
    node: str
    message: str
    cure: str


class Rule(NamedTuple):
    """A check with its cure. ``severity``: target -> how bad a match is there."""

    name: str
    cure: str
    severity: dict[str, Severity]
    check: Check


def lint(proto: onnx.ModelProto, target: Target) -> list[Finding]:
    """Apply the rules for a target to a model and return the findings, the worst first."""
    graph = GraphView(proto)
    found = []
    for rule in RULES:
        levels = [level for name, level in rule.severity.items() if target in (name, "both")]
        if levels:
            severity = next(level for level in get_args(Severity) if level in levels)
            found += [Finding(rule.name, severity, title(node), text, rule.cure) for node, text in rule.check(graph)]
    return sorted(found, key=lambda finding: get_args(Severity).index(finding.severity))


def count_integer_ops(proto: onnx.ModelProto, file: Path | None = None) -> dict[str, dict[str, int]] | None:
    """Count the convolutions, matrix products and additions, ``all`` and those that ONNX Runtime runs as ``integer``.

    ``file``: what the model was read from, if its weights may exceed one protobuf message. None if ONNX Runtime refuses
    the model.
    """
    try:
        optimized = optimize(file or proto.SerializeToString(), GraphOptimizationLevel.ORT_ENABLE_ALL)
    except MicronetError:
        return None
    nodes = GraphView(proto).nodes
    # Adding a constant does not join two branches.
    joining = [node for node in nodes if node.op_type != "Add" or not (view.stored(node, 0) or view.stored(node, 1))]
    before, after = (Counter(node.op_type for node in found) for found in (joining, optimized.graph.node))
    return {
        noun: {"integer": sum(after[op] for op in integer), "all": sum(before[op] for op in given | integer)}
        for noun, given, integer in KERNELS
    }


def _rule(cure: str, **severity: Severity) -> Callable[[Check], Check]:
    """Register a function as a rule under its name; ``severity``: ort=, tensorrt= or both."""

    def register(check: Check) -> Check:
        RULES.append(Rule(check.__name__.strip("_").replace("_", "-"), cure, severity, check))
        return check

    return register


@_rule(f"{PTQ}, which quantizes every input of Add and Concat", ort="warning")
def _mixed_inputs(graph: GraphView) -> Matches:
    for node in (node for node in graph.nodes if node.op_type in ("Add", "Concat")):
        inputs = [value for value in node.inputs if value is not None and value.const_value is None]
        floats = [value for value in inputs if not view.is_dequantized(value)]
        if 0 < len(floats) < len(inputs):
            yield node, f"{len(floats)} of {len(inputs)} inputs are not quantized: ONNX Runtime runs this node in float"


@_rule("micronet quantize --a-bits 8 --a-sign auto, which puts the zero point at the end of the range", ort="warning")
def _kept_activation(graph: GraphView) -> Matches:
    for quantizer in graph.activations:
        node = view.producer(quantizer.node)
        while node is not None and node.op_type in CLIP_OPS:
            before = view.producer(node)
            fusible = before is not None and before.op_type in ("Conv", "Add", *CLIP_OPS)
            if fusible and not view.is_absorbed(node, quantizer):
                yield (
                    node,
                    "clips to a narrower range than the next quantizer, so it is not fused and its input stays float",
                )
            node = before


@_rule(f"{PTQ}, which quantizes the output of every convolution", ort="warning")
def _float_output(graph: GraphView) -> Matches:
    for layer in graph.layers:
        readers = view.fused_consumers(layer.node)
        if layer.node.op_type == "Conv" and layer.quantized and readers != {QUANTIZE}:
            reason = f"consumed by {' and '.join(sorted(readers))}" if readers else "a network output"
            yield layer.node, f"its output is not quantized ({reason}): ONNX Runtime runs this node in float"


@_rule(FOR_ORT, ort="warning")
def _signed_activations(graph: GraphView) -> Matches:
    for quantizer in _of_type(graph.activations, DataType.INT8):
        yield quantizer.node, "int8 activations: on x86, ONNX Runtime converts them to uint8 and fuses fewer nodes"


@_rule(FOR_TENSORRT, tensorrt="error")
def _unsigned_integers(graph: GraphView) -> Matches:
    for quantizer in _of_type(graph.activations, DataType.UINT8):
        yield quantizer.node, "uint8 activations: TensorRT interprets them as int8 and computes wrong results"
    for stored in _of_type(graph.stored, DataType.UINT8):
        yield stored.node, "stored uint8 tensor: TensorRT cannot parse it"


@_rule(FOR_TENSORRT, tensorrt="error")
def _zero_points(graph: GraphView) -> Matches:
    for each in (*graph.activations, *graph.stored):
        if each.zero_point is not None and each.zero_point.any():
            yield each.node, "nonzero zero point: TensorRT rejects it"


# Verified: ONNX Runtime makes a QLinearConv of it that fails at run time; TensorRT-RTX builds it and runs it in float.
@_rule(f"{PTQ}, which uses one scale per activation tensor", ort="error", tensorrt="warning")
def _activation_scales(graph: GraphView) -> Matches:
    for each in graph.activations:
        if each.scale is not None and each.scale.size > 1:
            yield (
                each.node,
                f"{each.scale.size} scales for one activation: ONNX Runtime fails at run time, and TensorRT computes "
                "in float",
            )


@_rule(
    "micronet evaluate --arithmetic exact (in your own code: session.x64quantprecision=1), or micronet quantize "
    "--w-bits 7",
    ort="note",
)
def _saturating_weights(graph: GraphView) -> Matches:
    if wide := [layer.node for layer in graph.layers if layer.saturates]:
        yield (
            wide[0],
            (
                f"int8 weights use more than half their range in {count(len(wide), 'layer')}: sums can saturate on x86 "
                "CPUs without VNNI"
            ),
        )


@_rule("micronet prune --regular 8", ort="warning")
def _channel_widths(graph: GraphView) -> Matches:
    yield from _odd_widths(graph, 8)


@_rule("micronet prune --regular 16", tensorrt="warning")
def _channel_widths_of_tensorrt(graph: GraphView) -> Matches:
    yield from _odd_widths(graph, 16 if graph.qdq else 8)


@_rule("micronet quantize --first-last 8bit without --exclude for this layer", ort="warning", tensorrt="warning")
def _float_layers(graph: GraphView) -> Matches:
    for layer in graph.layers:
        if graph.qdq and layer.weight_qdq is None and layer.node.op_type != "ConvTranspose":
            yield (
                layer.node,
                (
                    "a float weight in a quantized graph: the layer runs in float, or ONNX Runtime quantizes the "
                    "weight at run time"
                ),
            )


@_rule("micronet quantize --exclude for this layer, which is faster in float", ort="warning", tensorrt="warning")
def _quantized_transposed_convolution(graph: GraphView) -> Matches:
    for layer in graph.layers:
        if layer.quantized and layer.node.op_type == "ConvTranspose":
            yield layer.node, "neither runtime has an integer ConvTranspose: this layer runs in float"


@_rule("micronet quantize --a-bits 8, or micronet export-onnx for the float network", ort="warning")
def _float_activations(graph: GraphView) -> Matches:
    for layer in graph.layers:
        if layer.weight_qdq is not None and layer.input_qdq is None:
            yield layer.node, "float input: the weight is dequantized on every run, which is slower than a float layer"


@_rule("micronet quantize --w-bits 8 --a-bits 8", ort="warning", tensorrt="error")
def _sixteen_bits(graph: GraphView) -> Matches:
    for each in (*graph.activations, *graph.stored):
        if each.dtype in (DataType.INT16, DataType.UINT16):
            yield each.node, f"{each.dtype.name}: ONNX Runtime runs it in float, and TensorRT cannot parse it"


@_rule("micronet export-onnx without --int4-storage", ort="warning", tensorrt="error")
def _four_bit_weights(graph: GraphView) -> Matches:
    for layer in graph.layers:
        if layer.quantized and layer.weight.dtype in (DataType.INT4, DataType.UINT4):
            yield (
                layer.node,
                f"{layer.weight.dtype.name} weights: ONNX Runtime runs the layer in float, and TensorRT cannot build "
                "an engine from them",
            )


@_rule("micronet evaluate --arithmetic fast, or micronet export-onnx, which stores one weight per node", ort="error")
def _shared_integers(graph: GraphView) -> Matches:
    owners: dict[Value | None, WeightedNode] = {}
    for layer in graph.layers:
        for value in layer.weight_qdq.node.inputs[::2] if layer.weight_qdq is not None and layer.saturates else ():
            owner = owners.setdefault(value, layer)
            if owner is not layer:
                shared = f"{value and value.name} with {title(owner.node)}"
                yield layer.node, f"shares {shared}: the file cannot be loaded with session.x64quantprecision=1"


@_rule(FOR_ORT, ort="error")
def _signed_before_move(graph: GraphView) -> Matches:
    pairs = _of_type(graph.activations, DataType.INT8)
    signed = {node.outputs[0] for pair in pairs for node in pair.node.outputs[0].consumers()}
    for node in (node for node in graph.nodes if node.op_type in MOVING_OPS):
        if node.inputs[0] in signed and not view.is_requantized(node):
            yield node, "int8 Q/DQ before but not after this node: ONNX Runtime cannot load the file"


@_rule(f"{PTQ}, which also quantizes the output of Flatten", ort="warning")
def _flatten(graph: GraphView) -> Matches:
    for layer in graph.layers:
        before = view.producer(layer.node)
        if before is not None and before.op_type == "Flatten" and view.is_dequantized(before.inputs[0]):
            yield before, f"Q/DQ do not pass Flatten in ONNX Runtime: {title(layer.node)} rounds its input at run time"


@_rule("micronet export-onnx, which stores integers", ort="warning", tensorrt="warning")
def _float_storage(graph: GraphView) -> Matches:
    for node in (each.node for each in graph.stored if each.node.op_type == QUANTIZE):
        name = next(filter(None, node.inputs)).name
        yield node, f"{name} is stored as float and quantized at load time, which does not make the file smaller"


@_rule(FOR_TENSORRT, tensorrt="error")
def _int32_bias(graph: GraphView) -> Matches:
    for each in _of_type(graph.stored, DataType.INT32):
        yield each.node, "int32 bias: TensorRT cannot parse it, because it only dequantizes integers of 8 bits or fewer"


@_rule("export the network with standard ONNX operators only", tensorrt="error")
def _foreign_operator(graph: GraphView) -> Matches:
    for node in (node for node in graph.nodes if node.domain not in ("", "ai.onnx")):
        yield node, f"{node.domain}::{node.op_type}: TensorRT has no such operator"


def _odd_widths(graph: GraphView, multiple: int) -> Matches:
    """Find widths that are not multiples, the most wasteful first, except the image's and the network's outputs."""
    sides = [(layer, layer.inputs, "inputs") for layer in graph.layers if not layer.first]
    sides += [(layer, layer.outputs, "outputs") for layer in graph.layers if not layer.last]
    odd = [side for side in sides if side[1] % multiple]
    odd.sort(key=lambda side: side[1] % -multiple / side[1])
    if odd:
        named = ", ".join(f"{title(layer.node)} {width} {side}" for layer, width, side in odd[:LISTED])
        yield odd[0][0].node, f"widths that are not multiples of {multiple}: {named}"


def _of_type(nodes: list[QDQNode], dtype: DataType) -> list[QDQNode]:
    return [each for each in nodes if each.dtype == dtype]
