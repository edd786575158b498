"""What the commands say of one quantized file: the same counts and reasons everywhere, and first what is slow."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from micronet.onnx.integer_words import describe
from micronet.onnx.integers import count_integer_layers
from micronet.onnx.metadata import note
from micronet.quantization.config import STORED_FACTOR
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


def test_a_slower_file_says_so_first_with_the_cause_and_for_one_sample(micronet, mixed, monkeypatch):
    def times(_runs, sample):
        assert len(sample["x"]) == 1
        return {"int8_ms": 2.0, "float_ms": 1.0}

    monkeypatch.setattr("micronet.onnx.speed._times", times)
    shown = micronet("quantize", mixed / "a.onnx", "--mode", "ptq", "--calib-data", mixed / "x.npz")
    first, second, *_ = shown.out.splitlines()
    assert first.startswith("slower than float: 2.00 ms vs. 1.00 ms; these layers run in integer arithmetic, but the")
    assert second.startswith("wrote ") and "2.00 ms vs. 1.00 ms in float (ONNX Runtime, 1 thread, batch 1)" in shown.out


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


def test_products_with_stored_tensors_are_no_linear_layers():
    net = Net()
    grid = (np.array(0.05, F32), np.array(128, np.uint8))
    x = net("DequantizeLinear", net("QuantizeLinear", "x", *grid), *grid)
    weight = net("DequantizeLinear", np.ones((8, 4), np.int8), np.full(4, 0.1, F32), np.zeros(4, np.int8), axis=1)
    y = net("MatMul", net("MatMul", x, weight), net.weight(4, 4))  # as relative positions are
    proto = net.model({"x": (TensorProto.FLOAT, [3, 8])}, {net("MatMul", net.weight(2, 3), y): 2})
    assert count_integer_layers(proto)["linear"] == {"integer": 1, "all": 2}  # of another tool
    note(proto, left_float={"matmul()": STORED_FACTOR}, history=[{"stage": "quantize"}])
    found = count_integer_layers(proto)
    assert found["linear"] == {"integer": 1, "all": 1} and not found["products"]
    assert list(found["float"].values()) == [STORED_FACTOR] * 2


def test_operators_in_integers_count_in_files_without_quantizers():
    net = Net()
    grid = (np.array(0.05, F32), np.array(128, np.uint8))
    weight, scale, zero = np.ones((4, 2, 1, 1), np.int8), np.array(0.1, F32), np.array(0, np.int8)
    y = net("QLinearConv", net("QuantizeLinear", "x", *grid), *grid, weight, scale, zero, *grid)
    proto = net.model({"x": (TensorProto.FLOAT, ["n", 2, 4, 4])}, {net("DequantizeLinear", y, *grid): 4})
    assert count_integer_layers(proto)["convolutions"] == {"integer": 1, "all": 1}
