"""Networks as ncnn files: the same integers, up to ncnn's rounding, and files that are whole, ours, or refused."""

import sys

import numpy as np
import pytest
import torch
from torch import nn

import micronet
from micronet.errors import FailedError, MicronetError
from micronet.onnx.export import to_onnx
from micronet.packed.file_format import read as read_packed
from micronet.packed.from_onnx import pack_model
from micronet.packed.program import Operation, Program
from micronet.runtimes.config import RuntimeOptions
from micronet.runtimes.ncnn.agreement import compare_layers
from micronet.runtimes.ncnn.files import BIN, PARAM, read, write_ncnn
from micronet.runtimes.ncnn.kinds import infer
from micronet.runtimes.ncnn.layer import Layer
from micronet.runtimes.ncnn.predictor import NcnnPredictor, load_library
from micronet.runtimes.ncnn.shapes import Blob
from micronet.runtimes.packed.numpy_backend import run
from tests.runtimes import programs

pytest.importorskip("ncnn", reason="needs ncnn")
ONE = RuntimeOptions(threads=1)
SIGNED = {"q_type": "sym", "a_sign": "signed"}


def written(program, folder, **settings):
    return NcnnPredictor(folder, write_ncnn(program, folder, **settings), ONE)


def symmetric(program):
    """Give a random program integers that fit ncnn."""
    for operation in program.operations:
        if operation.kind == "quantize":
            wide = operation.attributes["range"] == [0, 255]
            operation.attributes["zero_point"] = 128 if wide else 0
        if operation.weight is not None and operation.weight.dtype.kind == "i":
            operation.weight = operation.weight.clip(-127, 127)
    return program


@pytest.mark.parametrize("seed", [1, 5, 6, 9, 12, 35, 56, 107])
def test_every_layer_has_our_integers_but_for_the_documented_rounding(seed, tmp_path):
    program, images = programs.random_layer(seed)
    network = written(symmetric(program), tmp_path)
    layers = compare_layers(program, network, images[:1])
    assert layers and not any(layer.mismatches for layer in layers)
    assert all(layer.integers in (None, 0, 1) for layer in layers)
    assert network(images).shape == run(program, images).shape
    assert network.macs() > 0 and network.params == program.weights
    channels_last = np.ascontiguousarray(images.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(network(channels_last), network(images))


@pytest.mark.parametrize("seed", [0, 2, 5])
def test_every_other_operation_computes_what_numpy_computes(seed, tmp_path):
    for program, images in ((each, images) for each, images in [programs.other_operations(seed)] for each in each):
        found, expected = written(symmetric(program), tmp_path)(images), run(program, images)
        # Rounded values may be one step of 0.05 apart, and two of them are added at most.
        rounds = any(operation.kind == "quantize" for operation in program.operations)
        np.testing.assert_allclose(found, expected, atol=0.11 if rounds else 1e-6 * max(1, np.abs(expected).max()))


class Zoo(nn.Module):
    """Every kind of layer that ncnn gets, on a map of odd size."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 24, 3, 2, 1), nn.Hardswish())
        self.depthwise = nn.Sequential(nn.Conv2d(24, 24, 5, padding=2, groups=24), nn.ReLU6())
        self.twice = nn.Sequential(nn.Conv2d(24, 48, 3, padding=1, groups=24), nn.LeakyReLU(0.1))
        self.grouped = nn.Sequential(nn.Conv2d(48, 32, 1, groups=2), nn.SiLU(), nn.ChannelShuffle(4))
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(32, 32, 1), nn.Hardsigmoid())
        self.pool, self.average = nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(5, 2, ceil_mode=True)
        self.up = nn.Sequential(nn.ConvTranspose2d(32, 16, 2, 2), nn.GELU())
        self.nearest, self.bilinear = nn.Upsample(size=12), nn.Upsample(size=(11, 13), mode="bilinear")
        self.pad, self.last = nn.ZeroPad2d((1, 0, 2, 1)), nn.Linear(16, 5)

    def forward(self, x):
        x = self.grouped(self.twice(self.depthwise(self.first(x))))
        x = x * self.gate(x)
        first, second = self.up(x).split((4, 12), 1)
        x = torch.cat([self.nearest(self.average(second)), self.pad(self.pool(first))[:, :, :12, :12]], 1)
        return self.bilinear(x), self.last(torch.nn.functional.elu(x).mean((2, 3)))


def test_a_network_of_every_kind_is_int8_where_it_was_quantized(tmp_path):
    torch.manual_seed(0)
    net, images = Zoo().eval(), torch.randn(4, 3, 11, 11)
    quantized = micronet.quantize(net, data=[images], mode="ptq", **SIGNED)
    program = pack_model(to_onnx(quantized, images[:2], pairs=False))
    network = written(program, tmp_path)
    assert set(network.layers().values()) == {"int8"} and len(network.layers()) == 7
    assert not any(layer.mismatches for layer in compare_layers(program, network, images[:2].numpy()))
    for found, expected in zip(network(images.numpy()), run(program, images.numpy()), strict=True):
        assert found.shape == expected.shape
        assert np.abs(found - expected).mean() < 0.01 * np.abs(expected).max()  # a few values are one step apart


@pytest.mark.parametrize("half", [False, True])
def test_a_float_network_is_stored_in_32_or_16_bits(half, tmp_path):
    rng = np.random.default_rng(0)
    weight, images = rng.normal(size=(32, 16, 3, 3)), rng.normal(size=(2, 16, 9, 7)).astype(np.float32)
    layer = Operation("conv", [0], {"group": 2}, weight.astype(np.float32), bias=np.ones(32, np.float32))
    program = Program([layer, Operation("silu", [1])], [32, 9, 7], {})
    images = np.concatenate([images, images], 1)
    network = written(program, tmp_path, fp16_storage=half)
    bytes_each = 2 if half else 4
    assert (tmp_path / BIN).stat().st_size == 4 + weight.size * bytes_each + 32 * 4
    assert network.layers() == {"conv_1": "float: its weights are float"}
    assert not any(layer.mismatches for layer in compare_layers(program, network, images[:1]))
    # 144 products of at most 25, whose weights are rounded to 11 bits, or their sum to 24.
    np.testing.assert_allclose(network(images), run(program, images), atol=144 * 25 * 2.0 ** (-12 if half else -24))
    assert network(images[:0]).shape == (0, 32, 7, 5)


def test_fewer_bits_are_stored_as_int8_and_computed_exactly(exported, tmp_path):
    given = exported("nin", "W1A1")
    program = read_packed(given.path)
    network = written(program, tmp_path)
    layers = compare_layers(program, network, given.images[:1])
    assert not any(layer.mismatches for layer in layers)
    assert sum(how == "int8" for how in network.layers().values()) >= 7


def conv(weight, scale=0.01, low=0, high=255, zero_point=0, name="block.conv"):
    quantizer = Operation("quantize", [0], {"scale": 0.1, "zero_point": zero_point, "range": [low, high]})
    ones = np.ones(len(weight), np.float32)
    return Program([quantizer, Operation("conv", [1], {}, weight, ones * np.float32(scale), name=name)], [3, 6, 6], {})


def threshold(weight, limits):
    quantizer = Operation("quantize", [0], {"scale": 1.0, "zero_point": 0, "range": [-127, 127]})
    sign = Operation("threshold", [1], {}, weight.astype(np.int32), limits=np.array(limits, np.int32), name="sign")
    return Program([quantizer, sign], [weight.shape[1], 1, 1], {})


WEIGHT = np.ones((4, 3, 1, 1), np.int32)


@pytest.mark.parametrize(
    ("program", "words"),
    [(conv(WEIGHT), ["-127 to 127 without a zero point, but not those read by: block.conv", "quantize FLOAT"]),
     (conv(29 * np.arange(12, dtype=np.int32).reshape(4, 3, 1, 1) + 1, high=127), ["but not those of: block.conv"]),
     (conv(WEIGHT, 1e-39, high=127), ["too small or too large for ncnn: block.conv", "--target onnxruntime"]),
     (Program([Operation("resize", [0], {"size": [8, 9], "factors": [2, 1.5], "coordinates": "half_pixel",
                                         "nearest": "ceil"}, name="up")], [3, 4, 6], {}), ["other pixels", ": up"]),
     (threshold(np.full((2, 521, 1, 1), 127), [0, 1]), ["can reach 8,403,209; ncnn's are exact below 2^23: sign"]),
     (Program([Operation("depth_to_space", [0], {"block": [1, 3]}, name="up")], [3, 4, 6], {}), ["1 and 3: up"])],
)  # fmt: skip
def test_what_ncnn_cannot_do_is_refused_by_name_before_anything_is_written(program, words, tmp_path):
    with pytest.raises(MicronetError) as caught:
        write_ncnn(program, tmp_path / "folder")
    assert all(each in str(caught.value) for each in [*words, "ncnn cannot run 1 of", "Nothing was written"])
    assert not (tmp_path / "folder").exists()


def test_layers_with_one_reason_are_a_few_names_and_one_command(tmp_path):
    operations = [Operation("quantize", [0], {"scale": 0.1, "zero_point": 9, "range": [0, 255]})]
    for number in range(7):
        operations.append(Operation("conv", [1], {}, np.ones((3, 3, 1, 1), np.int32), name=f"c{number}"))
    program = Program(operations, [3, 4, 4], {"model": {"name": "nets.py:Net"}}, [2, 3, 4, 5, 6, 7, 8])
    with pytest.raises(MicronetError) as caught:
        write_ncnn(program, tmp_path / "folder")
    assert str(caught.value).count("-127") == 1 and ": c0, c1, c2, c3, c4 and 2 more." in str(caught.value)
    assert str(caught.value).endswith("--mode ptq --q-type sym --a-sign signed --model nets.py:Net")


def test_signs_of_the_largest_sums_are_exact(tmp_path):
    largest = 520 * 127 * 127  # just below 2^23
    limits = [largest, largest - 1, largest + 1, 2**31 - 1, -largest, -(2**31), 1, 1 - largest]
    program = threshold(np.full((8, 520, 1, 1), 127), limits)
    images = np.array([127, -127, 0], np.float32).reshape(3, 1, 1, 1) * np.ones((1, 520, 1, 1), np.float32)
    np.testing.assert_array_equal(written(program, tmp_path)(images), run(program, images))


def test_multiples_that_fit_are_stored_divided(tmp_path):
    program, images = conv(WEIGHT * 254, high=127), np.random.default_rng(0).random((2, 3, 6, 6), np.float32)
    program.operations[1].bias = np.array([0, 500, -500, 10**6], np.int32)
    # A sum of 3 products of at most 10 and a bias of 10^4, each rounded a few times.
    np.testing.assert_allclose(written(program, tmp_path)(images), run(program, images), rtol=1e-6)


def test_what_ncnn_computes_in_float_is_named(tmp_path):
    program = conv(WEIGHT, high=127)
    program.operations[1].inputs = [0]
    assert written(program, tmp_path).layers() == {"block.conv": "float: its input is not quantized"}


def change(folder, line=None, new=None, cut=None):
    """Change a line of a network's .param file, or cut its .bin file."""
    param, weights = folder / PARAM, folder / BIN
    if line is not None:
        lines = param.read_text().splitlines()
        lines[line] = lines[line].replace(*new)
        param.write_text("\n".join(lines))
    if cut is not None:
        weights.write_bytes(weights.read_bytes()[:cut])


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"line": 5, "new": ("6=12", "6=13")}, "weights do not fit"), ({"line": 5, "new": ("0=4", "0=-4")}, "is -4"),
     ({"line": 5, "new": ("Convolution", "DeformableConv2D")}, "not a layer that micronet writes"),
     ({"line": 5, "new": (" 1 ", " 999999 ")}, "too few blobs"), ({"line": 1, "new": ("4", "5")}, "as many layers"),
     ({"line": 0, "new": ("7", "8")}, "first lines"), ({"line": 5, "new": ("8=1", "8=101")}, "too short"),
     ({"line": 2, "new": ("0=6", "0=9999999999")}, "not a number"), ({"cut": -4}, "too short"),
     ({"line": 5, "new": ("1=1", "1=9 11=9")}, "twice"), ({"line": 5, "new": ("0=4", "0=4.0")}, "not a number"),
     ({"line": 4, "new": ("Quantize", "Flatten ")}, "not a feature map"),
     ({"line": 4, "new": (" 1 2", " 7 2")}, "not computed"),
     ({"line": 5, "new": (" 11=1 ", "\N{NO-BREAK SPACE}11=1 ")}, "not written as micronet"),
     ({"line": 5, "new": (" 11=1 ", " \N{FULLWIDTH DIGIT ONE}1=1 ")}, "is invalid"),
     ({"line": 5, "new": (" 11=1 ", "  11=1 ")}, "not written as micronet"),
     ({"line": 5, "new": ("block.conv", "卷" * 86)}, "longer than 255 bytes"),
     ({"line": 5, "new": ("block.conv", "block\0conv")}, "control characters")],
)  # fmt: skip
def test_a_damaged_file_never_reaches_ncnn(settings, words, tmp_path):
    note = write_ncnn(conv(WEIGHT, high=127), tmp_path)
    read(tmp_path, note)
    change(tmp_path, **settings)
    with pytest.raises(MicronetError, match=rf"^[^\n]*{words}[^\n]*; export the network again"):
        NcnnPredictor(tmp_path, note, ONE)


def test_a_file_of_grouped_int8_convolutions_is_refused():
    ones = dict.fromkeys((1, 2, 3, 11, 12, 13), 1)
    layer = Layer("ConvolutionDepthWise", "conv", ["1"], ["2"], {0: 16, **ones, 6: 128, 7: 2})
    for kind in (1, 101):
        layer.parameters[8] = kind
        with pytest.raises(ValueError, match="grouped int8"):
            infer(layer, [Blob((16, 6, 6), True)])
    layer.parameters |= {6: 16, 7: 16}
    assert infer(layer, [Blob((16, 6, 6), True)]) == [Blob((16, 6, 6), True)]


def test_long_names_in_any_script_are_cut_between_characters(tmp_path):
    program = conv(WEIGHT, high=127, name="主干网络" * 40)
    names = written(program, tmp_path).layers()
    assert names == {("主干网络" * 40)[-85:]: "int8"}  # 3 bytes each


def test_ncnn_gets_what_was_checked_even_if_the_file_changes(tmp_path, monkeypatch):
    note = write_ncnn(conv(WEIGHT, high=127), tmp_path)

    def read_then_damage(*given):
        found = read(*given)
        change(tmp_path, line=5, new=("6=12", "6=99"))
        return found

    monkeypatch.setattr("micronet.runtimes.ncnn.predictor.read", read_then_damage)
    images = np.ones((1, 3, 6, 6), np.float32)
    np.testing.assert_array_equal(NcnnPredictor(tmp_path, note, ONE)(images), run(conv(WEIGHT, high=127), images))


def test_errors_say_what_to_do(tmp_path, monkeypatch):
    note = write_ncnn(conv(WEIGHT, high=127), tmp_path)
    network = NcnnPredictor(tmp_path, note, ONE)
    with pytest.raises(MicronetError, match=r"shape \(N, 3, 6, 6\), but got float32 \(1, 3, 6, 7\)"):
        network(np.zeros((1, 3, 6, 7), np.float32))
    with pytest.raises(MicronetError, match="drop --device cuda"):
        NcnnPredictor(tmp_path, note, RuntimeOptions(device="cuda"))
    with pytest.raises(MicronetError, match="is damaged"):
        read(tmp_path, {**note, "outputs": ["out1"]})
    weights = bytearray((tmp_path / BIN).read_bytes())
    weights[-4:] = np.float32(np.nan).tobytes()
    (tmp_path / BIN).write_bytes(weights)
    with pytest.raises(FailedError, match="NaN"):
        read(tmp_path, note)
    (tmp_path / BIN).unlink()
    with pytest.raises(MicronetError, match=r"network\.bin does not exist"):
        read(tmp_path, note)
    monkeypatch.setitem(sys.modules, "ncnn", None)
    with pytest.raises(MicronetError, match=r"^[^\n]*pip install ncnn$"):
        load_library()


def test_ncnn_reads_every_float32_as_it_was_written(tmp_path):
    values = np.random.default_rng(0).integers(0, 0x7F7FFFFF, 40, dtype=np.uint32).view(np.float32)
    for value in [*values[values > 1e-30], np.float32(0.1), np.float32(3.4028235e38)]:
        text = Layer("BinaryOp", "a", [], [], {2: float(value)}).line.split("2=")[1]
        assert len(text) <= 15 and np.float32(text) == value
