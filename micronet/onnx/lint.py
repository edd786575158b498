"""Why an ONNX file would be slow or wrong in ONNX Runtime or TensorRT, told from the file alone.

What the rules say was tried with onnxruntime 1.32 on x86 and TensorRT-RTX 1.7; other versions may have moved on.
Graphs inside If and Loop are not looked into.
"""

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import onnx
import onnxruntime
from onnx import NodeProto, TensorProto

from micronet.onnx.graph_view import CLIPS, MOVES, QUANTIZE, GraphView, Layer, title

Target = Literal["ort", "tensorrt", "both"]
Severity = Literal["error", "warning", "note"]
Places = Iterator[tuple[NodeProto, str]]  # where, and what is the matter there
Find = Callable[[GraphView], Places]
RULES: "list[Rule]" = []  # each function below that is decorated with its cure and severity
LISTED = 3  # layers named in a message about the whole file
FOR_ORT = "micronet export-onnx --target ort, whose activations are uint8"
FOR_TENSORRT = "micronet quantize --q-type sym --a-sign signed, then micronet export-onnx --target tensorrt"
# What we count: noun, operators of the file, operators that ONNX Runtime makes of them where it computes in integers.
KERNELS = (
    ("convolutions", ("Conv", "ConvTranspose"), ("QLinearConv", "ConvInteger")),
    ("matrix products", ("Gemm", "MatMul"), ("QGemm", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat")),
    ("additions", ("Add",), ("QLinearAdd",)),
)


class Finding(NamedTuple):
    """One thing to mend. ``error``: wrong results, or it does not load or build; ``warning``: slow or large."""

    rule: str
    severity: Severity
    node: str
    message: str
    cure: str


class Rule(NamedTuple):
    """What to look for. ``severity``: target -> how bad it is there."""

    name: str
    cure: str
    severity: dict[str, Severity]
    find: Find


def lint(proto: onnx.ModelProto, target: Target) -> list[Finding]:
    """Return everything that the rules for a target find in a model, the worst first."""
    graph = GraphView(proto)
    found = []
    for known in RULES:
        degrees = [degree for name, degree in known.severity.items() if target in (name, "both")]
        if degrees:
            severity = next(degree for degree in get_args(Severity) if degree in degrees)
            found += [Finding(known.name, severity, title(at), text, known.cure) for at, text in known.find(graph)]
    return sorted(found, key=lambda finding: get_args(Severity).index(finding.severity))


def fused(proto: onnx.ModelProto, file: Path | None = None) -> dict[str, dict[str, int]] | None:
    """Count what ONNX Runtime computes in integers, at full optimisation, of what a model holds.

    ``file``: where the model was read from, for weights that are too many for one message.
    Returns ``integer`` and ``all`` for convolutions, matrix products and additions; None where it refuses the model.
    """
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    with tempfile.TemporaryDirectory() as folder:
        settings.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        try:
            source = str(file) if file else proto.SerializeToString()
            onnxruntime.InferenceSession(source, settings, providers=["CPUExecutionProvider"])
        except Exception:  # ONNX Runtime's exceptions share no base class of their own
            return None
        optimised = onnx.load(settings.optimized_model_filepath, load_external_data=False)
    graph = GraphView(proto)
    constant = graph.stored.keys()  # the addition of one is no join of two branches
    held = Counter(node.op_type for node in graph.nodes if node.op_type != "Add" or constant.isdisjoint(node.input))
    run = Counter(node.op_type for node in optimised.graph.node)
    return {
        noun: {"integer": sum(run[name] for name in ours), "all": sum(held[name] for name in theirs + ours)}
        for noun, theirs, ours in KERNELS
    }


def rule(cure: str, **severity: Severity) -> Callable[[Find], Find]:
    """Enter a function into the table under its name; ``severity``: ort=, tensorrt= or both."""

    def enter(find: Find) -> Find:
        RULES.append(Rule(find.__name__.strip("_").replace("_", "-"), cure, severity, find))
        return find

    return enter


@rule("quantize its other inputs too", ort="warning")
def _mixed_inputs(graph: GraphView) -> Places:
    for node in (node for node in graph.nodes if node.op_type in ("Add", "Concat")):
        names = [name for name in node.input if name not in graph.stored]
        floats = [name for name in names if not graph.is_dequantized(name)]
        if 0 < len(floats) < len(names):
            yield node, f"{len(floats)} of {len(names)} inputs are not quantized: ONNX Runtime runs it in float"


@rule("micronet quantize --a-bits 8 with --a-sign left out: zero point at the end of the range", ort="warning")
def _kept_activation(graph: GraphView) -> Places:
    for grid in graph.activations:
        node = graph.made.get(grid.node.input[0])
        while node is not None and node.op_type in CLIPS:
            before = graph.made.get(node.input[0])
            if before is not None and before.op_type in ("Conv", "Add", *CLIPS) and not graph.absorbed(node, grid):
                yield node, "it cuts more than the grid behind it: it stays, and what is in front of it runs in float"
            node = before


@rule("quantize this output, in front of all that read it", ort="warning")
def _float_output(graph: GraphView) -> Places:
    for layer in graph.layers:
        if layer.node.op_type == "Conv" and layer.quantized and graph.ends(layer.node) != {QUANTIZE}:
            yield layer.node, "its output is read unquantized: ONNX Runtime runs it in float"


@rule(FOR_ORT, ort="warning")
def _signed_activations(graph: GraphView) -> Places:
    for grid in graph.quantizers(TensorProto.INT8):
        yield grid.node, "int8 activations: ONNX Runtime makes them uint8 on x86, which spoils its fusions"


@rule(FOR_TENSORRT, tensorrt="error")
def _unsigned_integers(graph: GraphView) -> Places:
    for grid in graph.quantizers(TensorProto.UINT8):
        yield grid.node, "uint8 activations: TensorRT takes them for int8, wrong numbers"
    for grid in graph.constants(TensorProto.UINT8):
        yield grid.node, "stored uint8: TensorRT does not parse it"


@rule(FOR_TENSORRT, tensorrt="error")
def _zero_points(graph: GraphView) -> Places:
    for grid in (*graph.activations, *graph.constants()):
        if grid.zero_point is not None and grid.zero_point.any():
            yield grid.node, "the zero point is not 0: TensorRT refuses it"


# Tried: ONNX Runtime makes a QLinearConv of it that fails when it runs; TensorRT-RTX builds it, and runs it in float.
@rule("give activations one scale a tensor", ort="error", tensorrt="warning")
def _activation_scales(graph: GraphView) -> Places:
    for grid in graph.activations:
        if grid.scale is not None and grid.scale.size > 1:
            yield grid.node, f"{grid.scale.size} scales for one activation: fails in ONNX Runtime, float in TensorRT"


@rule("session.x64quantprecision=1, which --arithmetic exact is there; or quantize with --w-bits 7", ort="note")
def _saturating_weights(graph: GraphView) -> Places:
    if wide := [layer.node for layer in graph.layers if layer.saturates]:
        yield wide[0], f"int8 weights beyond half their range in {len(wide)} layers: they saturate on x86 without VNNI"


@rule("micronet prune --regular 8", ort="warning")
def _channel_widths(graph: GraphView) -> Places:
    yield from _odd_widths(graph, 8)


@rule("micronet prune --regular 16", tensorrt="warning")
def _channel_widths_of_tensorrt(graph: GraphView) -> Places:
    yield from _odd_widths(graph, 16 if graph.grids else 8)


@rule("quantize this layer too, or accept it", ort="warning", tensorrt="warning")
def _float_layers(graph: GraphView) -> Places:
    for layer in graph.layers:
        if graph.grids and layer.grid is None:
            yield layer.node, "a float weight in a quantized graph: float, or ONNX Runtime quantizes it by its own rule"
        elif layer.quantized and layer.node.op_type == "ConvTranspose":
            yield layer.node, "neither runtime has an integer ConvTranspose: float"


@rule("micronet quantize --a-bits 8, or export the float network", ort="warning")
def _float_activations(graph: GraphView) -> Places:
    for layer in graph.layers:
        if layer.grid is not None and layer.activation is None:
            yield layer.node, "float activations: its weight is dequantized on every run, slower than a float layer"


@rule("micronet quantize with at most 8 bits", ort="warning", tensorrt="error")
def _sixteen_bits(graph: GraphView) -> Places:
    for grid in (grid for grid in (*graph.activations, *graph.constants()) if grid.integers.endswith("INT16")):
        yield grid.node, f"{grid.integers}: ONNX Runtime runs it in float, TensorRT does not parse it"


@rule("micronet export-onnx without --int4-storage", ort="warning", tensorrt="error")
def _four_bit_weights(graph: GraphView) -> Places:
    for layer in graph.layers:
        if layer.grid is not None and layer.activation is not None and layer.grid.integers.endswith("INT4"):
            yield layer.node, f"{layer.grid.integers} weights: float in ONNX Runtime; TensorRT does not build them"


@rule("give every DequantizeLinear integers and a zero point of its own", ort="error")
def _shared_integers(graph: GraphView) -> Places:
    owners: dict[str, Layer] = {}
    for layer in graph.layers:
        for name in layer.grid.node.input[::2] if layer.grid is not None and layer.saturates else ():
            owner = owners.setdefault(name, layer)
            if owner is not layer:
                yield layer.node, f"{name} is {title(owner.node)}'s too: session.x64quantprecision=1 does not load"


@rule(f"put Q/DQ behind it as well, or {FOR_ORT}", ort="error")
def _signed_before_move(graph: GraphView) -> Places:
    signed = {node.output[0] for grid in graph.quantizers(TensorProto.INT8) for node in graph.readers(grid.node)}
    for node in (node for node in graph.nodes if node.op_type in MOVES):
        if node.input[0] in signed and not graph.requantized(node):
            yield node, "int8 Q/DQ in front of it and none behind: ONNX Runtime does not load the file"


@rule("write Reshape for it, or put Q/DQ behind it", ort="warning")
def _flatten(graph: GraphView) -> Places:
    for layer in graph.layers:
        before = graph.made.get(layer.node.input[0])
        if before is not None and before.op_type == "Flatten" and graph.is_dequantized(before.input[0]):
            yield before, f"ONNX Runtime carries no Q/DQ over Flatten: {title(layer.node)} runs in float"


@rule("micronet export-onnx stores integers", ort="warning", tensorrt="warning")
def _float_storage(graph: GraphView) -> Places:
    for grid in (grid for grid in graph.constants() if grid.node.op_type == QUANTIZE):
        yield grid.node, f"{grid.node.input[0]} is stored in float and quantized at load: the file is not smaller"


@rule(FOR_TENSORRT, tensorrt="error")
def _int32_bias(graph: GraphView) -> Places:
    for grid in graph.constants(TensorProto.INT32):
        yield grid.node, "an int32 bias: TensorRT dequantizes at most 8 bits and does not parse it"


@rule("build with its plugin, or export standard operators", tensorrt="error")
def _foreign_operator(graph: GraphView) -> Places:
    for node in (node for node in graph.nodes if node.domain not in ("", "ai.onnx")):
        yield node, f"{node.domain}::{node.op_type}: TensorRT finds no such operator"


def _odd_widths(graph: GraphView, multiple: int) -> Places:
    if odd := graph.odd_widths(multiple):
        named = ", ".join(f"{title(layer.node)} {width} {side}" for layer, width, side in odd[:LISTED])
        yield odd[0][0].node, f"widths that are no multiple of {multiple}, {len(odd)} in all: {named}"
