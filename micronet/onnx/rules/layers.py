"""Rules on layers: what keeps a convolution or a matrix product from integers, and widths that waste time."""

from onnx_ir import DataType

from micronet.errors import count
from micronet.onnx import graph_view as view
from micronet.onnx.float_nodes import is_small, obstacle
from micronet.onnx.graph_view import WeightedNode, title
from micronet.onnx.ops import QUANTIZE
from micronet.onnx.rules.rule import PTQ, LintedFile, Match, Matches, rule
from micronet.quantization.config import EXCLUDED, FIRST_OR_LAST

LISTED = 3  # layers named in a message about the whole file
OTHER_WIDTHS = "choose other widths where the network is made"
NO_PRUNING = f"{OTHER_WIDTHS}; no command prunes ONNX files"
WHERE_CUT = "micronet prune --regular {}, if prune can cut them"
CURES = {
    FIRST_OR_LAST: "micronet quantize --first-last 8bit",
    EXCLUDED: "micronet quantize without --exclude for this layer",
}


@rule(f"{PTQ}, which quantizes the output of every convolution", ort="warning")
def float_output(file: LintedFile) -> Matches:
    """Find convolutions whose output nothing quantizes."""
    for layer in file.graph.layers:
        readers = view.fused_consumers(layer.node)
        if layer.node.op_type == "Conv" and layer.quantized and readers != {QUANTIZE}:
            reason = f"consumed by {' and '.join(sorted(readers))}" if readers else "a network output"
            message = f"its output is not quantized ({reason}): ONNX Runtime runs this node in float"
            yield Match(layer.node, message)


@rule("micronet quantize --a-bits 8, or micronet export-onnx for the float network", ort="warning")
def float_activations(file: LintedFile) -> Matches:
    """Find quantized weights that meet a float input."""
    for layer in file.graph.layers:
        if layer.weight_qdq is not None and layer.input_qdq is None:
            message = "float input: the weight is dequantized on every run, which is slower than a float layer"
            yield Match(layer.node, message)


@rule("micronet quantize --first-last 8bit without --exclude for this layer", ort="warning", tensorrt="warning")
def float_layers(file: LintedFile) -> Matches:
    """Find float layers in a quantized graph that an option would quantize."""
    for layer in file.graph.layers:
        if not file.graph.qdq or layer.weight_qdq is not None or layer.node.op_type == "ConvTranspose":
            continue
        if (cure := _cure(file, layer)) is not None:
            message = (
                "a float weight in a quantized graph: the layer runs in float, or ONNX Runtime quantizes the weight at "
            )
            yield Match(layer.node, f"{message}run time", cure)


def _cure(file: LintedFile, layer: WeightedNode) -> str | None:
    """Return what would quantize a float layer; None if no option does, or if the layer would not gain."""
    name = layer.node.name or ""
    recorded = (why for owner, why in file.left_float.items() if name == owner or name.startswith(f"{owner}."))
    why = next(recorded, None)
    if why is not None:
        return CURES.get(why) if file.exported else None
    if obstacle(layer.node, signed=False) is not None or (is_small(layer.node) and not layer.first):
        return None
    if not file.exported:
        return None if file.by_ptq else PTQ
    return CURES[FIRST_OR_LAST if layer.first or layer.last else EXCLUDED]


@rule(
    "micronet export-onnx --target ort, which stores this layer in float, or micronet quantize --exclude for it",
    f"{PTQ}, which leaves this layer in float",
    ort="warning",
    tensorrt="warning",
)
def quantized_transposed_convolution(file: LintedFile) -> Matches:
    """Find transposed convolutions with quantized weights and inputs."""
    for layer in file.graph.layers:
        if layer.quantized and layer.node.op_type == "ConvTranspose":
            yield Match(layer.node, "neither runtime has an integer ConvTranspose: this layer runs in float")


@rule("micronet export-onnx without --int4-storage", ort="warning", tensorrt="error")
def four_bit_weights(file: LintedFile) -> Matches:
    """Find weights that are stored in 4 bits."""
    for layer in file.graph.layers:
        if layer.quantized and layer.weight.dtype in (DataType.INT4, DataType.UINT4):
            kind = f"{layer.weight.dtype.name} weights"
            message = "ONNX Runtime runs the layer in float, and TensorRT cannot build an engine from them"
            yield Match(layer.node, f"{kind}: {message}")


@rule(
    "micronet evaluate --arithmetic exact (in your own code: session.x64quantprecision=1), or micronet quantize "
    "--w-bits 7",
    f"micronet evaluate --arithmetic exact (in your own code: session.x64quantprecision=1), or {PTQ} --w-bits 7",
    ort="note",
)
def saturating_weights(file: LintedFile) -> Matches:
    """Find weights of which two products can exceed 16 bits."""
    if wide := [layer.node for layer in file.graph.layers if layer.saturates]:
        message = (
            f"int8 weights use more than half their range in {count(len(wide), 'layer')}: sums can saturate on x86 "
        )
        yield Match(wide[0], f"{message}CPUs without VNNI")


@rule(WHERE_CUT.format(8), NO_PRUNING, ort="warning")
def channel_widths(file: LintedFile) -> Matches:
    """Find widths that are not multiples of what ONNX Runtime computes at a time."""
    yield from _odd_widths(file, 8)


@rule(WHERE_CUT.format(16), NO_PRUNING, tensorrt="warning")
def channel_widths_of_tensorrt(file: LintedFile) -> Matches:
    """Find widths that are not multiples of what TensorRT computes at a time."""
    yield from _odd_widths(file, 16 if file.graph.qdq else 8)


def _odd_widths(file: LintedFile, multiple: int) -> Matches:
    """Find widths that are not multiples, the most wasteful first, except the image's and the network's outputs.

    Pruning only cuts, so it helps none that is narrower than the multiple.
    """
    sides = [(layer, layer.inputs, "inputs") for layer in file.graph.layers if not layer.first]
    sides += [(layer, layer.outputs, "outputs") for layer in file.graph.layers if not layer.last]
    odd = [side for side in sides if side[1] % multiple]
    odd.sort(key=lambda side: side[1] % -multiple / side[1])
    wide, narrow = ([side for side in odd if (side[1] > multiple) == above] for above in (True, False))
    for sides, own in ((narrow, OTHER_WIDTHS), (wide, WHERE_CUT.format(multiple))):
        if sides:
            named = ", ".join(f"{title(layer.node)} {width} {side}" for layer, width, side in sides[:LISTED])
            cure = own if file.exported else None
            yield Match(sides[0][0].node, f"widths that are not multiples of {multiple}: {named}", cure)


LAYER_RULES = (
    float_output, float_activations, float_layers, quantized_transposed_convolution, four_bit_weights,
    saturating_weights, channel_widths, channel_widths_of_tensorrt,
)  # fmt: skip
