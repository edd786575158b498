"""Packed weights: as many bytes as their bits take, and the integers, operators and outputs of int8 weights."""

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.numpy_helper import to_array
from onnxruntime import GraphOptimizationLevel

from micronet.errors import MicronetError
from micronet.onnx.low_bits import digits_per_byte, pack_weights, radices
from micronet.onnx.ops import INTEGER_LAYERS
from micronet.onnx.reader import read_onnx
from micronet.onnx.stored import unpack_weights
from micronet.runtimes.config import RuntimeOptions
from micronet.runtimes.onnx_cost import stored_parameters
from micronet.runtimes.onnxruntime import OrtPredictor, optimize, session_predictor
from tests.onnx.foreign import F32, IMAGE, Net

CHANNELS, SCALE = 129, F32(0.02)  # an odd width, so that the last byte of a weight is not full


def network(*values):
    """Return a convolution and a product whose int8 weights have these values."""
    net = Net(opset=18)

    def grid(x, point=0):
        point = np.uint8(point)
        return net("DequantizeLinear", net("QuantizeLinear", x, SCALE, point), SCALE, point)

    def weight(*shape):
        chosen = net.random.choice(np.array(values), shape).astype(np.int8)
        return net("DequantizeLinear", chosen, SCALE, np.int8(0))

    convolved = grid(net("Relu", net("Conv", grid("x", 128), weight(CHANNELS, 3, 5, 5))))
    pooled = net("Reshape", grid(net("GlobalAveragePool", convolved)), np.array([0, -1]))
    return net.model(IMAGE, {grid(net("MatMul", pooled, weight(CHANNELS, 501)), 128): 2})


def outputs(proto):
    images = np.random.default_rng(0).standard_normal((2, 3, 16, 16), F32)
    return session_predictor(proto.SerializeToString(), RuntimeOptions(arithmetic="exact"))(images)


def arrays(proto):
    return {tensor.name: to_array(tensor) for tensor in proto.graph.initializer}


@pytest.mark.parametrize(
    ("values", "bits"),
    [
        ([-127, 127], 1),
        ([-64, 0, 64], 1.6),
        ([-100, -33, 34, 101], 2),
        (range(-3, 4), 3),
        (range(8), 3),
        (range(-7, 8), 4),
        (range(-15, 16, 2), 4),
        (range(-16, 16), 5),
        (range(-31, 32), 6),
        (range(-63, 65), 7),
    ],
)
def test_packed_weights_take_their_bits_and_the_file_computes_the_same_with_the_same_operators(values, bits):
    plain = network(*values)
    packed = pack_weights(plain)
    onnx.checker.check_model(packed, full_check=True)
    digits = {name: array.nbytes for name, array in arrays(packed).items() if ".digits" in name}
    sizes = [array.size for array in arrays(plain).values() if array.dtype == np.int8 and array.size > 1]
    assert sum(digits.values()) <= sum(np.ceil(size * bits / 8) + 2 for size in sizes)  # up to three bytes not full
    np.testing.assert_array_equal(outputs(packed), outputs(plain))
    before, after = (
        [node.op_type for node in optimize(each.SerializeToString(), GraphOptimizationLevel.ORT_ENABLE_ALL).graph.node]
        for each in (plain, packed)
    )
    assert sorted(after) == sorted(before) and len(INTEGER_LAYERS.intersection(after)) == 2
    again = unpack_weights(packed)
    assert list(again.graph.node) == list(plain.graph.node)
    assert arrays(again).keys() == arrays(plain).keys()
    for name, array in arrays(plain).items():
        np.testing.assert_array_equal(arrays(again)[name], array, strict=True)


@given(st.integers(2, 256))
def test_digits_cover_every_level_and_take_at_most_the_bits_of_the_index(levels):
    found = radices(levels)
    assert (levels > 128) == (not found)
    if found:
        assert np.prod(found) >= levels
        assert sum(8 / digits_per_byte(radix) for radix in found) <= (levels - 1).bit_length()


@pytest.mark.parametrize("values", [range(-127, 128), [-128, 127, 0, 1]])
def test_a_network_that_would_not_get_smaller_is_refused(values):
    with pytest.raises(MicronetError, match=r"--low-bit-storage has no effect.*--w-bits 4"):
        pack_weights(network(*values))


def test_layers_that_are_too_small_are_not_told_to_take_fewer_bits(monkeypatch):
    monkeypatch.setattr("tests.onnx.test_low_bits.CHANNELS", 1)
    with pytest.raises(MicronetError, match="smaller than the operators that would unpack them; drop the option"):
        pack_weights(network(*range(-7, 8)))


def test_a_packed_file_is_read_with_int8_weights(tmp_path):
    plain, path = network(-1, 0, 1), tmp_path / "packed.onnx"
    onnx.save(pack_weights(plain), path)
    assert read_onnx(path) == unpack_weights(pack_weights(plain)) and read_onnx(path) != onnx.load(path)
    assert OrtPredictor(path, RuntimeOptions()).params == stored_parameters(plain.graph)


def test_a_constant_that_is_cut_in_two_axes_is_read_as_the_operator_cuts_it():
    net, values = Net(opset=18), np.arange(12, dtype=np.int8).reshape(3, 4)
    cut = net("Slice", values, np.array([1, 1]), np.array([3, 3]))
    model = net.model(IMAGE, {net("DequantizeLinear", cut, SCALE, np.int8(0)): 2})
    assert arrays(unpack_weights(model))[cut].tolist() == values[1:3, 1:3].tolist()


def test_a_file_that_unpacks_more_than_packed_weights_do_is_left_as_it_is():
    net, table = Net(opset=18), np.arange(256 * 8, dtype=np.int8).reshape(256, 8)
    x = np.zeros(2**17, np.uint8)
    for _ in range(3):  # each makes eight of one, and the last as many bytes as MAX_UNPACKED times 8
        x = net("Reshape", net("Gather", table, net("Cast", x, to=TensorProto.INT32)), np.array([-1]))
    model = net.model({"x": (TensorProto.FLOAT, [1])}, {net("DequantizeLinear", x, SCALE): 1})
    assert unpack_weights(model) is model


@pytest.mark.parametrize("op", ["Gather", "Reshape", "Slice", "Add", "Cast"])
def test_constants_that_the_operators_do_not_take_are_left_as_they_are(op):
    net = Net(opset=18)
    wrong = {"Gather": [np.int8([[1]]), np.int32([[7]])], "Reshape": [np.int8([1, 2, 3]), np.array([2, -1])],
             "Slice": [np.int8([1]), np.array([0]), np.array([1]), np.array([0])],
             "Add": [np.int32([[1, 2]]), np.int32([[1], [2], [3]])], "Cast": [np.int8([1])]}[op]  # fmt: skip
    options = {"to": 77} if op == "Cast" else {}
    node = net("DequantizeLinear", net(op, *wrong, **options), SCALE)
    model = onnx.ModelProto(graph=helper.make_graph(net.nodes, "net", [], [], net.stored))
    assert unpack_weights(model) is model and node
