"""ONNX models of a single layer, in float and in integers as the exporter writes them, to be timed alone."""

import math
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from micronet.compression.layers import Shape

# float; int8 from integers to integers, as inside a quantized network; and each between layers of the other kind.
Form = Literal["float", "int8", "float alone", "int8 alone"]
OPSET, IR = 21, 10
SCALE, ZERO = 0.05, 128


def make_layer(
    shape: Shape, form: Form, batch: int, bits: int = 8, layers: int = 1, terms: int = 1
) -> tuple[onnx.ModelProto, NDArray[np.generic]]:
    """Return a model of one layer with random weights, and an input for it.

    Args:
        shape: The layer's shape.
        form: In which form it computes.
        batch: The number of samples in the input.
        bits: Bits per weight of a form in integers.
        layers: How many such layers, with weights of their own, read the input.
        terms: How many results are added: that of each layer, and the last one's again.
    """
    graph, integers, takes_integers = _Graph(), form.startswith("int8"), form in ("int8", "float alone")
    inner = graph.dequantized("x", "a") if takes_integers else graph.quantized("x", "a") if integers else "x"
    made = result = ""
    for term in range(terms):
        if term < layers:
            made = graph.layer(shape, inner, graph.weight(shape, bits if integers else 0, term), f"layer{term}")
            made = made if form == "float" else graph.quantized(made, f"{made}_dequantized")
        if term:
            total = graph.add("Add", [result, made], f"sum{term}")
            result = total if form == "float" else graph.quantized(total, f"{total}_dequantized")
        else:
            result = made
    if takes_integers:
        result = graph.nodes.pop().input[0]
    linear = shape.kind == "Linear"
    given = (batch, *shape.sizes, shape.inputs) if linear else (batch, shape.inputs, *shape.sizes)
    rank = len(given)
    kind = TensorProto.UINT8 if takes_integers else TensorProto.FLOAT
    made = helper.make_graph(
        graph.nodes, "layer", [helper.make_tensor_value_info("x", kind, given)],
        [helper.make_tensor_value_info(result, kind, [None] * rank)], graph.stored,
    )  # fmt: skip
    x = np.random.default_rng(0).random(given, dtype=np.float32)
    sample = (255 * x).astype(np.uint8) if takes_integers else x
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR), sample


class _Graph:
    """The nodes and stored tensors of a model under construction."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.stored: list[onnx.TensorProto] = []

    def add(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """Add a node; return the name of its output."""
        self.nodes.append(helper.make_node(kind, inputs, [output], name=f"{kind}_{output}", **attributes))
        return output

    def store(self, name: str, values: NDArray[np.generic]) -> str:
        """Store a tensor."""
        self.stored.append(numpy_helper.from_array(values, name))
        return name

    def grid(self, name: str) -> list[str]:
        """Store the scale and the zero point of an activation, for one node."""
        scale = self.store(f"{name}_scale", np.array(SCALE, np.float32))
        return [scale, self.store(f"{name}_zero", np.array(ZERO, np.uint8))]

    def dequantized(self, value: str, name: str) -> str:
        """Add a DequantizeLinear."""
        return self.add("DequantizeLinear", [value, *self.grid(f"{name}_in")], name)

    def quantized(self, value: str, name: str) -> str:
        """Add a QuantizeLinear and a DequantizeLinear."""
        self.add("QuantizeLinear", [value, *self.grid(f"{name}_q")], f"{name}_integers")
        return self.dequantized(f"{name}_integers", name)

    def layer(self, shape: Shape, inner: str, weight: str, output: str) -> str:
        """Add a layer."""
        if shape.kind == "Linear":
            return self.add("Gemm" if not shape.sizes else "MatMul", [inner, weight], output)
        return self.add(
            shape.kind, [inner, weight], output, group=shape.groups, kernel_shape=shape.kernel, strides=shape.stride,
            dilations=shape.dilation, pads=[*shape.padding, *shape.padding],
        )  # fmt: skip

    def weight(self, shape: Shape, bits: int, seed: int) -> str:
        """Store a weight, as integers with a scale for each output channel if ``bits`` are given."""
        name = f"weight{seed}"
        sizes: tuple[int, ...]
        if shape.kind == "Linear":
            sizes, axis, channels = (shape.inputs, shape.outputs), 1, shape.outputs
        elif shape.kind == "ConvTranspose":
            sizes, axis, channels = (shape.inputs, shape.outputs // shape.groups, *shape.kernel), 1, 1
        else:
            sizes, axis, channels = (shape.outputs, shape.inputs // shape.groups, *shape.kernel), 0, shape.outputs
        values = np.random.default_rng(1 + seed).standard_normal(math.prod(sizes)).astype(np.float32).reshape(sizes)
        if not bits:
            return self.store(name, values * np.float32(0.05))
        largest = 2 ** (bits - 1) - 1
        integers = (values / 4 * largest).round().clip(-largest, largest).astype(np.int8)
        self.store(f"{name}_integers", integers)
        per_channel = shape.kind != "ConvTranspose"
        scale = np.full(channels, SCALE, np.float32) if per_channel else np.array(SCALE, np.float32)
        self.store(f"{name}_scale", scale)
        self.store(f"{name}_zero", np.zeros_like(scale, np.int8))
        inputs = [f"{name}_integers", f"{name}_scale", f"{name}_zero"]
        return self.add("DequantizeLinear", inputs, name, **({"axis": axis} if per_channel else {}))
