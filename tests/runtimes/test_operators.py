"""Every operator computes what ONNX defines; compiled kernels and numpy give the same bits, of floats and of integers.

The reference is ONNX Runtime without optimizations. Values that are only moved are equal. Those that are computed
differ by the rounding of a few float32 steps on values below 8: at most 1e-6.
"""

import numpy as np
import onnx
import onnxruntime
import pytest

from micronet.packed.file_format import read, to_bytes
from micronet.packed.from_onnx import pack_model
from micronet.runtimes.packed.numpy_backend import run

pytest.importorskip("numba", reason="pip install numba")

from micronet.runtimes.packed.compiled_backend import CompiledNetwork

ROWS, COLUMNS = 9, 7
ELEMENTWISE = [
    "out = HardSwish (x)", "out = HardSigmoid <alpha = 0.3, beta = 0.4> (x)", "out = Sigmoid (x)", "out = Tanh (x)",
    "y = Sigmoid (x) out = Mul (x, y)", "y = HardSigmoid (x) out = Mul (y, x)", "out = Gelu (x)", "out = Mish (x)",
    'out = Gelu <approximate = "tanh"> (x)', "out = Elu <alpha = 0.5> (x)", "out = LeakyRelu (x)",
    "out = PRelu (x, slopes)", "y = Relu (x) out = Sub (y, x)", "out = Sub (two, x)", "out = Div (x, two)",
    "y = Tanh (x) z = HardSwish (y) out = Clip (z, low, high)", "y = Add (slopes, x) out = HardSigmoid (y)",
    "y = GlobalAveragePool (x) z = HardSigmoid (y) out = Mul (z, x)", "out = Mul (two, x)",
    "k = QuantizeLinear (two, s, zero) y = DequantizeLinear (k, s, zero) out = Mul (y, x)",
    "y = Sigmoid (two) out = Mul (x, y)", "y = Sigmoid (x) out = Add (x, y)",
]  # fmt: skip
POOLS = [
    f"out = {kind} <kernel_shape = [{ky}, {kx}], strides = [{sy}, {sx}], pads = [{pads}], ceil_mode = {ceil}{more}> (x)"
    for kind, more in (("MaxPool", ""), ("AveragePool", ""), ("AveragePool", ", count_include_pad = 1"))
    for ky, kx, sy, sx, pads, ceil in (
        (3, 3, 2, 2, "0, 0, 0, 0", 1), (3, 2, 2, 2, "1, 0, 1, 1", 1), (2, 3, 2, 1, "0, 1, 1, 0", 0),
        (2, 2, 3, 3, "0, 0, 0, 0", 1),
    )
]  # fmt: skip
SIZES = {"factors": "up", "shrink": "down", "odd": "uneven"}
RESIZES = [
    f'out = Resize <mode = "{mode}", coordinate_transformation_mode = "{at}", nearest_mode = "{near}"> (x, , {scales})'
    for mode, at, near in (
        ("nearest", "asymmetric", "floor"), ("nearest", "half_pixel", "round_prefer_ceil"),
        ("nearest", "half_pixel", "round_prefer_floor"), ("linear", "half_pixel", "floor"),
        ("linear", "align_corners", "floor"), ("linear", "pytorch_half_pixel", "floor"),
        ("linear", "asymmetric", "floor"),
    )
    for scales in SIZES.values()
]  # fmt: skip
MOVES = [
    'out = DepthToSpace <blocksize = 2, mode = "CRD"> (x)', "out = DepthToSpace <blocksize = 2> (x)",
    "out = Slice (x, begin, end, axes)", "out = Slice (x, begin, end, axes, steps)", "out = Pad (x, amounts)",
    "y, z = Split <axis = 1> (x, parts) out = Concat <axis = 1> (z, x, y)", "out = GlobalMaxPool (x)",
    "y = Relu (x) z = Concat <axis = 1> (x, y) out = Relu (z)",
    "y = GlobalMaxPool (x) z = Flatten (y) w = Unsqueeze (z, sides) out = Add (w, x)",
    "y = GlobalMaxPool (x) z = Squeeze (y, sides) out = Unsqueeze (z, sides)",
    "y = GlobalMaxPool (x) z = Flatten (y) out = Reshape (z, pixel)", "y = GlobalMaxPool (x) out = Expand (y, map)",
    "y = Slice (x, none, one, last) out = Expand (y, map)",
    "y = MaxPool <kernel_shape = [2, 2]> (x) out = Sigmoid (y)",
]  # fmt: skip
LAYERS = [
    f"out = ConvTranspose <kernel_shape = [{size}, {size}], strides = [{stride}, {stride}], pads = [{pads}], "
    f"group = {group}, dilations = [{dilation}, {dilation}], output_padding = [{more}, {more}]> "
    f"(x, w{size}g{group}, b{group})"
    for size, stride, pads, group, dilation, more in (
        (2, 2, "0, 0, 0, 0", 1, 1, 0), (3, 2, "1, 1, 1, 1", 1, 1, 1), (4, 2, "1, 1, 1, 1", 2, 1, 0),
        (3, 3, "0, 1, 0, 0", 1, 1, 2), (3, 1, "1, 1, 1, 1", 2, 1, 0), (3, 2, "2, 2, 2, 2", 2, 2, 1),
        (1, 2, "0, 0, 0, 0", 1, 1, 1),
    )
]  # fmt: skip


def model(nodes, integers):
    """An ONNX model of an input (N, 8, ROWS, COLUMNS); with integers, they are quantized before and after the nodes."""
    if integers:
        inner = nodes.replace("(x", "(i").replace(" x)", " i)").replace(" x,", " i,").replace("out =", "o =")
        inner = inner.replace("w1g", "v1g").replace("w2g", "v2g").replace("w3g", "v3g").replace("w4g", "v4g")
        nodes = (
            f"q = QuantizeLinear (x, s, zero) i = DequantizeLinear (q, s, zero) {inner} "
            "p = QuantizeLinear (o, t, u) out = DequantizeLinear (p, t, u)"
        )
        for name in [f"v{size}g{group}" for size in range(1, 5) for group in (1, 2)]:
            if name in nodes:
                nodes = f"{name} = DequantizeLinear <axis = 1> ({name}q, scales{name[-1]}) " + nodes
    made = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 22]> '
        f"graph (float[N, 8, {ROWS}, {COLUMNS}] x) => (float[N, C, H, W] out) {{ {nodes} }}"
    )
    for node in made.graph.node:
        node.name = node.output[0]
    rng = np.random.default_rng(0)
    constants = {
        "s": np.float32(0.031), "zero": np.uint8(120), "t": np.float32(0.017), "u": np.int8(-3),
        "low": np.float32(-0.5),
        "high": np.float32(0.75), "two": np.float32(2), "slopes": rng.normal(size=(8, 1, 1)).astype(np.float32),
        "up": [1, 1, 2, 2], "down": [1, 1, 0.6, 0.5], "uneven": [1, 1, 1.7, 2.5], "begin": [1, 2, 0],
        "end": [7, -1, 2**62], "axes": [1, 2, 3], "steps": [1, 2, 3], "parts": [3, 5],
        "sides": [2, 3], "pixel": [-1, 8, 1, 1], "map": [1, 8, ROWS, COLUMNS], "none": [0], "one": [1], "last": [3],
        "amounts": [0, 0, 2, 1, 0, 0, 0, 3], "b1": rng.normal(size=6).astype(np.float32),
        "b2": rng.normal(size=12).astype(np.float32), "scales1": rng.uniform(1e-3, 1e-2, 6).astype(np.float32),
        "scales2": rng.uniform(1e-3, 1e-2, 6).astype(np.float32),
    }  # fmt: skip
    for size in range(1, 5):
        for group in (1, 2):
            constants[f"w{size}g{group}"] = rng.normal(size=(8, 6, size, size)).astype(np.float32) / 8
            constants[f"v{size}g{group}q"] = rng.integers(-127, 127, (8, 6, size, size), np.int8)
    used = {name for node in made.graph.node for name in node.input}
    for name, value in constants.items():
        if name in used:
            floats = isinstance(value, list) and name in SIZES.values()
            array = np.array(value, np.float32 if floats else None)
            made.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return made


def reference(proto, images):
    """What ONNX Runtime computes without optimizations."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": images})


def packed(proto, tmp_path):
    """The program of a model, written and read again."""
    path = tmp_path / "x.packed"
    path.write_bytes(to_bytes(pack_model(proto)))
    return read(path)


@pytest.mark.parametrize("nodes", [*ELEMENTWISE, *POOLS, *RESIZES, *MOVES, *LAYERS])
def test_an_operator_computes_what_onnx_defines(nodes, tmp_path):
    for integers in (False, True):
        proto = model(nodes, integers)
        program = packed(proto, tmp_path)
        images = np.random.default_rng(1).normal(size=(3, 8, ROWS, COLUMNS)).astype(np.float32)
        (expected,) = reference(proto, images)
        ours, network = run(program, images), CompiledNetwork(program, 1)
        if integers:  # a value within rounding of the middle between two levels may round either way
            steps = np.abs(ours - expected) / np.float32(0.017)
            assert steps.max() < 1.01 and (steps > 0.01).mean() < 0.01
        else:
            np.testing.assert_allclose(ours, expected, rtol=0, atol=0 if nodes in MOVES[:-1] else 2e-6)
        for batch in (images, images[:1]):
            found = network(batch)
            if integers or nodes not in LAYERS:  # float sums of products depend on their order
                np.testing.assert_array_equal(found, ours[: len(batch)])
            else:
                np.testing.assert_allclose(found, ours[: len(batch)], rtol=0, atol=2e-6)


def test_a_network_may_return_several_values(tmp_path):
    proto = model("a = Relu (x) b = MaxPool <kernel_shape = [2, 2]> (a) out = GlobalAveragePool (b)", integers=False)
    for name in ("a", "x", "b"):
        proto.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    images = np.random.default_rng(1).normal(size=(11, 8, ROWS, COLUMNS)).astype(np.float32)
    program = packed(proto, tmp_path)
    for found in (run(program, images), CompiledNetwork(program, 1)(images), CompiledNetwork(program, 2)(images)):
        for ours, theirs in zip(found, reference(proto, images), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
