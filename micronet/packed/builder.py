"""A packed program under construction: operations by the name of the ONNX value that each computes.

Signs need no floats. A sign is moved before pools and shuffles, with which it commutes. A convolution of integers
followed by a sign becomes sums and thresholds, which replace scales, biases and batch norms: with y = s * sum + b,
y >= 0 is sum >= -b / s; where s is negative, the filter is negated first.
"""

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from micronet.errors import MicronetError
from micronet.packed.program import Operation

COMMUTING = ("max_pool", "shuffle")  # sign(f(x)) = f(sign(x)), because sign is monotonic


class ProgramBuilder:
    """The operations made of an ONNX graph so far; each comes after its inputs.

    constants: the graph's initializers. operations: name -> operation and its inputs' names. aliases: name -> another
    name of the same value. shapes: of values, without the batch; 0 is unknown. dequantized: integer weights and scales.
    """

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.graph = proto.graph
        self.constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
        self.operations: dict[str, tuple[Operation, list[str]]] = {}
        self.aliases: dict[str, str] = {}
        inferred = onnx.shape_inference.infer_shapes(proto).graph
        self.shapes = {
            info.name: [dim.dim_value for dim in info.type.tensor_type.shape.dim][1:]
            for info in [*inferred.input, *inferred.value_info, *inferred.output]
        }
        self.dequantized: dict[str, tuple[NDArray[Any], NDArray[np.float32]]] = {}

    def resolve(self, value: str) -> str:
        """Return the operation or input that a name stands for."""
        while value in self.aliases:
            value = self.aliases[value]
        return value

    def add(self, node: onnx.NodeProto, kind: str, *inputs: str, **parts: Any) -> None:
        """Add an operation that computes a node's output, by default of the node's first input.

        ``parts``: ``attributes`` (None: default), ``weight``, …
        """
        attributes = {key: value for key, value in parts.pop("attributes", {}).items() if value is not None}
        operation = Operation(kind, [], attributes, **parts)
        self.operations[node.output[0]] = operation, [self.resolve(item) for item in inputs or node.input[:1]]

    def reader_count(self, name: str) -> int:
        """Return how many inputs of operations are the named value."""
        return sum(inputs.count(name) for _, inputs in self.operations.values())

    def weight(self, value: str) -> tuple[NDArray[Any], NDArray[np.float32] | None]:
        """Return a constant as integers and their scale, or as float32 and None."""
        if value in self.constants:
            return self.constants[value].astype(np.float32), None
        if value in self.dequantized:
            return self.dequantized[value]
        raise MicronetError(
            f"{value} is not a constant, but the packed runtime only supports constant weights; use the ONNX file "
            "instead"
        )


def move_signs(builder: ProgramBuilder) -> None:
    """Move signs before the pools and shuffles whose only reader they are."""
    operations = builder.operations
    for name in [name for name, (operation, _) in operations.items() if operation.kind == "sign"]:
        while True:
            sign, (source,) = operations[name]
            before = operations.get(source)
            if before is None or before[0].kind not in COMMUTING or builder.reader_count(source) > 1:
                break
            commuting, (origin,) = before
            operations[source] = sign, [origin]  # the two operations change places, and their outputs' names with them
            operations[name] = commuting, [source]
            name = source


def fuse_thresholds(builder: ProgramBuilder, output: str) -> None:
    """Fuse each convolution of integers with a sign that is its only reader."""
    operations = builder.operations
    for name, (operation, (source, *_)) in list(operations.items()):
        if operation.kind != "sign" or source not in operations or builder.reader_count(source) > 1:
            continue
        conv, origin = operations[source]
        if conv.kind != "conv" or conv.weight is None or conv.weight.dtype.kind != "i" or source == output:
            continue
        scale = _integer_scale(builder, origin[0])
        if conv.scale is not None and scale is not None:
            operations[name] = threshold(conv, scale), origin
            del operations[source]


def _integer_scale(builder: ProgramBuilder, name: str) -> float | None:
    """Return the scale of an integer value, or None for a float one."""
    operation, inputs = builder.operations.get(name, (None, []))
    if operation is None:
        return None
    if operation.kind in ("sign", "threshold"):
        return 1.0
    if operation.kind == "quantize":
        return float(operation.attributes["scale"])
    return _integer_scale(builder, inputs[0]) if operation.kind in COMMUTING else None


def threshold(conv: Operation, input_scale: float) -> Operation:
    """Return a convolution of integers with this scale, and the sign after it, as one operation."""
    assert conv.weight is not None and conv.scale is not None
    outputs = len(conv.weight)
    scale = np.broadcast_to(conv.scale.astype(np.float64), outputs) * input_scale
    bias = np.zeros(outputs) if conv.bias is None else conv.bias.astype(np.float64)
    bias = bias * scale if conv.bias is not None and conv.bias.dtype == np.int32 else bias
    negated = scale < 0
    factor = max(1, int(np.gcd.reduce(np.abs(conv.weight), axis=None)))  # weights of few bits are multiples in int8
    weight, scale = conv.weight // factor, scale * factor
    weight[negated] *= -1
    unreachable = np.abs(weight).reshape(outputs, -1).sum(1).astype(np.float64) * 256 + 1  # for 8-bit inputs
    with np.errstate(divide="ignore", invalid="ignore"):
        least = np.ceil(-bias / np.abs(scale))
    least = np.where(scale == 0, np.where(bias >= 0, -np.inf, np.inf), least)
    limits = np.clip(least, -unreachable, unreachable).astype(np.int32)
    return Operation("threshold", [], conv.attributes, weight, limits=limits)
