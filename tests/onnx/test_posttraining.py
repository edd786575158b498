"""Float ONNX files made int8 from data: ranges, caches, files from elsewhere."""

import copy
import os

import numpy as np
import onnx
import pytest
import torch

from micronet.core.progress import Silent
from micronet.errors import MicronetError
from micronet.onnx import posttraining as pt
from micronet.onnx.bias_correction import correct_biases
from micronet.onnx.export import to_onnx
from micronet.onnx.trt_cache import is_legacy_cache, read_legacy_cache
from micronet.runtimes.config import RuntimeOptions
from micronet.runtimes.onnxruntime import exposing_session, session_predictor
from micronet.stages import quantize_onnx
from tests.onnx.networks import plain

IMAGES = np.random.default_rng(0).standard_normal((16, 3, 32, 32), dtype=np.float32)


def scores(proto):
    return session_predictor(proto.SerializeToString(), RuntimeOptions())(IMAGES)


@pytest.fixture(scope="module")
def floating():
    artifact = plain("resnet18", {"width": 0.1})
    artifact.model.train()
    with torch.no_grad():
        for _ in range(3):
            artifact.model(torch.from_numpy(IMAGES))
    artifact.model.eval()
    return to_onnx(artifact, torch.from_numpy(IMAGES))


@pytest.fixture(scope="module")
def calibrated(floating):
    """The folded model and its histograms."""
    folded = pt.prepare(floating)
    return folded, pt.collect(folded, [{"images": IMAGES}])


@pytest.mark.parametrize(
    ("calibrator", "signed"), [("minmax", False), ("percentile", False), ("entropy", True), ("mse", False)]
)
def test_every_calibrator_gives_a_file_of_integers_that_computes_much_the_same(
    floating, calibrated, calibrator, signed
):
    folded, histograms = copy.deepcopy(calibrated[0]), calibrated[1]
    ranges = pt.find_ranges(histograms, calibrator, 99.99, signed=signed)
    small = pt.quantize_onnx(folded, ranges, signed=signed, per_channel=True, bits=8)
    onnx.checker.check_model(small)
    kinds = [tensor.data_type for tensor in small.graph.initializer if len(tensor.dims) == 4]
    assert kinds and set(kinds) == {onnx.TensorProto.INT8}
    points = {int(np.abs(onnx.numpy_helper.to_array(t).astype(int)).max()) for t in small.graph.initializer
              if t.name.endswith("_zero_point") and t.data_type != onnx.TensorProto.INT32}  # fmt: skip
    assert points == {0} if signed else len(points) > 1
    wanted = scores(floating)
    error = np.linalg.norm(scores(small) - wanted) / np.linalg.norm(wanted - wanted.mean(1, keepdims=True))
    assert error < 0.2


def test_ranges_are_of_the_tensors_values(floating):
    found = pt.collect(pt.prepare(floating), [{"images": IMAGES[:8]}, {"images": IMAGES[8:]}])
    low, high = pt.find_ranges({"images": found["images"]}, "minmax", 99.99)["images"]
    assert (low, high) == (float(IMAGES.min()), float(IMAGES.max()))


def test_seven_bits_are_at_most_64(floating):
    folded = pt.prepare(floating)
    ranges = pt.find_ranges(pt.collect(folded, [{"images": IMAGES}]), "minmax", 99.99)
    small = pt.quantize_onnx(folded, ranges, signed=False, per_channel=True, bits=7)
    weights = [onnx.numpy_helper.to_array(t) for t in small.graph.initializer if len(t.dims) == 4]
    assert weights and max(int(np.abs(weight.astype(int)).max()) for weight in weights) <= 64


@pytest.mark.parametrize("signed", [False, True])
def test_bias_correction_restores_every_layers_mean_output_up_to_the_biases_steps(calibrated, signed):
    folded, histograms = calibrated
    ranges = pt.find_ranges(histograms, "minmax", 99.99, signed=signed)
    small = pt.quantize_onnx(folded, ranges, signed=signed, per_channel=True, bits=7)
    corrected = correct_biases(folded, small, [{"images": IMAGES}], Silent())
    layers = [node for node in small.graph.node if node.op_type in ("Conv", "Gemm")]
    assert corrected == len(layers) > 10
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in small.graph.initializer}
    scales = {node.output[0]: stored[node.input[1]] for node in small.graph.node
              if node.op_type == "DequantizeLinear" and node.input[0] in stored}  # fmt: skip
    names = [node.output[0] for node in layers]
    given = {"images": IMAGES}
    wanted, found = (exposing_session(proto, names).run(names, given) for proto in (folded, small))
    for node, target, output in zip(layers, wanted, found, strict=True):
        axes = (0, *range(2, target.ndim))
        off = np.abs(output.mean(axes, dtype=np.float64) - target.mean(axes, dtype=np.float64))
        step = scales.get(node.input[2], 0.0)
        rounding = 1e-4 * (1 + np.abs(target).max())  # of float32 sums, which may move an activation by a level
        assert (off <= step / 2 + rounding).all(), node.name


def test_a_correction_that_moves_the_outputs_away_from_the_float_ones_is_dropped(calibrated, monkeypatch):
    folded, histograms = calibrated
    ranges = pt.find_ranges(histograms, "minmax", 99.99)
    small = pt.quantize_onnx(folded, ranges, signed=False, per_channel=True, bits=8)

    def ruin(_, int8, *__):
        for tensor in int8.graph.initializer:
            if tensor.data_type == onnx.TensorProto.INT32:
                zeros = np.zeros(tensor.dims, np.int32)
                tensor.CopyFrom(onnx.numpy_helper.from_array(zeros, tensor.name))
        return 1

    monkeypatch.setattr(quantize_onnx, "correct_biases", ruin)
    assert quantize_onnx._corrected(folded, small, [{"images": IMAGES}], Silent()) is small


@pytest.mark.parametrize("shape", [(4,), (1, 4), (1,), ()])
def test_bias_correction_finds_layers_that_are_outputs_themselves_and_biases_of_every_shape(shape):
    draw = np.random.default_rng(0)
    weights = [draw.standard_normal(size, dtype=np.float32) for size in ((4, 8), (3, 4))]
    biases = [draw.standard_normal(size, dtype=np.float32) for size in (shape, (3,))]
    stored = {"w": weights[0], "v": weights[1], "b": np.asarray(biases[0]), "c": biases[1]}
    floats = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]> g (float[N, 8] x) => (float[N, 4] y, float[N, 3] z)
        { y = Gemm<transB = 1>(x, w, b) r = Relu(y) z = Gemm<transB = 1>(r, v, c) }"""
    )
    floats.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in stored.items())
    folded, feeds = pt.prepare(floats), [{"x": draw.standard_normal((64, 8), dtype=np.float32) + 1}]
    ranges = pt.find_ranges(pt.collect(folded, feeds), "minmax", 99.99)
    small = pt.quantize_onnx(folded, ranges, signed=False, per_channel=True, bits=8)
    assert correct_biases(folded, small, feeds, Silent()) == 2
    kept = copy.deepcopy(small)
    assert correct_biases(folded, small, feeds, Silent()) == 2
    for before, after in zip(kept.graph.initializer, small.graph.initializer, strict=True):  # it corrects once
        one, other = (onnx.numpy_helper.to_array(tensor).astype(np.float64) for tensor in (before, after))
        assert np.abs(one - other).max() <= 1e-5


def test_a_cache_of_tensorrt_is_read_and_an_old_one_of_an_old_name_is_refused(tmp_path, floating):
    path = tmp_path / "c"
    path.write_text("TRT-8503-EntropyCalibration2\nimages: 3c010a14\n(Unnamed Layer* 1) [Conv]: 0\n")
    ranges = read_legacy_cache(path)
    assert ranges["images"][1] == pytest.approx(127 * float(np.frombuffer(bytes.fromhex("3c010a14"), ">f4")[0]))
    assert list(ranges) == ["images"]
    with pytest.raises(MicronetError, match="belong to another network"):
        pt.quantize_onnx(pt.prepare(floating), {"x": (-1.0, 1.0)}, signed=True, per_channel=True, bits=8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not a TensorRT calibration cache"),
        (b"\xff\xfe\x00", "not a TensorRT calibration cache"),
        (b"something else\n", "its first line is 'something else'"),
        (b"TRT-7000-EntropyCalibration2\n", "contains no ranges"),
        (b"TRT-7000-EntropyCalibration2\nimages: zzzz\n", "line 2"),
        (b"TRT-7000-EntropyCalibration2\nimages\n", "line 2"),
        (b"TRT-7000-EntropyCalibration2\nimages: 7fc00000\n", "line 2"),
        (b"TRT-7000-EntropyCalibration2\nimages: bf800000\n", "line 2"),
    ],
    ids=["empty", "binary", "other", "no-lines", "no-hex", "no-colon", "nan", "negative"],
)
def test_a_damaged_cache_is_one_line(tmp_path, text, message):
    path = tmp_path / "c"
    path.write_bytes(text)
    with pytest.raises(MicronetError, match=message):
        read_legacy_cache(path)


def test_models_that_cannot_be_quantized_are_refused(floating):
    folded = pt.prepare(floating)
    ranges = pt.find_ranges(pt.collect(folded, [{"images": IMAGES}]), "minmax", 99.99)
    small = pt.quantize_onnx(folded, ranges, signed=False, per_channel=True, bits=8)
    with pytest.raises(MicronetError, match="already quantized"):
        pt.prepare(small)
    with pytest.raises(MicronetError, match="no calibration inputs"):
        pt.collect(pt.prepare(floating), [])
    with pytest.raises(MicronetError, match="NaN or infinity"):
        pt.find_ranges(pt.collect(pt.prepare(floating), [{"images": IMAGES * np.nan}]), "minmax", 99.99)


def test_the_command_quantizes_a_file_without_its_code(micronet, chain, tmp_path):
    proto = onnx.load(chain / "float.onnx")
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / "foreign.onnx")
    small = tmp_path / "foreign-int8.onnx"
    unknown = micronet("quantize", tmp_path / "foreign.onnx", "--mode", "ptq")
    assert unknown.code == 2 and "specify one with --data" in unknown.err and not small.exists()
    done = micronet("quantize", tmp_path / "foreign.onnx", "--mode", "ptq", "--data", "digits", "--json")
    assert done.code == 0, done.err
    assert done.json["calibrator"] in ("mse", "minmax")
    assert small.stat().st_size < 0.7 * (tmp_path / "foreign.onnx").stat().st_size
    assert abs(done.json["test_accuracy"] - done.json["float_test_accuracy"]) < 0.05
    assert micronet("compare", tmp_path / "foreign.onnx", small, "--data", "digits", "--json").code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "add --mode ptq"),
        (["--mode", "ptq", "--w-bits", "4"], "--w-bits 7 or 8"),
        (["--mode", "ptq", "--model", "nin"], "have no effect on ONNX files"),
        (["--mode", "ptq", "--method", "lsq"], "--w-bits 7 or 8"),
        (["--mode", "ptq", "--equalize"], "any recovery option except --bias-correct"),
        (["--mode", "ptq", "--a-sign", "signed", "--q-type", "asym"], "requires --q-type sym"),
    ],
)
def test_what_a_file_does_not_take_is_said(micronet, chain, tmp_path, options, message):
    done = micronet("quantize", chain / "float.onnx", *options, "-o", tmp_path / "x.onnx")
    assert done.code == 2 and message in done.err and not list(tmp_path.iterdir())


def windows():
    """A model that puts four windows of an image behind one another, then convolves them."""
    node = onnx.helper.make_node
    nodes = [
        node("Reshape", ["images", "parted"], ["five"]), node("Transpose", ["five"], ["turned"], perm=[0, 2, 1, 3, 4]),
        node("Reshape", ["turned", "four"], ["w"]), node("Conv", ["w", "k"], ["c"], kernel_shape=[1, 1]),
        node("ReduceMean", ["c", "axes"], ["m"], keepdims=0), node("Reshape", ["m", "back"], ["scores"]),
    ]  # fmt: skip
    values = {"parted": [0, 3, 4, 8, 32], "four": [-1, 3, 8, 32], "axes": [2, 3], "back": [-1, 8]}
    stored = [onnx.numpy_helper.from_array(np.array(v), name) for name, v in values.items()]
    stored.append(onnx.numpy_helper.from_array(np.ones((2, 3, 1, 1), np.float32), "k"))
    image, scores = (
        onnx.helper.make_tensor_value_info(name, 1, shape)
        for name, shape in (("images", ["n", 3, 32, 32]), ("scores", ["n", 8]))
    )
    graph = onnx.helper.make_graph(nodes, "g", [image], [scores], stored)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)


def test_ranges_see_every_value_of_a_tensor_whose_first_axis_is_not_the_batch():
    images = IMAGES.copy()
    images[-1, :, -8:] *= 100
    folded = pt.prepare(windows())
    low, high = pt.find_ranges(pt.collect(folded, [{"images": images}]), "minmax", 99.99)["c"]
    assert max(-low, high) > 100


@pytest.mark.parametrize(
    "line", ["c:", "c: 00000001", "c: 7f7fffff", ": 3d010a14", "x: 3c010a143c010a14", "images: 3c010a14"]
)
def test_a_line_of_a_cache_that_cannot_be_meant_is_refused(tmp_path, line):
    path = tmp_path / "c"
    path.write_text(f"TRT-8503-EntropyCalibration2\nimages: 3c010a14\n{line}\n")
    with pytest.raises(MicronetError, match="line 3"):
        read_legacy_cache(path)


def test_weights_that_are_no_numbers_are_named(floating):
    broken = onnx.ModelProto()
    broken.CopyFrom(floating)
    first = next(tensor for tensor in broken.graph.initializer if len(tensor.dims) == 4)
    values = onnx.numpy_helper.to_array(first).copy()
    values.flat[0] = np.nan
    first.CopyFrom(onnx.numpy_helper.from_array(values, first.name))
    with pytest.raises(MicronetError, match="contains NaN or infinity"):
        pt.prepare(broken)


def test_two_inputs_are_one_line(micronet, tmp_path):
    proto = windows()
    proto.graph.input.append(onnx.helper.make_tensor_value_info("other", 1, ["n", 3]))
    onnx.save(proto, tmp_path / "two.onnx")
    done = micronet("quantize", tmp_path / "two.onnx", "--mode", "ptq", "--data", "digits")
    assert done.code == 2 and "has 2 inputs" in done.err and len(done.err.strip().splitlines()) == 1


def test_a_pipe_in_place_of_a_cache_is_refused(tmp_path):
    os.mkfifo(tmp_path / "a.cache")
    assert not is_legacy_cache(tmp_path / "a.cache")
    with pytest.raises(MicronetError, match="not a TensorRT calibration cache"):
        read_legacy_cache(tmp_path / "a.cache")


def test_names_of_axes_that_outputs_of_other_sizes_share_are_left_out():
    """TorchScript's exporter calls the sides of all levels of a pyramid alike."""
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Relu", ["x"], ["fine"]),
            onnx.helper.make_node("MaxPool", ["fine"], ["coarse"], kernel_shape=[2, 2], strides=[2, 2]),
            onnx.helper.make_node("GlobalAveragePool", ["coarse"], ["all"]),
        ],
        "pyramid",
        [onnx.helper.make_tensor_value_info("x", 1, ["n", 3, "h", "w"])],
        [
            onnx.helper.make_tensor_value_info(name, 1, ["n", 3, *sides])
            for name, sides in (("fine", ["a", "b"]), ("coarse", ["a", "b"]), ("all", ["c", 1]))
        ],
    )
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    found = [
        [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in pt.prepare(proto).graph.output
    ]
    assert found == [["n", 3, 0, 0], ["n", 3, 0, 0], ["n", 3, "c", 1]]
