"""What the commands say of one quantized file: the same counts and reasons everywhere, and first what is slow."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from micronet.errors import MicronetError
from micronet.onnx.graph_view import GraphView
from micronet.onnx.integer_words import describe
from micronet.onnx.integers import count_computed, count_integer_layers
from micronet.onnx.metadata import note
from micronet.quantization.calls import COMPUTED_WEIGHT
from micronet.quantization.config import NO_DEFORMABLE, RUN_TIME_WEIGHTS, STORED_FACTOR
from micronet.runtimes.onnx_cost import stored_parameters
from micronet.runtimes.onnxruntime import count_sample_macs
from tests.onnx.foreign import F32, Net


@pytest.fixture
def mixed(tmp_path):
    """A folder with a file of a small convolution, a larger one, an LSTM and a product, and with its inputs."""
    net = Net()
    small = net("Conv", net("Softplus", "x"), net.weight(4, 1, 3), pads=[1, 1])
    wide = net("Conv", net("Softplus", small), net.weight(16, 4, 9), pads=[4, 4])
    states = net("LSTM", net("Transpose", wide, perm=[2, 0, 1]), net.weight(1, 128, 16), net.weight(1, 128, 32),
                 outputs=2, hidden_size=32)[1]  # fmt: skip
    proto = net.model({"x": (TensorProto.FLOAT, ["n", 1, 32])}, {net("MatMul", states, net.weight(32, 3)): 3})
    onnx.save(proto, tmp_path / "a.onnx")
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).standard_normal((6, 1, 32)).astype(F32))
    return tmp_path


def test_every_command_counts_alike_and_gives_the_same_reasons(micronet, mixed):
    options = ("--mode", "ptq", "--calib-data", mixed / "x.npz", "--skip-timing", "-o", mixed / "q.onnx", "--json")
    made = micronet("quantize", mixed / "a.onnx", *options).json
    checked = micronet("check-onnx", mixed / "q.onnx", "--json").json
    compared = count_integer_layers(onnx.load(mixed / "q.onnx"))  # what compare describes
    assert checked["integers"] == {**compared, "words": describe(compared)}
    assert made["integers"].items() >= compared.items() and made["left_float"] == compared["float"]
    assert set(compared["float"].values()) == {"too small to benefit from integer arithmetic", "LSTM has no int8 form"}
    first, *floats = checked["integers"]["words"]
    assert made["integers"]["words"][-3:] == [first, *floats]
    assert first.startswith("1 of 2 convolutions, 1 of 1 linear layer, 0 of 1 recurrent layer and ")
    assert sorted(line.rpartition(": ")[2] for line in floats) == sorted(set(compared["float"].values()))


@pytest.mark.parametrize(("ours", "said"), [(2.0, "slower"), (1.02, "no faster")], ids=["slower", "within_noise"])
def test_a_slower_file_says_so_first_with_the_cause_and_for_one_sample(micronet, mixed, monkeypatch, ours, said):
    def times(_runs, sample):
        assert len(sample["x"]) == 1
        return {"int8_ms": ours, "float_ms": 1.0}

    monkeypatch.setattr("micronet.onnx.speed._times", times)
    shown = micronet("quantize", mixed / "a.onnx", "--mode", "ptq", "--calib-data", mixed / "x.npz")
    first, second, *_ = shown.out.splitlines()
    measured = f"{ours:.2f} ms vs. 1.00 ms"
    assert first.startswith(f"{said} than float: {measured}; these layers run in integer arithmetic, but quant")
    assert second.startswith("wrote ") and f"{measured} in float (ONNX Runtime, 1 thread, batch 1)" in shown.out


def test_biases_of_a_file_without_any_are_not_corrected(micronet, tmp_path):
    net = Net()
    proto = net.model({"x": (TensorProto.FLOAT, ["n", 8])}, {net("MatMul", "x", net.weight(8, 64)): 64})
    onnx.save(proto, tmp_path / "a.onnx")
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).standard_normal((6, 8)).astype(F32))
    shown = micronet(
        "quantize", tmp_path / "a.onnx", "--mode", "ptq", "--calib-data", tmp_path / "x.npz", "--bias-correct"
    )
    assert shown.code == 0 and "--bias-correct changed nothing: no convolution or Gemm" in shown.err


def test_parameters_are_counted_once_however_often_constants_are_combined():
    net = Net()
    x = net("Identity", np.ones((4, 3), np.float32))
    for _ in range(64):
        x = net("Add", x, x)
    proto = net.model({"x": (TensorProto.FLOAT, [2, 4])}, {net("MatMul", "x", x): 2})
    assert stored_parameters(proto.graph) == 4 * 3


def test_samples_that_fill_a_fixed_batch_are_not_counted(micronet, tmp_path):
    net = Net()
    proto = net.model({"x": (TensorProto.FLOAT, [4, 64])}, {net("MatMul", "x", net.weight(64, 8)): 2})
    onnx.save(proto, tmp_path / "a.onnx")
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).random((6, 64), F32))
    done = micronet("quantize", tmp_path / "a.onnx", "--mode", "ptq", "--calib-data", tmp_path / "x.npz", "--json")
    assert done.json["test_images"] == 6 and done.json["integers"]["batch"] == 4


def test_nodes_without_names_are_counted_one_by_one():
    net = Net()
    grid = (np.array(0.05, F32), np.array(128, np.uint8))
    x = net("DequantizeLinear", net("QuantizeLinear", "x", *grid), *grid)
    weight = net("DequantizeLinear", np.ones((8, 4), np.int8), np.full(4, 0.1, F32), np.zeros(4, np.int8), axis=1)
    found = count_integer_layers(
        net.model(
            {"x": (TensorProto.FLOAT, ["n", 8])},
            {net("MatMul", net("Tanh", net("MatMul", x, weight)), net.weight(4, 4)): 2},
        )
    )
    assert found["linear"] == {"integer": 1, "all": 2} and list(found["float"]) == ["MatMul producing t5_0"]


@pytest.mark.parametrize("product", [("MatMul", {}), ("Einsum", {"equation": "ab,bc->ac"})], ids=["matmul", "einsum"])
def test_products_with_stored_tensors_are_no_linear_layers(product):
    net, (op, options) = Net(), product
    grid = (np.array(0.05, F32), np.array(128, np.uint8))
    x = net("DequantizeLinear", net("QuantizeLinear", "x", *grid), *grid)
    weight = net("DequantizeLinear", np.ones((8, 4), np.int8), np.full(4, 0.1, F32), np.zeros(4, np.int8), axis=1)
    y = net("MatMul", net("MatMul", x, weight), net.weight(4, 4))  # as relative positions are
    proto = net.model({"x": (TensorProto.FLOAT, [3, 8])}, {net(op, net.weight(2, 3), y, **options): 2})
    assert count_integer_layers(proto)["linear"] == {"integer": 1, "all": 2}  # of another tool
    note(proto, left_float={"matmul()": STORED_FACTOR}, history=[{"stage": "quantize"}])
    found = count_integer_layers(proto)
    assert found["linear"] == {"integer": 1, "all": 1} and not found["products"]
    assert list(found["float"].values()) == [STORED_FACTOR] * 2


@pytest.mark.parametrize(("equation", "products"), [("ab->ba", 0), ("ab,b->ab", 0), ("ab,b->a", 1)])
def test_an_einsum_is_a_product_only_if_it_adds_up_products(equation, products):
    net, grid = Net(), (np.array(0.05, F32), np.array(128, np.uint8))
    x = net("DequantizeLinear", net("QuantizeLinear", "x", *grid), *grid)
    operands = [x, *([net("Gather", x, np.array(0), axis=0)] if "," in equation else [])]
    proto = net.model(
        {"x": (TensorProto.FLOAT, [3, 8])}, {net("Einsum", *operands, equation=equation): 1 + (products == 0)}
    )
    assert count_integer_layers(proto)["products"] == products


def test_operators_in_integers_count_in_files_without_quantizers():
    net = Net()
    grid = (np.array(0.05, F32), np.array(128, np.uint8))
    weight, scale, zero = np.ones((4, 2, 1, 1), np.int8), np.array(0.1, F32), np.array(0, np.int8)
    y = net("QLinearConv", net("QuantizeLinear", "x", *grid), *grid, weight, scale, zero, *grid)
    proto = net.model({"x": (TensorProto.FLOAT, ["n", 2, 4, 4])}, {net("DequantizeLinear", y, *grid): 4})
    assert count_integer_layers(proto)["convolutions"] == {"integer": 1, "all": 1}


def _with_floats(op, *weights, bias=()):
    """A file of micronet with layers in float, whose weights are stored or computed, between quantizers."""
    net, grid = Net(), (np.array(0.05, F32), np.array(128, np.uint8))
    y = net("DequantizeLinear", net("QuantizeLinear", "x", *grid), *grid)
    for weight in weights:
        y = net(op, y, net("Neg", net("Abs", "w")) if weight == "computed" else net.weight(*weight), *bias)
    y = net("DequantizeLinear", net("QuantizeLinear", y, *grid), *grid)
    rank = 4 if op == "Conv" else 3
    shapes = {"x": ["n", 4, *[4] * (rank - 2)], "w": [4, 4, *[1] * (rank - 2)] if op == "Conv" else [4, 4]}
    inputs = {name: (TensorProto.FLOAT, shapes[name]) for name in ("x", "w")[: 1 + ("computed" in weights)]}
    return net.model(inputs, {y: rank})


CONV, MATRIX = (4, 4, 1, 1), (4, 4)


@pytest.mark.parametrize(
    ("op", "weights", "recorded"),
    [
        ("Conv", [CONV, CONV], ["conv2d()", "conv2d_1()"]),
        ("Conv", [CONV, CONV], ["layer"]),  # a module, whose weight is read twice
        ("Conv", [CONV, "computed"], ["conv2d()", "conv2d_1()"]),
        ("MatMul", [MATRIX], ["linear()"]),
    ],
)
def test_calls_with_computed_weights_are_named_once_by_their_nodes(op, weights, recorded):
    proto = _with_floats(op, *weights)
    note(proto, left_float=dict.fromkeys(recorded, COMPUTED_WEIGHT))
    found = count_integer_layers(proto)
    assert found["convolutions" if op == "Conv" else "linear"] == {"integer": 0, "all": len(weights)}
    nodes = [f"{op} producing {node.output[0]}" for node in proto.graph.node if node.op_type == op]
    whys = [RUN_TIME_WEIGHTS if weight == "computed" else COMPUTED_WEIGHT for weight in weights]
    assert found["float"] == dict(zip(nodes, whys, strict=True))


def test_convolutions_without_integers_are_counted_and_named():
    net, grid = Net(19), (np.array(0.05, F32), np.array(128, np.uint8))
    x = net("DequantizeLinear", net("QuantizeLinear", "x", *grid), *grid)
    offsets = net("Expand", net("ReduceSum", x, np.array([1])), np.array([1, 18, 8, 8]))
    y = net("DeformConv", x, "a.deep.weight", offsets, np.ones(6, F32), kernel_shape=[3, 3], pads=[1] * 4)
    shares = net("Softmax", net("ReduceMean", x, np.array([1, 2]), keepdims=0))
    kernels = net("MatMul", shares, net("Reshape", "kernels", np.array([8, -1])))
    kernel = net("Reshape", kernels, np.array([4, 6, 1, 1]))
    net.stored += [onnx.numpy_helper.from_array(net.weight(6, 4, 3, 3), "a.deep.weight"),
                   onnx.numpy_helper.from_array(net.weight(8, 4, 6), "kernels")]  # fmt: skip
    proto = net.model({"x": (TensorProto.FLOAT, [1, 4, 8, 8])}, {net("Conv", y, kernel): 4})
    proto.graph.node[-1].name, proto.graph.node[-3].name = "dynamic.Conv", "dynamic.MatMul"
    note(proto, left_float={"a.deep": NO_DEFORMABLE, "conv2d()": RUN_TIME_WEIGHTS, "matmul()": STORED_FACTOR})
    found = count_integer_layers(proto)
    assert found["convolutions"] == {"integer": 0, "all": 2} and found["products"] == 0
    assert found["float"] == {
        "a.deep": NO_DEFORMABLE, "dynamic": RUN_TIME_WEIGHTS, "dynamic.MatMul": STORED_FACTOR,
    }  # fmt: skip
    assert count_sample_macs(proto, [(1, 4, 8, 8)]) == 64 * (6 * 4 * 9 + 4 * 6) + 8 * 24
    assert stored_parameters(proto.graph) == 6 * 4 * 9 + 6 + 8 * 24


def test_a_layer_with_a_computed_weight_that_runs_in_integers_is_not_float_too():
    proto = _with_floats("Conv", CONV, bias=[np.ones(4, F32)])
    note(proto, left_float={"conv2d()": COMPUTED_WEIGHT})
    found = count_integer_layers(proto)
    assert found["convolutions"] == {"integer": 1, "all": 1} and found["float"] == {}


def test_a_call_without_a_node_with_a_stored_weight_keeps_its_name():
    proto = _with_floats("MatMul", "computed", MATRIX)
    note(proto, left_float={"conv2d()": COMPUTED_WEIGHT, "matmul()": STORED_FACTOR})
    assert count_integer_layers(proto)["float"]["conv2d()"] == COMPUTED_WEIGHT


def test_a_file_too_large_for_one_message_is_counted_without_naming_its_nodes(tmp_path, monkeypatch):
    net, grid = Net(), (np.array(0.05, F32), np.array(128, np.uint8))
    x = net("DequantizeLinear", net("QuantizeLinear", "x", *grid), *grid)
    weight = net("DequantizeLinear", np.ones((8, 4), np.int8), np.full(4, 0.1, F32), np.zeros(4, np.int8), axis=1)
    y = net("DequantizeLinear", net("QuantizeLinear", net("MatMul", x, weight), *grid), *grid)
    proto = net.model({"x": (TensorProto.FLOAT, ["n", 8])}, {net("MatMul", net("Tanh", y), net.weight(4, 4)): 2})
    onnx.save(proto, tmp_path / "a.onnx")
    expected = count_computed(proto)
    assert expected["linear"] == {"integer": 1, "all": 2}
    for module in ("onnx.integers", "runtimes.onnxruntime"):
        monkeypatch.setattr(f"micronet.{module}.MAX_WEIGHT_BYTES", 100)
    assert count_computed(proto, tmp_path / "a.onnx") == expected
    with pytest.raises(MicronetError, match="must take up less than 100"):
        count_computed(proto)


@pytest.mark.parametrize(("dtype", "layers"), [(np.float16, 1), (np.int8, 0)])
def test_only_casts_of_halves_are_weights(dtype, layers):
    net = Net()
    weight = net("Cast", np.ones((8, 4), dtype), to=TensorProto.FLOAT)
    proto = net.model({"x": (TensorProto.FLOAT, ["n", 8])}, {net("MatMul", "x", weight): 2})
    assert len(GraphView(proto).layers) == layers
