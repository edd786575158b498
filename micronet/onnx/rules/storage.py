"""Rules on how a file holds integers, and on operators that are not of the standard."""

from onnx_ir import DataType, Value

from micronet.onnx.graph_view import WeightedNode, of_type, title
from micronet.onnx.ops import QUANTIZE
from micronet.onnx.rules.rule import FOR_TENSORRT, PTQ, PTQ_FOR_TENSORRT, LintedFile, Match, Matches, rule

STANDARD = "export the network with standard ONNX operators only"


@rule(FOR_TENSORRT, PTQ_FOR_TENSORRT, tensorrt="error")
def unsigned_integers(file: LintedFile) -> Matches:
    """Find uint8 tensors."""
    for quantizer in of_type(file.graph.activations, DataType.UINT8):
        message = "uint8 activations: TensorRT interprets them as int8 and computes wrong results"
        yield Match(quantizer.node, message)
    for stored in of_type(file.graph.stored, DataType.UINT8):
        yield Match(stored.node, "stored uint8 tensor: TensorRT cannot parse it")


@rule("micronet quantize --w-bits 8 --a-bits 8", ort="warning", tensorrt="error")
def sixteen_bits(file: LintedFile) -> Matches:
    """Find tensors of 16 bits."""
    for each in (*file.graph.activations, *file.graph.stored):
        if each.dtype in (DataType.INT16, DataType.UINT16):
            message = "ONNX Runtime runs it in float, and TensorRT cannot parse it"
            yield Match(each.node, f"{each.dtype.name}: {message}")


@rule(FOR_TENSORRT, PTQ_FOR_TENSORRT, tensorrt="error")
def int32_bias(file: LintedFile) -> Matches:
    """Find biases that are stored as integers."""
    for each in of_type(file.graph.stored, DataType.INT32):
        message = "int32 bias: TensorRT cannot parse it, because it only dequantizes integers of 8 bits or fewer"
        yield Match(each.node, message)


@rule(
    "micronet evaluate --arithmetic fast, or micronet export-onnx, whose weights have one reader each",
    f"micronet evaluate --arithmetic fast, or {PTQ}, whose weights have one reader each",
    ort="error",
)
def shared_integers(file: LintedFile) -> Matches:
    """Find stored integers that several layers read."""
    owners: dict[Value | None, WeightedNode] = {}
    for layer in file.graph.layers:
        for value in layer.weight_qdq.node.inputs[::2] if layer.weight_qdq is not None and layer.saturates else ():
            owner = owners.setdefault(value, layer)
            if owner is not layer:
                shared = f"shares {value and value.name} with {title(owner.node)}"
                yield Match(layer.node, f"{shared}: the file cannot be loaded with session.x64quantprecision=1")


@rule("export it again: micronet export-onnx stores integers", ort="warning", tensorrt="warning")
def float_storage(file: LintedFile) -> Matches:
    """Find tensors that are quantized at load time."""
    for node in (each.node for each in file.graph.stored if each.node.op_type == QUANTIZE):
        name = next(filter(None, node.inputs)).name
        message = "stored as float and quantized at load time, which does not make the file smaller"
        yield Match(node, f"{name} is {message}")


@rule(STANDARD, STANDARD, tensorrt="error")
def foreign_operator(file: LintedFile) -> Matches:
    """Find operators of other domains than ONNX's own."""
    for node in (node for node in file.graph.nodes if node.domain not in ("", "ai.onnx")):
        yield Match(node, f"{node.domain}::{node.op_type}: TensorRT has no such operator")


STORAGE_RULES = unsigned_integers, sixteen_bits, int32_bias, shared_integers, float_storage, foreign_operator
