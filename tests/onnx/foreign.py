"""Small float ONNX networks with what other people's files contain."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


class Net:
    """Builds a graph: arrays among a node's inputs are stored, and every node returns its output's name."""

    def __init__(self, opset=17):
        self.nodes, self.stored, self.opset = [], [], opset
        self.random = np.random.default_rng(0)

    def __call__(self, op, *inputs, outputs=1, **attributes):
        names = []
        for given in inputs:
            if not isinstance(given, str):
                self.stored.append(numpy_helper.from_array(np.asarray(given), f"stored_{len(self.stored)}"))
                given = self.stored[-1].name
            names.append(given)
        made = [f"t{len(self.nodes)}_{index}" for index in range(outputs)]
        self.nodes.append(helper.make_node(op, names, made, **attributes))
        return made[0] if outputs == 1 else made

    def weight(self, *shape):
        return self.random.standard_normal(shape, dtype=np.float32) / np.float32(np.sqrt(np.prod(shape[1:])))

    def conv(self, x, inputs, outputs, side=3, **attributes):
        w, b = self.weight(outputs, inputs // attributes.get("group", 1), side, side), self.weight(outputs, 1)[:, 0]
        return self("Conv", x, w, b, pads=[side // 2] * 4, **attributes)

    def model(self, inputs, outputs):
        """Return the model; ``inputs``: name -> (type, shape), ``outputs``: name -> rank."""
        entries = [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()]
        results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * rank)
                   for name, rank in outputs.items()]  # fmt: skip
        graph = helper.make_graph(self.nodes, "net", entries, results, self.stored)
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)
        onnx.checker.check_model(proto)
        return proto


IMAGE = {"x": (TensorProto.FLOAT, ["n", 3, 16, 16])}
F32 = np.float32


def _yolo():
    """SiLU, a residual join, and a head that decodes boxes with shape arithmetic on int64 tensors."""
    net = Net()
    a = net.conv("x", 3, 16)
    a = net("Mul", a, net("Sigmoid", a))
    left, right = net("Split", a, np.array([8, 8]), outputs=2, axis=1)
    b = net.conv(right, 8, 8)
    b = net("Add", net("Mul", b, net("Sigmoid", b)), right)
    c = net("Concat", left, b, axis=1)
    up = net("Resize", net("MaxPool", c, kernel_shape=[2, 2], strides=[2, 2]), "", np.array([1, 1, 2, 2], F32),
             mode="nearest")  # fmt: skip
    head = net.conv(up, 16, 6, 1)
    shape = net("Shape", head)
    cells = net("Mul", net("Gather", shape, np.array(2)), net("Gather", shape, np.array(3)))
    size = net("Concat", net("Gather", shape, np.array([0])), np.array([6]), net("Unsqueeze", cells, np.array([0])),
               axis=0)  # fmt: skip
    flat = net("Reshape", head, size)
    boxes, scores = net("Split", flat, np.array([4, 2]), outputs=2, axis=1)
    decoded = net("Concat", net("Mul", boxes, np.full(1, 160, F32)), net("Sigmoid", scores), axis=1)
    return net.model(IMAGE, {decoded: 3})


def _attention():
    """Two inputs, one of them a mask that turns into -inf; matrix products of tokens."""
    net = Net()
    q, k, v = (net("MatMul", "tokens", net.weight(32, 32)) for _ in range(3))
    scores = net("MatMul", q, net("Transpose", k, perm=[0, 2, 1]))
    masked = net("Add", scores, net("Where", "mask", np.array(0, F32), np.array(-np.inf, F32)))
    mixed = net("MatMul", net("Softmax", masked, axis=-1), v)
    hidden = net("Relu", net("Gemm", net("Reshape", mixed, np.array([-1, 32])), net.weight(64, 32), transB=1))
    out = net("Gemm", hidden, net.weight(64, 8), np.ones(8, F32))
    inputs = {"tokens": (TensorProto.FLOAT, ["n", 6, 32]), "mask": (TensorProto.BOOL, ["n", 1, 6])}
    return net.model(inputs, {out: 2, masked: 3})


def _mobile():
    """HardSwish, HardSigmoid gates, Clip with inputs, and the same functions spelled out."""
    net = Net()
    a = net("HardSwish", net.conv("x", 3, 16))
    b = net("Clip", net.conv(a, 16, 16, group=16), np.array(0, F32), np.array(6, F32))
    gate = net("HardSigmoid", net.conv(net("GlobalAveragePool", b), 16, 16, 1), alpha=1 / 6)
    c = net.conv(net("Mul", b, gate), 16, 16, 1)
    spelled = net("Clip", net("Add", c, np.array(3, F32)), np.array(0, F32), np.array(6, F32))
    d = net("Div", net("Mul", c, spelled), np.array(6, F32))
    e = net.conv(net("Add", d, a), 16, 8, 1)
    mean = net("ReduceMean", net("Relu", e), axes=[2, 3], keepdims=1)
    return net.model(IMAGE, {net("Gemm", net("Flatten", mean), net.weight(8, 4), np.zeros(4, F32)): 2})


def _channels_last():
    net = Net()
    a = net("Relu", net.conv(net("Transpose", "x", perm=[0, 3, 1, 2]), 3, 16))
    b = net.conv(net("AveragePool", a, kernel_shape=[2, 2], strides=[2, 2]), 16, 8)
    return net.model({"x": (TensorProto.FLOAT, ["n", 16, 16, 3])}, {net("Transpose", b, perm=[0, 2, 3, 1]): 4})


def _unet():
    """A transposed convolution, a linear resize, and two outputs, one of which the network goes on to read."""
    net = Net()
    a = net("Relu", net.conv("x", 3, 16))
    b = net("LeakyRelu", net.conv(a, 16, 16, strides=[2, 2]), alpha=0.1)
    up = net("ConvTranspose", b, net.weight(16, 16, 2, 2), strides=[2, 2])
    wide = net("Resize", b, "", np.array([1, 1, 2, 2], F32), mode="linear")
    c = net.conv(net("Concat", a, up, wide, axis=1), 48, 8)
    return net.model(IMAGE, {net("Sigmoid", net.conv(c, 8, 1, 1)): 4, c: 4})


def _audio():
    """One-dimensional convolutions, an LSTM, and a scalar int64 input."""
    net = Net()
    picked = net("Cast", net("Equal", "rate", np.array(16000)), to=TensorProto.FLOAT)
    w, b = net.weight(32, 1, 5), np.zeros(32, F32)
    a = net("Relu", net("Conv", net("Mul", "wave", picked), w, b, pads=[2, 2], strides=[2]))
    a = net("Relu", net("Conv", a, net.weight(16, 32, 3), np.zeros(16, F32), pads=[1, 1]))
    states = net("LSTM", net("Transpose", a, perm=[2, 0, 1]), net.weight(1, 128, 16), net.weight(1, 128, 32),
                 outputs=2, hidden_size=32)[1]  # fmt: skip
    wave = (TensorProto.FLOAT, [1, 1, 64])
    return net.model({"wave": wave, "rate": (TensorProto.INT64, [])}, {net("MatMul", states, net.weight(32, 3)): 3})


NETWORKS = {
    "yolo": _yolo, "attention": _attention, "mobile": _mobile, "channels-last": _channels_last, "unet": _unet,
    "audio": _audio,
}  # fmt: skip


def inputs_for(proto, runs=4):
    """Return random inputs for a few runs."""
    random = np.random.default_rng(1)
    feeds = []
    for _ in range(runs):
        feed = {}
        for entry in proto.graph.input:
            shape = [dim.dim_value or 2 for dim in entry.type.tensor_type.shape.dim]
            kind = entry.type.tensor_type.elem_type
            if kind == TensorProto.BOOL:
                feed[entry.name] = np.arange(np.prod(shape)).reshape(shape) % 6 < 4
            elif kind == TensorProto.INT64:
                feed[entry.name] = np.full(shape, 16000)
            else:
                feed[entry.name] = random.standard_normal(shape, dtype=np.float32)
        feeds.append(feed)
    return feeds
