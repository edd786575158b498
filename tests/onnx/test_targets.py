"""The same network as files for other targets, axes, precisions: each runs and computes what torch computes."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx.numpy_helper import to_array
from torch import nn

import micronet
from micronet.artifact.artifact import Artifact
from micronet.core.progress import Silent
from micronet.data.dataset import DataSpec
from micronet.errors import FailedError, MicronetError
from micronet.models.build import ModelSpec
from micronet.models.device import Inputs
from micronet.onnx.check import compare_outputs, require_agreement, require_other_sizes
from micronet.onnx.config import ExportConfig
from micronet.onnx.export import to_onnx, with_pairs
from micronet.onnx.integer_words import describe, slow_cause
from micronet.onnx.integers import count_integer_layers
from micronet.onnx.layer_agreement import compare_layers
from micronet.onnx.low_bits import to_int4
from micronet.onnx.optimized import costly_activations
from micronet.onnx.posttraining import prepare
from micronet.onnx.reader import read_onnx
from micronet.onnx.rewrite import embed_preprocessing, to_half
from micronet.runtimes.config import RuntimeOptions
from micronet.runtimes.onnx_cost import stored_parameters
from micronet.runtimes.onnxruntime import EXACT_INT8, metadata, open_session, session_predictor
from tests.onnx.networks import BLOCKS, IMAGES, LENET, NIN, plain, plain_file, quantized, quantized_file

SPEC = DataSpec("folder", ["a", "b"], 3, 32, [0.4, 0.5, 0.6], [0.2, 0.25, 0.3])


def kinds(proto):
    return {tensor.data_type for tensor in proto.graph.initializer}


@pytest.mark.parametrize("name", ["nin_gc", "resnet18", "lenet_bn"])  # groups, additions, a flatten
def test_for_tensorrt_every_activation_is_int8_with_zero_point_0_and_no_bias_is_int32(name):
    args = {"in_channels": 3, "image_size": 32} if name == "lenet_bn" else {"width": 0.1}
    artifact = quantized(name, args, a_sign="signed")
    proto = quantized_file(name, args, {"a_sign": "signed"}, target="tensorrt")
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            point = onnx.numpy_helper.to_array(stored[node.input[2]])
            assert point.dtype == np.int8 and not point.any()
    assert onnx.TensorProto.INT32 not in kinds(proto)
    worst = compare_layers(artifact.model, proto, IMAGES)
    assert worst and max(worst.values()) <= 1


@pytest.mark.parametrize(
    ("config", "advice"),
    [
        ({"q_type": "asym"}, "zero point.*--q-type sym"),
        ({"q_type": "asym", "a_bits": 32}, "weight_quantizer has a nonzero zero point.*--q-type sym"),
        ({}, "--q-type sym --a-sign signed"),
        ({"a_bits": 16}, "only supports int8"),
    ],
)
def test_what_tensorrt_does_not_take_is_refused_with_the_option_to_change(config, advice):
    with pytest.raises(MicronetError, match=advice):
        to_onnx(quantized(*NIN, **config), IMAGES, ExportConfig(target="tensorrt"))


@pytest.mark.parametrize("opset", [18, 21, 23])  # the oldest, the default, the newest
def test_every_opset_runs_and_agrees(opset):
    artifact = quantized(*LENET)
    proto = quantized_file(*LENET, **({} if opset == 21 else {"opset": opset}))
    assert [entry.version for entry in proto.opset_import if not entry.domain] == [opset]
    assert max(compare_layers(artifact.model, proto, IMAGES).values()) <= 1


def test_free_sides_take_other_sizes():
    artifact = quantized(*BLOCKS)
    proto = to_onnx(artifact, IMAGES, ExportConfig(dynamic="batch,height,width"))
    for shape in [(1, 3, 32, 32), (3, 3, 48, 40), (2, 3, 64, 64)]:
        images = torch.randn(shape)
        assert compare_outputs(artifact.model, proto, [images]).error < 0.05


class Divided(torch.nn.Module):
    """A convolution divided by a number that depends on the height."""

    def __init__(self, read):
        super().__init__()
        self.conv, self.read = torch.nn.Conv2d(3, 4, 3, padding=1), read

    def forward(self, x):
        return self.conv(x) / self.read(x)


def test_a_file_that_fixes_a_free_side_is_refused():
    torch.manual_seed(0)
    fixed, follows = Divided(lambda x: 32), Divided(lambda x: x.shape[2])
    follows.load_state_dict(fixed.state_dict())
    proto = to_onnx(Artifact(fixed, ModelSpec(""), []), IMAGES, ExportConfig(dynamic="batch,height"))
    require_other_sizes(fixed, proto, Inputs([IMAGES]))
    with pytest.raises(FailedError, match="from torch for inputs of 3x16x32"):
        require_other_sizes(follows, proto, Inputs([IMAGES]))


class Lines(Silent):
    """Keeps what is said."""

    def __init__(self):
        self.lines = []

    def line(self, text):
        self.lines.append(text)


class Tokens(torch.nn.Module):
    """Attends from tokens (N, T) to another sequence (N, S, 8), in steps if asked."""

    def __init__(self, loops=False):
        super().__init__()
        self.embed, self.key, self.head, self.loops = (
            torch.nn.Embedding(9, 8),
            *map(torch.nn.Linear, (8, 8), (8, 3)),
            loops,
        )

    def forward(self, ids, context):
        x = self.embed(ids)
        if self.loops:
            x = torch.stack([x[:, step] for step in range(ids.shape[1])], 1)
        return self.head((x @ self.key(context).transpose(1, 2)).softmax(-1) @ context)


def test_free_lengths_of_several_inputs_take_others():
    net, context = Tokens().eval(), torch.randn(2, 6, 8)
    inputs = Inputs([torch.ones(2, 5, dtype=torch.long), context])
    proto = to_onnx(Artifact(net, ModelSpec(""), []), inputs, ExportConfig(dynamic="batch,1"))
    shapes = [[dim.dim_param or dim.dim_value for dim in x.type.tensor_type.shape.dim] for x in proto.graph.input]
    assert shapes == [["batch", "axis1"], ["batch", "context_axis1", 8]]
    require_other_sizes(net, proto, inputs)
    said = Lines()
    looping = to_onnx(
        Artifact(Tokens(loops=True).eval(), ModelSpec(""), []), inputs, ExportConfig(dynamic="batch,1"), progress=said
    )
    assert [dim.dim_value for dim in looping.graph.input[0].type.tensor_type.shape.dim] == [0, 5]
    assert "warning: axis1 of ids stays 5, because the network fixes it" in said.lines


class CallsTwice(torch.nn.Module):
    """One layer for two sizes of maps, as the head of a detector."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 16, 3)

    def forward(self, x):
        return self.layer(x), self.layer(x[..., ::2])


def test_a_layer_that_is_called_twice_counts_once(tmp_path):
    quantized = micronet.quantize(CallsTwice(), data=[IMAGES], mode="ptq")
    onnx.save(to_onnx(quantized, IMAGES), tmp_path / "a.onnx")
    weights, biases = 3 * 16 * 9, 16
    assert stored_parameters(read_onnx(tmp_path / "a.onnx").graph) in (weights + biases, weights + 2 * biases)


def test_no_free_axis_writes_the_shape_down():
    proto = to_onnx(plain(), IMAGES, ExportConfig(dynamic="none"))
    assert [dim.dim_value for dim in proto.graph.input[0].type.tensor_type.shape.dim] == [1, 3, 32, 32]


def test_half_precision_halves_the_file_and_names_what_would_overflow():
    network = "resnet18", {"width": 0.25}
    artifact, whole, half = plain(*network), plain_file(*network), plain_file(*network, precision="fp16")
    assert half.ByteSize() < 0.55 * whole.ByteSize()
    assert half.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    require_agreement(artifact.model, half, IMAGES, compare_outputs(artifact.model, half, [IMAGES]))
    assert metadata(half)["kept_float32"] == {}
    weight = next(tensor for tensor in whole.graph.initializer if tensor.name == "fc.weight")
    weight.CopyFrom(onnx.numpy_helper.from_array(np.float32(1e7) * to_array(weight), "fc.weight"))
    _, kept = to_half(whole, IMAGES.numpy())
    assert kept and all("fc" in name for name in kept)


def test_half_precision_of_a_quantized_network_is_refused():
    with pytest.raises(MicronetError, match="float networks"):
        to_onnx(quantized(*NIN), IMAGES, ExportConfig(precision="fp16"))


def test_4_bit_storage_halves_the_weights_and_changes_no_layer():
    few = {"w_bits": 4, "first_last": "same"}
    artifact, plainly = quantized(*LENET, **few), quantized_file(*LENET, few)
    packed = quantized_file(*LENET, few, int4_storage=True)
    assert onnx.TensorProto.INT4 in kinds(packed) and packed.ByteSize() < plainly.ByteSize()
    assert max(compare_layers(artifact.model, packed, IMAGES).values()) <= 1  # other kernels, so single steps may flip
    with pytest.raises(MicronetError, match="this network has no weights of 4 bits or fewer"):
        to_int4(ir.from_proto(quantized_file(*NIN)))


@pytest.fixture(scope="module")
def of_pixels():
    """A network, and its file that takes 8-bit pixels."""
    artifact = Artifact(plain().model, ModelSpec(*NIN), data=SPEC.to_json())
    return artifact, to_onnx(artifact, IMAGES, ExportConfig(embed_preprocessing=True))


def test_embedded_preprocessing_takes_the_pixels(of_pixels):
    artifact, proto = of_pixels
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)
    mean, std = (np.array(values, np.float32).reshape(1, 3, 1, 1) for values in (SPEC.mean, SPEC.std))
    images = (pixels / np.float32(255) - mean) / std
    with torch.no_grad():
        wanted = artifact.model(torch.from_numpy(images)).numpy()
    session = open_session(proto.SerializeToString(), RuntimeOptions(), "it")
    np.testing.assert_allclose(session.run(None, {"images": pixels})[0], wanted, rtol=1e-4, atol=1e-4)
    through = session_predictor(proto.SerializeToString(), RuntimeOptions())(images)  # the predictors' interface
    np.testing.assert_allclose(through, wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(MicronetError, match="how its images are normalized"):
        embed_preprocessing(plain_file(), DataSpec())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opset": 17}, "allowed: 18 to 23"),
        ({"dynamic": "batch,depth"}, "depth"),
        ({"dynamic": "none,batch"}, "cannot be combined with axis names"),
        ({"dynamic": "batch,batch"}, "twice"),
        ({"int4_storage": True, "opset": 20}, "--opset 21 or later"),
        ({"int4_storage": True, "target": "tensorrt"}, "drop --int4-storage"),
        ({"int4_storage": True, "low_bit_storage": True}, "drop --int4-storage"),
        ({"low_bit_storage": True, "target": "tensorrt"}, "drop --low-bit-storage"),
    ],
)
def test_impossible_options_are_one_line(options, message):
    with pytest.raises(MicronetError, match=message):
        ExportConfig(**options)


@pytest.mark.parametrize(("level", "groups"), [("channel", 1), ("layer", 1), ("channel", 2)])
def test_transposed_convolutions_hold_integers_only_where_a_runtime_computes_in_them(level, groups):
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.ConvTranspose2d(8, 6, 2, 2, groups=groups), torch.nn.ReLU(),
        torch.nn.Conv2d(6, 4, 3),
    )  # fmt: skip
    artifact = micronet.quantize(network, data=[IMAGES], mode="ptq", q_level=level)
    floats, integers = to_onnx(artifact, IMAGES), to_onnx(artifact, IMAGES, pairs=False)
    for proto, expected in ((floats, ""), (integers, "DequantizeLinear"), (with_pairs(integers), "")):
        [node] = [node for node in proto.graph.node if node.op_type == "ConvTranspose"]
        producers = {name: node.op_type for node in proto.graph.node for name in node.output}
        assert producers.get(node.input[1], "") == expected
        assert producers.get(node.input[2], "") == ("" if groups == 2 and proto is integers else "DequantizeLinear")
        onnx.checker.check_model(proto, full_check=True)
    found = count_integer_layers(floats)
    assert list(found["float"].values()) == ["ONNX Runtime has no int8 ConvTranspose"]
    assert "exclude" not in slow_cause(found)  # float as it is
    ours, theirs = (open_session(p.SerializeToString(), RuntimeOptions(), "it") for p in (floats, integers))
    feed = {"images": IMAGES.numpy()}
    np.testing.assert_array_equal(ours.run(None, feed)[0], theirs.run(None, feed)[0])
    settings = onnxruntime.SessionOptions()
    settings.add_session_config_entry(EXACT_INT8, "1")  # without VNNI, sums of products overflow otherwise
    usual = onnxruntime.InferenceSession(floats.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(ours.run(None, feed)[0], usual.run(None, feed)[0])  # no optimizer rounds the weights


def test_an_activation_after_the_last_layer_does_not_make_a_network_slow():
    layers = [torch.nn.Conv2d(3, 8, 3), torch.nn.GELU(), torch.nn.Conv2d(8, 8, 3), torch.nn.Tanh()]
    proto = to_onnx(micronet.quantize(torch.nn.Sequential(*layers), data=[IMAGES], mode="ptq"), IMAGES)
    assert count_integer_layers(proto)["activations"] == ["Gelu"]


@pytest.mark.parametrize(("pairs", "blamed"), [(1, ["Sigmoid"]), (4, [])])
def test_an_activation_is_only_blamed_if_not_much_else_is_rounded(pairs, blamed):
    nodes = [onnx.helper.make_node("DequantizeLinear", ["x"], ["y"]), onnx.helper.make_node("Sigmoid", ["y"], ["z"])]
    nodes += [onnx.helper.make_node(op, ["z"], ["z"]) for op in ("QuantizeLinear", "DequantizeLinear") * pairs]
    nodes.append(onnx.helper.make_node("MatMulIntegerToFloat", ["z"], ["out"]))
    assert costly_activations(onnx.helper.make_graph(nodes, "", [], [])) == blamed
    layers = [onnx.helper.make_node("QGemm", ["out"], [f"out_{number}"]) for number in range(2)]
    assert costly_activations(onnx.helper.make_graph([*nodes, *layers], "", [], [])) == []


class Graphs(torch.nn.Module):
    """A grouped and a depthwise convolution, a recurrent layer, and a product of two activations."""

    def __init__(self, softmax=False):
        super().__init__()
        self.few, self.one = torch.nn.Conv2d(3, 12, 3), torch.nn.Conv2d(12, 24, 1, groups=6)
        self.each, self.read, self.softmax = torch.nn.Conv2d(24, 24, 3, groups=24), torch.nn.GRU(24, 4), softmax

    def forward(self, x):
        x = self.each(self.one(self.few(x))).flatten(2)
        near = x.transpose(1, 2) @ x
        return self.read((near.softmax(-1) if self.softmax else near) @ x.transpose(1, 2))[0]


def test_what_stays_in_float_and_what_is_slower_in_integers_is_named():
    lines = {}
    for softmax in (False, True):
        artifact = micronet.quantize(Graphs(softmax).eval(), data=[IMAGES], mode="ptq")
        found = count_integer_layers(to_onnx(artifact, IMAGES))
        assert found["narrow"] == ["one"] and found["recurrent"] == {"integer": 0, "all": 1} and found["products"]
        assert found["float"]["read"] == "GRU has no int8 form"
        lines[softmax] = describe({**found, "int8_ms": 2.0, "float_ms": 1.0})
    first, counted, recurrent, products = lines[False]
    assert counted.startswith("3 of 3 convolutions, 0 of 1 recurrent layer and ")
    assert first.startswith("slower than float: 2.00 ms vs. 1.00 ms; ONNX Runtime") and "(one); exclude" in first
    assert products.endswith(" of two activations: only products with weights are quantized")
    assert recurrent == "float: read: GRU has no int8 form"
    assert ", as in attention: integers are faster there only if" in lines[True][-1]


class Waves(torch.nn.Conv1d):
    def forward(self, wave):
        return super().forward(wave)


def test_a_relu_that_signed_integers_keep_from_being_fused_is_named():
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3), nn.Flatten())
    quantized = micronet.quantize(net, data=[torch.randn(4, 3, 8, 8)], mode="ptq", a_sign="signed")
    found = count_integer_layers(to_onnx(quantized, torch.randn(2, 3, 8, 8)))
    assert found["convolutions"] == {"integer": 1, "all": 2}
    assert "Relu clips" in found["float"]["0"] and "--a-sign signed" in found["float"]["0"]


def test_an_input_that_is_no_image_has_the_name_of_its_argument():
    proto = to_onnx(Artifact(Waves(5, 2, 3), ModelSpec("net")), torch.zeros(2, 5, 9))
    assert [each.name for each in (*proto.graph.input, *proto.graph.output)] == ["wave", "scores"]


class Loop(torch.nn.Module):
    """Computes one sample after the other, which torch's exporter unrolls for the batch that it is given."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(6, 4)

    def forward(self, left, right):
        return torch.stack([self.layer(row) for row in left + right])


def test_a_loop_over_the_batch_is_exported_for_one_sample_at_once_or_refused():
    torch.manual_seed(0)
    inputs = Inputs([torch.randn(3, 6), torch.randn(3, 6)])
    int8 = micronet.quantize(Loop(), mode="ptq", data=[tuple(inputs)], first_last="8bit")
    with pytest.raises(MicronetError, match=r"fixes the size of the axis batch .* --dynamic none"):
        to_onnx(int8, inputs)
    proto = to_onnx(int8, inputs, ExportConfig(dynamic="none"))
    assert compare_outputs(int8.model, proto, [inputs], classes=False).error < 1e-2  # a step of 8 bits
    assert set(compare_layers(int8.model, proto, inputs).values()) <= {0, 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed_preprocessing": True}, "this network takes other inputs"),
        ({"dynamic": "batch,height"}, "the axes of this network's inputs are batch, 5, 9"),
    ],
)
def test_options_for_images_are_refused_for_other_inputs(options, message):
    spec = DataSpec(inputs=[{"shape": [5, 9], "dtype": "float32"}])
    artifact = Artifact(torch.nn.Conv1d(5, 2, 3), ModelSpec("net"), data=spec.to_json())
    with pytest.raises(MicronetError, match=message):
        to_onnx(artifact, torch.zeros(2, 5, 9), ExportConfig(**options))


def test_the_command_takes_the_options(micronet, chain, tmp_path):
    small = micronet("export-onnx", chain / "float.safetensors", "--precision", "fp16", "--embed-preprocessing",
                     "--dynamic", "none", "-o", tmp_path / "half.onnx", "--json")  # fmt: skip
    assert small.code == 0 and small.json["kept_float32"] == {}
    assert micronet("evaluate", tmp_path / "half.onnx", "--json").code == 0
    refused = micronet("export-onnx", chain / "int8.safetensors", "--target", "tensorrt", "-o", tmp_path / "t.onnx")
    assert refused.code == 2 and "--a-sign signed" in refused.err and not (tmp_path / "t.onnx").exists()


def test_half_keeps_what_it_cannot_hold_at_either_end():
    for factor, why in ((1e9, "too large"), (1e-9, "too small")):
        proto = plain_file()
        weight = next(tensor for tensor in proto.graph.initializer if tensor.name == "features.10.conv.weight")
        weight.CopyFrom(onnx.numpy_helper.from_array(np.float32(factor) * to_array(weight), weight.name))
        _, kept = to_half(proto, IMAGES.numpy())
        assert any("features.10" in name and said == why for name, said in kept.items())


def test_sixteen_bits_need_a_later_opset():
    with pytest.raises(MicronetError, match="--opset 21 or later"):
        to_onnx(quantized(*NIN, w_bits=16, a_bits=16), IMAGES, ExportConfig(opset=18))


def test_4_bit_weights_with_zero_points_stay_as_they_are():
    few = {"w_bits": 4, "q_type": "asym", "first_last": "same"}
    packed = quantized_file(*NIN, few, int4_storage=True)
    assert max(compare_layers(quantized(*NIN, **few).model, packed, IMAGES).values()) <= 1


def test_pixels_for_a_model_that_does_not_record_its_normalization_are_refused(of_pixels):
    proto = onnx.ModelProto()
    proto.CopyFrom(of_pixels[1])
    del proto.metadata_props[:]
    with pytest.raises(MicronetError, match="does not record how to normalize its images"):
        session_predictor(proto.SerializeToString(), RuntimeOptions())(IMAGES.numpy())


def test_a_network_that_does_not_take_its_input_or_torch_does_not_export_is_one_plain_line(capfd):
    class Branches(torch.nn.Module):
        def forward(self, x):
            return x.flatten(1) + 1 if x.sum() > 0 else x.flatten(1)

    flat = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 2))
    for model, images, message in (
        (flat, torch.randn(2, 3, 48, 48), "does not accept an input of shape 2x3x48x48: mat1 and mat2"),
        (Branches(), IMAGES, "cannot export this network to ONNX: a size depends on the values"),
    ):
        with pytest.raises(MicronetError, match=message) as caught:
            to_onnx(Artifact(model.eval(), ModelSpec("mine.py:Mine")), images)
        assert "\x1b" not in str(caught.value) and "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_too_many_weights_are_told_before_the_export_and_integers_are_counted_as_such(monkeypatch):
    whole = plain()
    size = sum(tensor.nbytes for tensor in whole.model.state_dict().values())
    monkeypatch.setattr("micronet.runtimes.onnxruntime.MAX_WEIGHT_BYTES", size // 2)
    with_integers = quantized(*NIN)
    assert to_onnx(with_integers, IMAGES).ByteSize() < size  # a quarter of the weights
    proto = onnx.ModelProto()
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(size, np.uint8), "weight"))
    monkeypatch.setattr("torch.onnx.export", None)
    for attempt in (lambda: to_onnx(whole, IMAGES), lambda: prepare(proto)):
        with pytest.raises(MicronetError, match=r"2 GiB.*prune or quantize"):
            attempt()
