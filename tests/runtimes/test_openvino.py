"""ONNX files in OpenVINO: the same outputs as in ONNX Runtime, and a report of what it executed in integers."""

import gc
import signal
from importlib.util import find_spec

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import micronet
from micronet.core.folders import Folder, write_folder
from micronet.core.machine import has_vnni
from micronet.errors import MicronetError
from micronet.onnx.export import to_onnx
from micronet.onnx.integer_words import describe
from micronet.onnx.integers import FLOAT_TRANSPOSED
from micronet.runtimes import openvino
from micronet.runtimes.config import RuntimeOptions
from micronet.runtimes.network import open_network
from micronet.runtimes.onnxruntime import note
from micronet.runtimes.openvino import executed_layers, stored_layers

if find_spec("openvino") is None:  # importing it would let it report that to its maker
    pytest.skip("needs openvino", allow_module_level=True)
# Without VNNI, OpenVINO's sums of 8-bit products saturate.
PTQ = {"mode": "ptq"} if has_vnni() else {"mode": "ptq", "w_bits": 7, "first_last": "same"}
IMAGES = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("openvino")
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16), nn.Flatten(), nn.Linear(2304, 5)
    )
    quantized = micronet.quantize(net, data=[IMAGES], **PTQ)
    for name, proto in (("float", micronet.export_onnx(net, IMAGES[:2])), ("int8", to_onnx(quantized, IMAGES[:2]))):
        note(proto, history=[{"stage": "train"}])
        onnx.save(proto, folder / f"{name}.onnx")
    return folder


@pytest.mark.parametrize("name", ["float", "int8"])
def test_openvino_computes_what_onnx_runtime_computes(files, name):
    ours, theirs = (
        open_network(files / f"{name}.onnx", RuntimeOptions(runtime=runtime)) for runtime in ("openvino", "onnxruntime")
    )
    assert ours.runtime == "openvino" and ours.stages == theirs.stages == ["train"]
    assert (ours.params, ours.macs((3, 16, 16))) == (theirs.params, theirs.macs((3, 16, 16)))
    for count in (1, 5, 2):  # one compiled model for batches of any size
        found, expected = ours(IMAGES[:count].numpy()), theirs(IMAGES[:count].numpy())
        # Both sum integers exactly, but round each layer's output once: one step of 255 of the range, and ties.
        atol = 1e-5 if name == "float" else 2 * float(np.ptp(expected)) / 255
        np.testing.assert_allclose(found, expected, atol=atol)
    if name == "float":
        assert ours.integer_layers() is None
    else:
        assert ours.integer_layers()["convolutions"] == {"integer": 2, "all": 2}


def test_a_layer_in_float_is_named_with_its_kernel(files):
    proto = onnx.load(files / "int8.onnx")
    names = [node.name for node in proto.graph.node if node.op_type == "Conv"]
    kernels = {f"{names[0]}/WithoutBiases": ("u8", "jit_I8"), names[1]: ("f32", "jit_f32")}
    found = executed_layers(stored_layers(proto), kernels)
    assert found["convolutions"] == {"integer": 1, "all": 2} and found["linear"] == {"integer": 0, "all": 1}
    assert sorted(found["float"].values()) == [
        "OpenVINO computes it in f32 (jit_f32)",
        "OpenVINO does not show it among its operators",
    ]
    assert executed_layers(stored_layers(onnx.load(files / "float.onnx")), {}) is None
    weight = onnx.numpy_helper.from_array(np.ones((3, 2, 2, 2), np.float32), "w")
    node = onnx.helper.make_node("ConvTranspose", ["x", "w"], ["y"], name="up")
    up = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], [], [weight]))
    found = executed_layers([*stored_layers(proto), *stored_layers(up)], kernels)
    assert found["float"]["up"] == FLOAT_TRANSPOSED  # not its weights, which are 8-bit in the artifact


def test_a_file_that_openvino_cannot_run_is_refused_in_one_line(files, tmp_path):
    proto = onnx.load(files / "float.onnx")
    node = next(node for node in proto.graph.node if node.op_type == "Relu")
    node.op_type, node.domain = "Unheard", "of.nobody"
    proto.opset_import.append(onnx.helper.make_opsetid("of.nobody", 1))
    onnx.save(proto, tmp_path / "odd.onnx")
    with pytest.raises(MicronetError, match=r"^OpenVINO cannot run .*odd.onnx: [^\n]+$") as caught:
        open_network(tmp_path / "odd.onnx", RuntimeOptions(runtime="openvino"))
    assert "Unheard" in str(caught.value)
    with pytest.raises(MicronetError, match=r"--device cuda: --runtime openvino only runs on the CPU"):
        open_network(files / "float.onnx", RuntimeOptions(runtime="openvino", device="cuda"))


def test_a_folder_computes_what_its_onnx_file_computes_in_streams_too(files, tmp_path, monkeypatch):
    monkeypatch.setattr(openvino, "MEASURE_SECONDS", 0.05)
    proto = onnx.load(files / "int8.onnx")
    for name in ("made", "again"):
        (tmp_path / name).mkdir()
        note = {"target": "openvino", **openvino.write(proto, tmp_path / name)}
    written, again = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("made", "again")
    )
    assert written == again  # OpenVINO's own names are from a counter
    write_folder(tmp_path / "net", Folder(written, note))
    ours = open_network(tmp_path / "net", RuntimeOptions())
    theirs = open_network(files / "int8.onnx", RuntimeOptions(runtime="openvino"))
    # The same integers; OpenVINO may write the scale before or behind a bias, which rounds the output once more.
    np.testing.assert_allclose(ours(IMAGES.numpy()), theirs(IMAGES.numpy()), rtol=1e-5, atol=1e-6)
    assert ours.integer_layers() == theirs.integer_layers()
    assert (ours.params, ours.macs(), ours.stages) == (theirs.params, theirs.macs((3, 16, 16)), theirs.stages)
    found = ours.throughput(IMAGES[:1].numpy())
    assert found["images_per_s"] > 0 and found["streams"] >= 1


def test_ctrl_c_is_handled_after_networks_are_closed(files):
    opened = [open_network(files / f"{name}.onnx", RuntimeOptions(runtime="openvino")) for name in ("float", "int8")]
    while opened:  # the first one first
        opened.pop(0)(IMAGES.numpy())
        gc.collect()
    before = signal.signal(signal.SIGINT, lambda *_: handled.append(True))
    handled = []
    try:
        signal.raise_signal(signal.SIGINT)  # on processors with AMX, a crash if its stack is freed
    finally:
        signal.signal(signal.SIGINT, before)
    assert handled


class Gated(nn.Module):
    """A depthwise convolution between hardswishes, with squeeze and excitation, on a map of 2x2."""

    def __init__(self):
        super().__init__()
        self.first, self.depthwise = nn.Conv2d(3, 64, 3, 2, 1), nn.Conv2d(64, 64, 3, 2, 1, groups=64)
        self.squeeze, self.excite = nn.Conv2d(64, 16, 1), nn.Conv2d(16, 64, 1)
        self.last, self.scores = nn.Conv2d(64, 24, 1), nn.Linear(24, 5)

    def forward(self, x):
        x = F.hardswish(self.depthwise(F.hardswish(self.first(x))))
        x = x * F.hardsigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return self.scores(self.last(x).mean((2, 3)))


def test_a_small_batch_after_a_larger_one_is_computed_alike(tmp_path):
    torch.manual_seed(0)
    images = torch.randn(32, 3, 8, 8)
    quantized = micronet.quantize(Gated().eval(), data=[images], mode="ptq", q_type="sym", a_sign="signed")
    openvino.write(to_onnx(quantized, images[:2]), tmp_path)
    fresh, used = (openvino.OpenVinoSession(tmp_path / openvino.MODEL, {}, RuntimeOptions(threads=1)) for _ in range(2))
    used.run(None, {"images": images.numpy()})
    again, one = (each.run(None, {"images": images[:1].numpy()})[0] for each in (used, fresh))
    np.testing.assert_allclose(again, one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("op", ["ReduceMax", "ReduceMin"])
def test_an_extreme_over_dropped_axes_is_quantized_with_its_own_scale(op, tmp_path):
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 21]> g (float[n, 20, 6] x) => (float[n, 6] y)'
        "<int64[1] axes = {1}, float scale = {0.02}, uint8 zero = {128}>"
        f"{{ m = {op}<keepdims = 0>(x, axes) q = QuantizeLinear(m, scale, zero)"
        " y = DequantizeLinear(q, scale, zero) }"
    )
    onnx.save(model, tmp_path / "a.onnx")
    x = np.random.default_rng(0).standard_normal((4, 20, 6), np.float32)
    ours, theirs = (
        open_network(tmp_path / "a.onnx", RuntimeOptions(runtime=runtime)) for runtime in ("openvino", "onnxruntime")
    )
    np.testing.assert_allclose(ours(x), theirs(x), atol=1e-6)


@pytest.mark.parametrize(
    ("activation", "zero"), [("Identity", 128), ("Relu", 0), ("Relu", 128), ("Gelu", 128), ("Clip", 0)]
)
def test_a_bias_before_rounding_is_added_to_its_own_channel(tmp_path, activation, zero):
    """The class token of a vision transformer is as long as the batch, so the convolution's shape is read as well."""
    limits = ", bottom, top" if activation == "Clip" else ""
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 21]> g (float[n, 1, 4, 4] x) => (float[n, 17, 2] y)'
        "<float[2, 1, 1, 1] w = {1, 1}, float[2] b = {0.5, -0.3}, float[1, 1, 2] token = {1, 2}, float scale = {0.02},"
        " float bottom = {0}, float top = {6},"
        f" uint8 zero = {{{zero}}}, int64[1] first = {{0}}, int64[2] rest = {{1, 2}}, int64[3] flat = {{0, 16, 2}}> {{"
        f" c = Conv(x, w, b) a = {activation}(c{limits}) q = QuantizeLinear(a, scale, zero)"
        " d = DequantizeLinear(q, scale, zero)"
        " t = Transpose<perm = [0, 2, 3, 1]>(d) r = Reshape(t, flat)"
        " shape = Shape(x) n0 = Gather(shape, first) size = Concat<axis = 0>(n0, rest) e = Expand(token, size)"
        " y = Concat<axis = 1>(e, r) }"
    )
    onnx.save(model, tmp_path / "a.onnx")
    x = np.random.default_rng(0).standard_normal((4, 1, 4, 4), np.float32)
    ours, theirs = (
        open_network(tmp_path / "a.onnx", RuntimeOptions(runtime=runtime)) for runtime in ("openvino", "onnxruntime")
    )
    np.testing.assert_allclose(ours(x), theirs(x), atol=0.021)  # a step: roundings of halves differ


class Tokens(nn.Module):
    """Patches with a class token or a shifted window, a layer norm, a residual sum and the mean of the tokens."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.patches, self.token = kind, nn.Conv2d(3, 32, 4, 4), nn.Parameter(torch.randn(1, 1, 32))
        self.norm, self.inner, self.scores = nn.LayerNorm(32), nn.Linear(32, 32), nn.Linear(32, 5)

    def forward(self, x):
        x = self.patches(x)
        if self.kind == "window":
            x = torch.roll(self.norm(x.permute(0, 2, 3, 1)), (-1, -1), (1, 2))
            return self.scores(F.pad(x, (0, 0, 0, 0, 0, 0)))
        x = x.flatten(2).transpose(1, 2)
        if self.kind == "pool":
            pooled = F.avg_pool1d(x.relu().transpose(1, 2), x.shape[1]).transpose(1, 2)
            return F.log_softmax(self.scores(pooled), 2)
        if self.kind == "token":
            return self.scores(torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1))
        x = self.norm(x)
        return self.scores(self.norm(x + F.gelu(self.inner(x))).mean(1))


@pytest.mark.parametrize("kind", ["window", "token", "mean", "pool"])
def test_tokens_are_computed_in_integers_as_in_onnx_runtime(kind, tmp_path):
    """Among others, OpenVINO 2026.4 crashes on shifted windows and reads beyond the tokens of large batches."""
    torch.manual_seed(0)
    images = torch.randn(48, 3, 16, 16)
    onnx.save(to_onnx(micronet.quantize(Tokens(kind).eval(), data=[images], **PTQ), images[:2]), tmp_path / "a.onnx")
    ours, theirs = (
        open_network(tmp_path / "a.onnx", RuntimeOptions(runtime=runtime)) for runtime in ("openvino", "onnxruntime")
    )
    expected = theirs(images.numpy())
    assert np.linalg.norm(ours(images.numpy()) - expected) < 0.05 * np.linalg.norm(expected)
    counts = ours.integer_layers()
    assert not counts["float"], counts


@pytest.mark.parametrize(("vnni", "bits", "said"), [(False, 8, True), (False, 7, False), (True, 8, False)])
def test_sums_that_saturate_without_vnni_are_said_first(vnni, bits, said, monkeypatch):
    monkeypatch.setattr(openvino, "has_vnni", lambda: vnni)
    torch.manual_seed(0)
    quantized = micronet.quantize(nn.Linear(8, 3), data=[torch.randn(9, 8)], mode="ptq", w_bits=bits, first_last="same")
    [layer] = stored_layers(to_onnx(quantized, torch.randn(2, 8)))
    found = executed_layers([layer], dict.fromkeys(layer.nodes, ("i8", "gemm")))
    assert ("1 layer can saturate in OpenVINO" in describe(found)[0]) == said
