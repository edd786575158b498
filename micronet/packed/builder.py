"""A packed program under construction: operations by the name of the ONNX value that each computes."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from micronet.onnx.ops import LINE
from micronet.packed.program import Operation


class Unsupported(Exception):
    """The packed runtime cannot run a node, and why: it follows the names of the layers that it concerns."""


class ProgramBuilder:
    """The operations made of an ONNX graph so far; each comes after its inputs.

    image, inputs: the names of the first input and of all. outputs: those of the values that the network returns.
    constants: the graph's initializers. operations: name -> operation and its inputs' names. aliases: name -> another
    name of the same value. shapes: of values, without the batch; 0 is unknown. dequantized: integer weights and scales;
    axes: those to which several scales belong.
    """

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.graph = proto.graph
        self.constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
        self.inputs = [entry.name for entry in proto.graph.input if entry.name not in self.constants]
        self.image = self.inputs[0] if self.inputs else ""
        self.outputs: list[str] = []
        self.operations: dict[str, tuple[Operation, list[str]]] = {}
        self.aliases: dict[str, str] = {}
        inferred = _with_shapes(proto).graph
        self.shapes = {
            info.name: [dim.dim_value for dim in info.type.tensor_type.shape.dim][1:]
            for info in [*inferred.output, *inferred.value_info, *inferred.input]
            if info.type.tensor_type.HasField("shape")
        }
        self.dequantized: dict[str, tuple[NDArray[Any], NDArray[np.float32]]] = {}
        self.axes: dict[str, int] = {}

    def resolve(self, value: str) -> str:
        """Return the operation or input that a name stands for."""
        while value in self.aliases:
            value = self.aliases[value]
        return value

    def add(self, node: onnx.NodeProto, kind: str, *inputs: str, **parts: Any) -> str:
        """Add an operation that computes a node's output, by default of the node's first input; return its name.

        ``parts``: ``attributes`` (None: default), ``weight``, …, and ``output``: another name than the node's output.
        """
        output = parts.pop("output", node.output[0])
        attributes = {key: value for key, value in parts.pop("attributes", {}).items() if value is not None}
        operation = Operation(kind, [], attributes, name=layer_name(node), line=line_of(node), **parts)
        self.operations[output] = operation, [self.resolve(item) for item in inputs or node.input[:1]]
        return str(output)

    def readers(self, name: str) -> list[str]:
        """Return the operations that read the named value, once per input, and "" for each output of the network."""
        found = [reader for reader, (_, inputs) in self.operations.items() for each in inputs if each == name]
        return found + [""] * self.outputs.count(name)

    def channels(self, value: str) -> int:
        """Return the number of a value's channels, or 0 if it is unknown, or if the value has none."""
        return next(iter(self.shapes.get(value, [])), 0)

    def image_shape(self, value: str) -> list[int]:
        """Return (C, H, W) of a feature map. Raises Unsupported if its size is unknown, or if it is none."""
        shape = self.shapes.get(value, [])
        if len(shape) != 3 or 0 in shape:
            raise Unsupported("only feature maps (N, C, H, W) of a known size are supported")
        return shape

    def constant(self, value: str) -> NDArray[np.float32] | None:
        """Return a constant as floats, or None if the value is computed."""
        if value not in self.constants and value not in self.dequantized:
            return None
        weight, scale = self.weight(value)
        if scale is None:
            return weight
        shape = [-1 if axis == self.axes[value] and scale.size > 1 else 1 for axis in range(weight.ndim)]
        return weight.astype(np.float32) * scale.reshape(shape)

    def compute(self, node: onnx.NodeProto) -> bool:
        """Make the output of a node with constant inputs a constant; return False if one of them is computed."""
        known = {name: self.constants.get(name, self.constant(name)) for name in node.input if name}
        if any(value is None for value in known.values()):
            return False
        values: Any = ReferenceEvaluator(node).run(None, known)
        self.constants.update(zip(node.output, values, strict=True))
        return True

    def weight(self, value: str) -> tuple[NDArray[Any], NDArray[np.float32] | None]:
        """Return a constant as integers and their scale, or as float32 and None."""
        if value in self.constants:
            return self.constants[value].astype(np.float32), None
        if value in self.dequantized:
            return self.dequantized[value]
        raise Unsupported(f"only constant weights are supported, and {value} is not a constant")


def _with_shapes(proto: onnx.ModelProto) -> onnx.ModelProto:
    try:
        return onnx.shape_inference.infer_shapes(proto, data_prop=True)
    except (
        onnx.shape_inference.InferenceError
    ):  # it miscounts some windows with ceil_mode; the exporter noted the shapes
        return proto


def layer_name(node: onnx.NodeProto) -> str:
    """Return the name of the layer that a node belongs to, or the node's own."""
    return re.sub(rf"\.{node.op_type}(\.\d+)?$", "", node.name or node.output[0])


def line_of(node: onnx.NodeProto) -> str:
    """Return which line of the user's code made a node, or ""; see ``ops.LINE``."""
    return next((entry.value for entry in node.metadata_props if entry.key == LINE), "")


Converter = Callable[[ProgramBuilder, onnx.NodeProto], None]


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    """Return a node's attributes."""
    return {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}


def window_of(given: dict[str, Any]) -> dict[str, Any]:
    """Return the stride and the pads of a convolution or pool; None for defaults."""
    pads = unless_default(given.get("pads"), [0, 0, 0, 0])
    return {"stride": unless_default(given.get("strides"), [1, 1]), "pads": pads}


def unless_default(values: Any, default: list[int]) -> list[int] | None:
    """Return values as a list, or None if they are missing or the default ones."""
    found = default if values is None else list(values)
    return None if found == default else found
