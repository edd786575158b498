"""Rules on the quantizers of activations: where they are missing, and grids that a runtime does not fuse or refuses."""

from onnx_ir import DataType, Value

from micronet.onnx import graph_view as view
from micronet.onnx.graph_view import title
from micronet.onnx.ops import CLIP_OPS, DEQUANTIZE, MOVING_OPS, QUANTIZE
from micronet.onnx.rules.rule import (
    FOR_ORT,
    FOR_TENSORRT,
    PTQ,
    PTQ_FOR_ORT,
    PTQ_FOR_TENSORRT,
    LintedFile,
    Match,
    Matches,
    rule,
)


@rule(f"{PTQ}, which quantizes every input of Add and Concat", ort="warning")
def mixed_inputs(file: LintedFile) -> Matches:
    """Find joins of quantized and float tensors whose results are quantized; others would be in float anyway."""
    for node in (node for node in file.graph.nodes if node.op_type in ("Add", "Concat")):
        inputs = [value for value in node.inputs if value is not None and not _is_stored(value)]
        floats = [value for value in inputs if not view.is_dequantized(value)]
        if 0 < len(floats) < len(inputs) and QUANTIZE in view.fused_consumers(node):
            missing = f"{len(floats)} of {len(inputs)} inputs are not quantized"
            cure = f"none: {_why_mixed(floats[0])}" if file.by_ptq else None
            yield Match(node, f"{missing}: ONNX Runtime runs this node in float", cure)


def _is_stored(value: Value) -> bool:
    """Return True for a constant, and for one that is stored as integers, such as a bias."""
    node = value.producer()
    dequantized = node is not None and node.op_type == DEQUANTIZE and view.stored(node) is not None
    return value.const_value is not None or dequantized


def _why_mixed(missing: Value) -> str:
    """Return why quantize FILE.onnx left the input of a join in float."""
    source = missing.producer()
    return f"its input {missing.name if source is None else f'from {title(source)}'} stays in float"


@rule("micronet quantize --a-bits 8 --a-sign auto, which puts the zero point at the end of the range", ort="warning")
def kept_activation(file: LintedFile) -> Matches:
    """Find a Relu or Clip that the next quantizer does not make redundant."""
    for quantizer in file.graph.activations:
        node = view.producer(quantizer.node)
        while node is not None and node.op_type in CLIP_OPS:
            before = view.producer(node)
            fusible = before is not None and before.op_type in {"Conv", "Add"} | CLIP_OPS
            if fusible and not view.is_absorbed(node, quantizer):
                message = (
                    "clips to a narrower range than the next quantizer, so it is not fused and its input stays float"
                )
                yield Match(node, message)
            node = before


@rule(FOR_ORT, PTQ_FOR_ORT, ort="warning")
def signed_activations(file: LintedFile) -> Matches:
    """Find int8 activations."""
    for quantizer in view.of_type(file.graph.activations, DataType.INT8):
        message = "int8 activations: on x86, ONNX Runtime converts them to uint8 and fuses fewer nodes"
        yield Match(quantizer.node, message)


@rule(FOR_ORT, PTQ_FOR_ORT, ort="error")
def signed_before_move(file: LintedFile) -> Matches:
    """Find int8 tensors that are moved without a quantizer behind."""
    pairs = view.of_type(file.graph.activations, DataType.INT8)
    signed = {node.outputs[0] for pair in pairs for node in pair.node.outputs[0].consumers()}
    for node in (node for node in file.graph.nodes if node.op_type in MOVING_OPS):
        if node.inputs[0] in signed and not view.is_requantized(node):
            yield Match(node, "int8 Q/DQ before but not after this node: ONNX Runtime cannot load the file")


# Verified: ONNX Runtime makes a QLinearConv of it that fails at run time; TensorRT-RTX builds it and runs it in float.
@rule(f"{PTQ}, which uses one scale per activation tensor", ort="error", tensorrt="warning")
def activation_scales(file: LintedFile) -> Matches:
    """Find activations with a scale per channel."""
    for each in file.graph.activations:
        if each.scale is not None and each.scale.size > 1:
            message = "ONNX Runtime fails at run time, and TensorRT computes in float"
            yield Match(each.node, f"{each.scale.size} scales for one activation: {message}")


@rule(f"{PTQ}, which also quantizes the output of Flatten", ort="warning")
def flatten(file: LintedFile) -> Matches:
    """Find a Flatten between a quantizer and a layer."""
    for layer in file.graph.layers:
        before = view.producer(layer.node)
        if before is not None and before.op_type == "Flatten" and view.is_dequantized(before.inputs[0]):
            message = f"Q/DQ do not pass Flatten in ONNX Runtime: {title(layer.node)} rounds its input at run time"
            yield Match(before, message)


@rule(FOR_TENSORRT, PTQ_FOR_TENSORRT, tensorrt="error")
def zero_points(file: LintedFile) -> Matches:
    """Find grids whose zero is not 0."""
    for each in (*file.graph.activations, *file.graph.stored):
        if each.zero_point is not None and each.zero_point.any():
            yield Match(each.node, "nonzero zero point: TensorRT rejects it")


QUANTIZER_RULES = (
    mixed_inputs, kept_activation, signed_activations, signed_before_move, activation_scales, flatten, zero_points,
)  # fmt: skip
