"""Every ONNX operator that this room knows, in families; ``micronet.graph.ops`` is the same for torch."""

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
LINE = "micronet.line"  # metadata of a node that is not written to files: which line of the user's code made it

# Layers, as files hold them.
CONVOLUTIONS = {"Conv", "ConvTranspose"}
DEFORMABLE = "DeformConv"  # a convolution for which no runtime has integers
PRODUCTS = {"Gemm", "MatMul"}
WEIGHTED_OPS = CONVOLUTIONS | PRODUCTS
RECURRENT = {"LSTM", "GRU", "RNN"}
CONTROL = {"Loop", "Scan", "If"}  # they hold graphs of their own

# Functions of one tensor, and joins of several.
CLIP_OPS = {"Relu", "Clip"}
SUMS = {"Add", "Sum"}
JOINS = {"Add", "Mul", "Concat"}
POOLS = {"AveragePool", "GlobalAveragePool"}
FUNCTIONS = {"Sigmoid", "LeakyRelu", *POOLS}
SMOOTH = {"HardSwish", "HardSigmoid", "Sigmoid", "Gelu", "FastGelu", "QuickGelu", "BiasGelu", "Erf", "Tanh", "Mish"}
FUSED_BY_GEMM = {  # what ONNX Runtime merges into a Gemm before it looks for integers
    "Relu", "LeakyRelu", "Sigmoid", "Tanh", "Elu", "HardSigmoid", "Selu", "Softplus", "Softsign",
}  # fmt: skip

# Operators that only select or move values, so that their outputs have their input's grid.
RESHAPES = {"Reshape", "Flatten"}
MOVING_OPS = {"MaxPool", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice"}  # ONNX Runtime passes grids across
BLOCKS = {  # but not across these
    "Split", "Concat", "Gather", "DepthToSpace", "SpaceToDepth", "Tile", "Expand", "Flatten", "Resize", "Pad",
}  # fmt: skip
MOVES = MOVING_OPS | {"Flatten", "Split", "Resize", "DepthToSpace", "SpaceToDepth", "Identity"}
SIZES = {"Shape", "Size"}  # they read the sizes of a tensor alone

# What ONNX Runtime has kernels of integers for.
COMPUTED_IN_INTEGERS = {"Conv", "MatMul", "Gemm", *JOINS, *POOLS, "ReduceMean"}
FOR_TENSORRT = {"Add", "Concat", "MaxPool", *POOLS}  # it fuses other functions itself

# Operators of ONNX Runtime's optimized graphs.
INTEGER_CONVOLUTIONS = {"QLinearConv", "ConvInteger"}
INTEGER_PRODUCTS = {
    "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "MatMulInteger", "DynamicQuantizeMatMul", "MatMulNBits",
}  # fmt: skip
RECURRENT_INTEGERS = {"DynamicQuantizeLSTM"}
INTEGER_LAYERS = INTEGER_CONVOLUTIONS | INTEGER_PRODUCTS | RECURRENT_INTEGERS
FLOAT_LAYERS = WEIGHTED_OPS | RECURRENT | {
    DEFORMABLE,
    "FusedConv", "NhwcFusedConv", "FusedGemm", "FusedMatMul", "Attention", "MultiHeadAttention",
}  # fmt: skip
COMPUTE_NOTHING = (MOVES - {"Resize", "DepthToSpace", "SpaceToDepth"}) | SIZES | {
    "Gather", "Cast", "Constant", "ConstantOfShape", "Expand", "Range", "ReorderInput", "ReorderOutput", "NhwcMaxPool",
    QUANTIZE, DEQUANTIZE,
}  # fmt: skip
