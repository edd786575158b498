"""Engines built for real, by TensorRT-RTX, which needs no GPU for that."""

import hashlib
import json
import struct

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from micronet.artifact.artifact import Artifact
from micronet.errors import FailedError, MicronetError
from micronet.models.build import ModelSpec
from micronet.onnx import posttraining
from micronet.onnx.config import ExportConfig
from micronet.onnx.export import to_onnx
from micronet.onnx.rewrite import to_half
from micronet.runtimes.tensorrt.build import build_engine, datatypes, layers
from micronet.runtimes.tensorrt.config import USUAL_BATCHES, BuildConfig, Profile
from tests.onnx.networks import IMAGES, NIN, plain_file, quantized_file

pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx-cu13 (Linux on x86-64)")
PROFILES = [Profile(*((batch, 3, 32, 32) for batch in USUAL_BATCHES))]
RTX = BuildConfig(backend="tensorrt-rtx")


class Upsampling(nn.Module):
    """Scores for every pixel, by a resize to the input's own size and by a transposed convolution."""

    def __init__(self):
        super().__init__()
        self.down, self.up, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.ConvTranspose2d(8, 8, 2, 2), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        small = F.relu(self.down(x))
        wide = F.interpolate(small, size=x.shape[2:], mode="bilinear", align_corners=False)
        return self.head(wide + self.up(small))


def calibrated(proto):
    folded = posttraining.prepare(proto)
    ranges = posttraining.find_ranges(
        posttraining.collect(folded, [{"images": IMAGES.numpy()}], signed=True), "entropy", 99.99, signed=True
    )
    return posttraining.quantize_onnx(folded, ranges, signed=True, per_channel=True, bits=8)


def test_int8_engines_of_resnet18_are_a_third_of_its_float_ones_and_multiply_in_int8():
    proto = plain_file("resnet18", {"width": 1.0})
    floating, small = build_engine(proto, PROFILES, RTX), build_engine(calibrated(proto), PROFILES, RTX)
    assert len(small.data) <= 0.35 * len(floating.data)
    assert datatypes(floating.about) == {"Float": 20}  # the classifier is of the kind gemm where it is int8
    assert datatypes(small.about) == {"Int8": 21}


def test_half_precision_multiplies_in_half():
    half, _ = to_half(plain_file(), IMAGES.numpy())
    assert datatypes(build_engine(half, PROFILES, RTX).about) == {"Half": 9}


@pytest.mark.parametrize(
    "config",
    [{}, {"q_level": "layer"}, {"method": "lsq", "w_bits": 4, "a_bits": 4}],
    ids=["W8A8", "W8A8-layer", "LSQ-W4A4"],
)
def test_symmetric_quantized_networks_multiply_in_int8(config):
    proto = quantized_file(*NIN, {"a_sign": "signed", **config}, target="tensorrt")
    engine = build_engine(proto, PROFILES, RTX)
    assert datatypes(engine.about) == {"Int8": 9}


@pytest.mark.parametrize(
    "config", [{"w_bits": "binary", "a_bits": "binary"}, {"w_bits": "ternary", "a_bits": 32}], ids=["W1A1", "WtA32"]
)
def test_binary_and_ternary_networks_build(config):
    proto = quantized_file(*NIN, config, target="tensorrt")
    assert sum(datatypes(build_engine(proto, PROFILES, RTX).about).values()) == 9


def test_an_upsampling_network_builds_with_free_sides_and_several_profiles():
    artifact = Artifact(Upsampling().eval(), ModelSpec("code.py:Upsampling"))
    proto = to_onnx(artifact, torch.randn(2, 3, 32, 32), ExportConfig(target="tensorrt", dynamic="batch,height,width"))
    profiles = [
        Profile((1, 3, 16, 16), (1, 3, 64, 48), (1, 3, 128, 128)),
        Profile((4, 3, 32, 32), (4, 3, 32, 32), (8, 3, 64, 64)),
    ]
    about = build_engine(proto, profiles, RTX).about
    assert about["inputs"][0]["shape"] == [-1, 3, -1, -1]
    assert [entry[2]["images"] for entry in about["profiles"]] == [[1, 3, 128, 128], [8, 3, 64, 64]]


def test_what_does_not_build_is_one_line_with_the_node():
    unknown = onnx.helper.make_model(
        onnx.helper.make_graph(
            [onnx.helper.make_node("Det", ["images"], ["out"], "the_determinant")], "g",
            [onnx.helper.make_tensor_value_info("images", 1, [1, 3, 3])],
            [onnx.helper.make_tensor_value_info("out", 1, [1])],
        )
    )  # fmt: skip
    with pytest.raises(MicronetError, match=r"Det 'the_determinant' is not supported"):
        build_engine(unknown, [], RTX)
    with pytest.raises(MicronetError, match=r"1x3x16x16 does not match the model's input \?x3x32x32"):
        build_engine(plain_file(), [Profile(*((batch, 3, 16, 16) for batch in USUAL_BATCHES))], RTX)
    with pytest.raises(MicronetError, match="--min-shape, --opt-shape and --max-shape"):
        build_engine(plain_file(), [], RTX)
    with pytest.raises(MicronetError, match=r"9\.0; tensorrt-rtx supports 7\.5"):
        build_engine(plain_file(), PROFILES, BuildConfig(backend="tensorrt-rtx", compute_capability="9.0"))
    with pytest.raises(FailedError, match=r"pip install tensorrt$"):
        build_engine(plain_file(), PROFILES, BuildConfig(backend="tensorrt"))


def test_zero_points_are_refused_by_the_library_itself():
    proto = quantized_file(*NIN, {"q_type": "asym"})
    with pytest.raises(MicronetError, match="cannot parse this model"):
        build_engine(proto, PROFILES, RTX)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_shape": "1x3x8x8"}, "add --opt-shape and --max-shape"),
        ({"min_shape": "1x3", "opt_shape": "ax3", "max_shape": "2x3"}, "'ax3'; expected sizes separated by x"),
        ({"min_shape": "2x3", "opt_shape": "1x3", "max_shape": "2x3"}, "must satisfy min <= opt <= max"),
        ({"min_shape": "1x3,1x3", "opt_shape": "1x3", "max_shape": "2x3"}, "different numbers of profiles"),
        ({"compute_capability": "ampere"}, "such as 8.6"),
        ({"workspace": 0.0}, "--workspace"),
        ({"optimization_level": 9}, "--optimization-level"),
    ],
)
def test_impossible_options_are_one_line(options, message):
    with pytest.raises(MicronetError, match=message):
        BuildConfig(**options)


def test_layers_are_read_from_a_builders_log():
    log = (
        "Layers:\nName: conv_0, LayerType: correlation, Inputs: [ { Name: a, Datatype: Int8, Format: x }], "
        "Constants: [ { Name: w, Datatype: Int8 }], Outputs: [ { Name: b, Datatype: Float }], TacticName: t, "
        "StreamId: 0, Metadata: [ONNX Layer: conv][ONNX Layer: relu]\n"
    )
    assert layers(log) == [
        {"name": "conv_0", "kind": "correlation", "inputs": ["Int8"], "constants": ["Int8"], "outputs": ["Float"],
         "from": ["conv", "relu"]}
    ]  # fmt: skip


@pytest.fixture(scope="module")
def engines(chain, tmp_path_factory):
    return tmp_path_factory.mktemp("engines")


def test_the_command_builds_from_an_artifact_and_from_a_file(micronet, chain, engines):
    for source, options, kind in (
        ("float.safetensors", [], "Float"),
        ("float.onnx", ["--precision", "fp16"], "Half"),
        ("float.safetensors", ["--precision", "int8", "--calib-cache", engines / "c.cache"], "Int8"),
    ):
        path = engines / f"{kind}.engine"
        done = micronet("trt-build", chain / source, *options, "-o", path, "--json")
        assert done.code == 0, done.err
        assert done.json["multiplies_in"] == {kind: 9}
        about = json.loads((engines / f"{kind}.engine.json").read_text())
        assert about["engine_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert about["source_sha256"] == hashlib.sha256((chain / source).read_bytes()).hexdigest()
        assert about["metadata"]["data"]["classes"][0] == "0"
    again = micronet("trt-build", chain / "float.safetensors", "--precision", "int8", "--calib-cache",
                     engines / "c.cache", "-o", engines / "again.engine")  # fmt: skip
    assert again.code == 0 and "activation statistics from" in again.err


def test_the_command_takes_a_cache_that_tensorrt_wrote(micronet, chain, engines):
    proto = posttraining.prepare(onnx.load(chain / "float.onnx"))
    images = np.random.default_rng(0).random((8, 3, 32, 32), dtype=np.float32)
    found = posttraining.collect(proto, [{"images": images}], signed=True)
    lines = ["TRT-7000-EntropyCalibration2"]
    for name, histogram in found.items():
        scale = max(abs(histogram.low), abs(histogram.high)) / 127
        lines.append(f"{name}: {struct.pack('>f', scale).hex()}")
    (engines / "legacy.cache").write_text("\n".join(lines) + "\n")
    done = micronet("trt-build", chain / "float.onnx", "--precision", "int8", "--calibration-cache",
                    engines / "legacy.cache", "-o", engines / "legacy.engine", "--json")  # fmt: skip
    assert done.code == 0, done.err
    assert done.json["multiplies_in"] == {"Int8": 9} and "read TensorRT's ranges" in done.err


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("int8.safetensors", [], "--a-sign signed"),
        ("int8.onnx", ["--precision", "fp16"], "is quantized; drop --precision fp16"),
        ("float.onnx", ["--calibrator", "mse"], "needs no calibration"),
        ("float.onnx", ["--timing-cache", "t.cache", "--backend", "tensorrt-rtx"], "drop --timing-cache"),
        ("nothing.onnx", [], "does not exist"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(micronet, chain, tmp_path, source, options, message):
    done = micronet("trt-build", chain / source, *options, "-o", tmp_path / "x.engine")
    assert (done.code, len(done.err.strip().splitlines()[-1:])) == (2, 1)
    assert message in done.err and not list(tmp_path.iterdir())


def test_a_fixed_batch_builds_and_a_file_of_wrong_numbers_does_not(micronet, chain, tmp_path):
    four = ["--min-shape", "4x3x32x32", "--opt-shape", "4x3x32x32", "--max-shape", "4x3x32x32"]
    assert micronet("trt-build", chain / "float.safetensors", *four, "-o", tmp_path / "four.engine").code == 0
    unsigned = micronet("trt-build", chain / "int8.onnx", "-o", tmp_path / "x.engine")
    assert unsigned.code == 2 and not (tmp_path / "x.engine").exists()
    short = micronet("trt-build", chain / "float.safetensors", "--min-shape", "1x3", "--opt-shape", "1x3",
                     "--max-shape", "1x3", "-o", tmp_path / "x.engine")  # fmt: skip
    assert short.code == 2 and "four dimensions" in short.err
