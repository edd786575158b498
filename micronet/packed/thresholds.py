"""Signs without floats: where they lie, and the integer thresholds that stand for scales, biases and batch norms.

A sign is moved in front of pools and shuffles, with which it commutes. A convolution of integers with a sign behind it
becomes sums and thresholds: with y = s * sum + b, y >= 0 is sum >= -b / s, and where s is negative the filter's sign is
flipped first.
"""

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from micronet.packed.program import Operation

PASSING = ("max_pool", "shuffle")  # a sign commutes with them: it never falls


class Draft:
    """Operations by the name of the value that each gives, in order."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.graph = proto.graph
        self.stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
        self.steps: dict[str, tuple[Operation, list[str]]] = {}
        self.alias: dict[str, str] = {}  # a value that is another: dequantized integers, identities
        self.nodes = {name: node for node in proto.graph.node for name in node.output}
        inferred = onnx.shape_inference.infer_shapes(proto).graph
        self.sides = {  # of a value, without its batch; 0: unknown
            info.name: [dim.dim_value for dim in info.type.tensor_type.shape.dim][1:]
            for info in [*inferred.input, *inferred.value_info, *inferred.output]
        }
        self.weights: dict[str, tuple[NDArray[Any], NDArray[np.float32] | None]] = {}

    def name(self, value: str) -> str:
        """Return the operation or input that a value is another name of."""
        while value in self.alias:
            value = self.alias[value]
        return value

    def add(self, node: onnx.NodeProto, kind: str, inputs: list[str], **parts: Any) -> None:
        """Let an operation give a node's output; ``at``: its attributes, ``weight``, ``scale``, ``bias``."""
        at = {key: value for key, value in parts.pop("at", {}).items() if value is not None}
        self.steps[node.output[0]] = Operation(kind, [], at, **parts), [self.name(item) for item in inputs]


def _readers(draft: Draft, name: str) -> int:
    return sum(inputs.count(name) for _, inputs in draft.steps.values())


def move_signs(draft: Draft) -> None:
    """Put signs in front of the pools and shuffles that feed them alone."""
    for name in [name for name, (operation, _) in draft.steps.items() if operation.kind == "sign"]:
        while True:
            sign, (source,) = draft.steps[name]
            before = draft.steps.get(source)
            if before is None or before[0].kind not in PASSING or _readers(draft, source) > 1:
                break
            passing, (origin,) = before
            draft.steps[source] = sign, [origin]  # the two change places, and with them their values
            draft.steps[name] = passing, [source]
            name = source


def fuse_thresholds(draft: Draft, output: str) -> None:
    """Make one operation of a convolution of integers and the sign that alone reads it."""
    for name, (operation, inputs) in list(draft.steps.items()):
        if operation.kind != "sign" or name not in draft.steps:
            continue
        source = inputs[0]
        conv, origin = draft.steps.get(source, (operation, []))
        scale = _grid(draft, origin[0]) if origin else None
        if conv.kind != "conv" or scale is None or _readers(draft, source) > 1 or source == output:
            continue
        if conv.weight is None or conv.weight.dtype.kind != "i" or conv.scale is None:
            continue
        draft.steps[name] = threshold(conv, scale), origin
        del draft.steps[source]


def _grid(draft: Draft, name: str) -> float | None:
    """Return the scale of integers that a value is, None for one in float."""
    operation, inputs = draft.steps.get(name, (None, []))
    if operation is None:
        return None
    if operation.kind in ("sign", "threshold"):
        return 1.0
    if operation.kind == "quantize":
        return float(operation.attributes["scale"])
    return _grid(draft, inputs[0]) if operation.kind in PASSING else None


def threshold(conv: Operation, input_scale: float) -> Operation:
    """Return a convolution of integers of some scale and the sign behind it as one operation."""
    assert conv.weight is not None and conv.scale is not None
    outs = len(conv.weight)
    scale = np.broadcast_to(conv.scale.astype(np.float64), outs) * input_scale
    bias = np.zeros(outs) if conv.bias is None else conv.bias.astype(np.float64)
    bias = bias * scale if conv.bias is not None and conv.bias.dtype == np.int32 else bias
    flipped = scale < 0
    unit = max(1, int(np.gcd.reduce(np.abs(conv.weight), axis=None)))  # few bits lie widely in int8
    weight, scale = conv.weight // unit, scale * unit
    weight[flipped] *= -1
    beyond = np.abs(weight).reshape(outs, -1).sum(1).astype(np.float64) * 256 + 1  # more than any sum of 8-bit numbers
    with np.errstate(divide="ignore", invalid="ignore"):
        least = np.ceil(-bias / np.abs(scale))
    least = np.where(scale == 0, np.where(bias >= 0, -np.inf, np.inf), least)
    limits = np.clip(least, -beyond, beyond).astype(np.int32)
    return Operation("threshold", [], conv.attributes, weight, limits=limits)
