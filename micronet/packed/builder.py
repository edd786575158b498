"""A packed program under construction: operations by the name of the ONNX value that each computes."""

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from micronet.errors import MicronetError
from micronet.packed.program import Operation


class ProgramBuilder:
    """The operations made of an ONNX graph so far, in order.

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

    def add(self, node: onnx.NodeProto, kind: str, inputs: list[str], **parts: Any) -> None:
        """Add an operation that computes a node's output. ``parts``: ``attributes`` (None: default), ``weight``, ..."""
        attributes = {key: value for key, value in parts.pop("attributes", {}).items() if value is not None}
        operation = Operation(kind, [], attributes, **parts)
        self.operations[node.output[0]] = operation, [self.resolve(item) for item in inputs]

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
            f"{value} is not a constant, but the packed runtime only has constant weights; use the ONNX file instead"
        )
