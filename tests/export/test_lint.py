"""Every rule of the linter finds the graph that breaks it and leaves one that does not; ONNX Runtime confirms it."""

import platform

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from micronet.export.graph_view import GraphView
from micronet.export.lint import RULES, fused, lint
from micronet.runtime.ort import EXACT_INT8

WIDTH = 16
x86_only = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="ONNX Runtime's x86 kernels")


class Graph:
    """A graph on the image ``x`` (1, 16, 8, 8), put together tensor by tensor; every method returns a tensor's name."""

    def __init__(self):
        self.nodes, self.stored = [], []

    def put(self, values):
        name = f"stored{len(self.stored)}"
        self.stored.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def op(self, kind, *inputs, **attributes):
        name = f"{kind}{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name, **attributes))
        return name

    def grid(self, x, kind=np.uint8, zero_point=0, scale=0.02):
        scale = self.put(np.float32(scale))
        axis = {"axis": 1} if self.stored[-1].dims else {}
        points = [self.put(np.full(self.stored[-1].dims, zero_point, kind)) for _ in range(2)]
        self.stored[-1].name = points[1] = f"{points[1]}.own"
        return self.op(
            "DequantizeLinear", self.op("QuantizeLinear", x, scale, points[0], **axis), scale, points[1], **axis
        )

    def weight(self, outputs=WIDTH, inputs=WIDTH, kind=np.int8, top=60, point=None):
        q = np.full((outputs, inputs, 1, 1), top, kind)
        point = point or self.put(np.zeros(outputs, kind))
        return self.op("DequantizeLinear", self.put(q), self.put(np.full(outputs, 0.01, np.float32)), point, axis=0)

    def conv(self, x, *more, weight=None):
        return self.op("Conv", x, weight or self.weight(), *more)

    def gemm(self, x):
        q = self.op("DequantizeLinear", self.put(np.ones((WIDTH * 64, WIDTH), np.int8)), self.put(np.float32(0.01)))
        return self.op("Gemm", x, q)

    def model(self, output):
        graph = helper.make_graph(
            self.nodes,
            "graph",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, WIDTH, 8, 8])],
            [helper.make_empty_tensor_value_info(output)],
            self.stored,
        )
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        return onnx.shape_inference.infer_shapes(proto)


def chain(kind=np.uint8, zero_point=0, between=("Relu",), first_scale=0.02, **weight):
    """Return two quantized convolutions with something between each and the grid behind it."""
    g = Graph()
    x = g.grid("x", kind, zero_point, first_scale)
    for _ in range(2):
        x = g.conv(x, weight=g.weight(**weight))
        for op in between:
            x = g.op(op, x)
        x = g.grid(x, kind, zero_point)
    return g.model(x)


def joined(op, both, **attributes):
    g = Graph()
    x = g.grid("x")
    left, right = g.grid(g.conv(x)), g.conv(x)
    return g.model(g.grid(g.op(op, left, g.grid(right) if both else right, **attributes)))


def clipped(high):
    g = Graph()
    y = g.op("Clip", g.conv(g.grid("x")), g.put(np.float32(0)), g.put(np.float32(high)))
    return g.model(g.grid(y))  # whose largest value is 255 * 0.02 = 5.1


def residual_relu(zero_point):
    g = Graph()
    x = g.grid("x")
    return g.model(g.grid(g.op("Relu", g.op("Add", g.grid(g.conv(x)), g.grid(g.conv(x)))), zero_point=zero_point))


def unquantized_output(behind):
    g = Graph()
    y = g.conv(g.grid("x"))
    return g.model(g.grid(g.op("Sigmoid", g.grid(y) if behind else y)))


def moved(op, *shape, kind=np.int8, behind=False, **attributes):
    g = Graph()
    y = g.op(op, g.grid(g.conv(g.grid("x", kind)), kind), *map(g.put, shape), **attributes)
    return g.model(g.grid(y, kind) if behind else y)


def flattened(op, *shape, behind=False):
    g = Graph()
    y = g.op(op, g.grid(g.conv(g.grid("x"))), *map(g.put, shape))
    return g.model(g.gemm(g.grid(y) if behind else y))


def widths(*widths, grids=True):
    g, x = Graph(), "x"
    for inputs, outputs in zip((WIDTH, *widths[:-1]), widths, strict=True):
        x = g.grid(x) if grids else x
        weight = g.weight(outputs, inputs) if grids else g.put(np.ones((outputs, inputs, 1, 1), np.float32))
        x = g.conv(x, weight=weight)
    return g.model(g.grid(x) if grids else x)


def float_weight(integers):
    g = Graph()
    w = g.weight() if integers else g.put(np.ones((WIDTH, WIDTH, 1, 1), np.float32))
    return g.model(g.grid(g.conv(g.grid("x"), weight=w)))


def transposed(grids):
    g = Graph()
    w = g.weight() if grids else g.put(np.ones((WIDTH, WIDTH, 1, 1), np.float32))
    return g.model(g.op("ConvTranspose", g.grid("x") if grids else "x", w))


def float_activation(grids):
    g = Graph()
    return g.model(g.grid(g.conv(g.grid("x") if grids else "x")))


def four_bits():
    g = Graph()
    q, point = (helper.make_tensor(name, TensorProto.INT4, dims, np.ones(dims, int).ravel() * value)
                for name, dims, value in (("q", (WIDTH, WIDTH, 1, 1), 3), ("point", (), 0)))  # fmt: skip
    g.stored += [q, point]
    return g.model(g.grid(g.conv(g.grid("x"), weight=g.op("DequantizeLinear", "q", g.put(np.float32(1)), "point"))))


def two_weights(shared=False, top=127):
    g = Graph()
    point = g.put(np.zeros(WIDTH, np.int8)) if shared else None
    x = g.grid("x")
    for _ in range(2):
        x = g.grid(g.conv(x, weight=g.weight(top=top, point=point)))
    return g.model(x)


def two_readers_of_one_weight():
    g = Graph()
    w = g.weight(top=127)
    return g.model(g.grid(g.conv(g.grid(g.conv(g.grid("x"), weight=w)), weight=w)))


def stored_in_float():
    g = Graph()
    w = g.grid(g.put(np.ones((WIDTH, WIDTH, 1, 1), np.float32)), np.int8)
    return g.model(g.grid(g.conv(g.grid("x"), weight=w)))


def with_bias(integers):
    g = Graph()
    bias = g.put(np.ones(WIDTH, np.int32 if integers else np.float32))
    if integers:
        bias = g.op("DequantizeLinear", bias, g.put(np.full(WIDTH, 2e-4, np.float32)), axis=0)
    return g.model(g.grid(g.conv(g.grid("x", np.int8), bias), np.int8))


def foreign(domain):
    g = Graph()
    return g.model(g.op("Relu", "x", domain=domain))


SIGNED_CHAIN = chain(np.int8, between=())
GOOD = chain()
# rule, target, severity, what breaks it, what does not
CASES = [
    ("mixed-inputs", "ort", "warning", joined("Add", False), joined("Add", True)),
    ("mixed-inputs", "ort", "warning", joined("Concat", False, axis=1), joined("Concat", True, axis=1)),
    ("kept-activation", "ort", "warning", chain(zero_point=128), GOOD),
    ("kept-activation", "ort", "warning", chain(np.int8), chain(np.int8, -128)),
    ("kept-activation", "ort", "warning", residual_relu(128), residual_relu(0)),
    ("kept-activation", "ort", "warning", clipped(5.0), clipped(6.0)),
    ("float-output", "ort", "warning", unquantized_output(False), unquantized_output(True)),
    ("signed-activations", "ort", "warning", SIGNED_CHAIN, GOOD),
    ("unsigned-integers", "tensorrt", "error", GOOD, SIGNED_CHAIN),
    (
        "unsigned-integers",
        "tensorrt",
        "error",
        chain(np.int8, kind_of_weights := 0, between=())
        if False
        else chain(np.int8, between=(), top=3, **{"kind": np.uint8})
        if False
        else GOOD,
        SIGNED_CHAIN,
    ),
]
