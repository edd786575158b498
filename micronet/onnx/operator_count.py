"""What ONNX Runtime computes in integers when it runs a quantized model."""

import onnx
from onnxruntime import GraphOptimizationLevel

from micronet.onnx.graph_view import DEQUANTIZE, QUANTIZE
from micronet.runtimes.onnxruntime import optimize

INTEGER_CONVOLUTIONS = {"QLinearConv", "ConvInteger"}
INTEGER_PRODUCTS = {
    "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "MatMulInteger", "DynamicQuantizeMatMul", "MatMulNBits",
}  # fmt: skip
INTEGER_LAYERS = INTEGER_CONVOLUTIONS | INTEGER_PRODUCTS | {"DynamicQuantizeLSTM"}
FLOAT_LAYERS = {
    "Conv", "FusedConv", "NhwcFusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "LSTM", "GRU",
    "RNN", "Attention", "MultiHeadAttention",
}  # fmt: skip
MOVING = {
    "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Split", "Gather", "Shape", "Cast", "Identity",
    "Constant", "ConstantOfShape", "Expand", "Range", "ReorderInput", "ReorderOutput", "MaxPool", "NhwcMaxPool", "Size",
    QUANTIZE, DEQUANTIZE,
}  # fmt: skip


def count_integers(proto: onnx.ModelProto) -> dict[str, int]:
    """Return how many operators, and how many layers among them, run in integers after ONNX Runtime's optimization.

    Operators that only move values or compute shapes do not count.
    """
    nodes = optimize(proto.SerializeToString(), GraphOptimizationLevel.ORT_ENABLE_ALL).graph.node
    kinds = [node.op_type for node in nodes if node.op_type not in MOVING]
    integer = [kind for kind in kinds if kind in INTEGER_LAYERS or kind.startswith("QLinear")]
    layers = [kind for kind in kinds if kind in INTEGER_LAYERS | FLOAT_LAYERS]
    return {
        "operators": len(kinds),
        "integer_operators": len(integer),
        "layers": len(layers),
        "integer_layers": sum(kind in INTEGER_LAYERS for kind in layers),
    }
