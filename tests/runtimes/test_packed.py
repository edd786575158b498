"""Packed networks: small, exact, and refused where they are damaged."""

import json
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F

from micronet.artifact.artifact import Artifact, load
from micronet.cli.app import run as command
from micronet.errors import MicronetError
from micronet.models.build import ModelSpec
from micronet.onnx.export import to_onnx
from micronet.packed.codec import find_levels, pack, packed_bytes, unpack
from micronet.packed.file_format import read, to_bytes
from micronet.packed.from_onnx import pack_model
from micronet.packed.program import Operation, Program
from micronet.packed.thresholds import threshold
from micronet.quantization.fold import fold_model
from micronet.runtimes.packed.numpy_backend import conv_sums, run
from micronet.runtimes.packed.predictor import PackedNetwork
from tests.onnx.test_onnx import IMAGES, quantized
from tests.onnx.test_targets import plain

BINARY = {"w_bits": "binary", "a_bits": "binary"}
TERNARY = {"w_bits": "ternary", "a_bits": "binary"}
NETWORKS = {"nin": {"width": 0.1}, "nin_gc": {"width": 0.25}, "resnet18": {"width": 0.1}}
SCHEMES = {
    "W1A1": BINARY, "WtA1": TERNARY, "W1A1-8bit": {**BINARY, "first_last": "8bit"}, "W8A8": {},
    "W8A8-asym": {"q_type": "asym"}, "W2A8": {"w_bits": 2, "method": "lsq"}, "W1A8": {"w_bits": "binary"},
    "WtA8": {"w_bits": "ternary"}, "W4A4-dorefa": {"w_bits": 4, "a_bits": 4, "method": "dorefa"},
}  # fmt: skip


@given(
    st.integers(-1000, 1000), st.integers(1, 9), st.integers(1, 300),
    st.lists(st.integers(0, 10**6), min_size=1, max_size=80),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_unpacking_gives_back_the_integers_bit_for_bit(offset, step, count, drawn):
    values = np.array([offset + step * (item % count) for item in drawn])
    levels = find_levels(values)
    data = pack(values, levels)
    assert data.size == packed_bytes(len(values), levels.number)
    np.testing.assert_array_equal(unpack(data, levels, values.shape), values)


@pytest.mark.parametrize(("values", "bits"), [([-1, 1], 1), ([-1, 0, 1], 1.6), ([-15, -13, 15], 4), ([-8, -7, 7], 4)])
def test_weights_are_as_wide_as_their_levels(values, bits):
    drawn = np.array(values * 400)
    assert pack(drawn, find_levels(drawn)).size == pytest.approx(drawn.size * bits / 8, abs=1)


@pytest.mark.parametrize("seed", range(40))
def test_sums_of_integers_are_those_of_torch(seed):
    draw = random.Random(seed)
    groups, kernel = draw.choice([1, 2, 4]), draw.choice([1, 3, 5])
    stride, pad, dilation = draw.choice([1, 2]), draw.choice([0, 1, 2]), draw.choice([1, 2])
    rng = np.random.default_rng(seed)
    highest = draw.choice([1, 255])
    x = rng.integers(-1 if highest == 1 else 0, highest, (2, 11, 12, 8), endpoint=True)
    weight = rng.integers(-draw.choice([1, 127]), 127, (12, 8 // groups, kernel, kernel), endpoint=True)
    at = {"group": groups, "stride": [stride] * 2, "pads": [pad] * 4, "dilation": [dilation] * 2}
    wanted = F.conv2d(torch.from_numpy(x).permute(0, 3, 1, 2).double(), torch.from_numpy(weight).double(), None,
                      stride, pad, dilation, groups)  # fmt: skip
    sums = conv_sums(x, Operation("conv", [0], at, weight.astype(np.int32)))
    np.testing.assert_array_equal(sums.astype(np.float64), wanted.permute(0, 2, 3, 1).numpy())


@pytest.mark.parametrize("seed", range(20))
def test_thresholds_are_the_sign_of_the_scaled_sum(seed):
    rng = np.random.default_rng(seed)
    weight = rng.choice([-1, 1], (6, 4, 3, 3)).astype(np.int32)
    scale = rng.choice([-1, 1, 0.0], 6) * rng.random(6)
    bias = rng.choice([0.0, *rng.normal(size=5)], 6)
    conv = Operation("conv", [0], {"pads": [1] * 4}, weight, scale.astype(np.float32), bias.astype(np.float32))
    x = rng.choice([-1, 1], (2, 5, 5, 4)).astype(np.int8)
    exact = conv_sums(x, conv).astype(np.float64) * conv.scale.astype(np.float64) + conv.bias.astype(np.float64)
    made = threshold(conv, 1.0)
    np.testing.assert_array_equal(conv_sums(x, made) >= made.limits, exact >= 0)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_packed_network_computes_what_torch_computes(network, scheme, tmp_path):
    artifact = quantized(network, NETWORKS[network], **SCHEMES[scheme])
    model, record = fold_model(artifact.model, artifact.history)
    proto = to_onnx(artifact.after(record, model=model), IMAGES)
    data = to_bytes(pack_model(proto))
    (tmp_path / "x.packed").write_bytes(data)
    ours = PackedNetwork(tmp_path / "x.packed")(IMAGES.numpy())
    with torch.no_grad():
        theirs = model.eval()(IMAGES).numpy()
    spread = np.linalg.norm(theirs - theirs.mean(1, keepdims=True))
    # An 8-bit first layer's sums are often exactly 0, which is +1 here; in float a rounding decides.
    assert np.linalg.norm(ours - theirs) < (0.5 if scheme == "W1A1-8bit" else 0.01) * spread
    assert len(data) < proto.ByteSize()


def test_float_networks_pack_too():
    artifact = plain("resnet18", {"width": 0.1})
    proto = to_onnx(artifact, IMAGES)
    with torch.no_grad():
        np.testing.assert_allclose(
            run(pack_model(proto), IMAGES.numpy()), artifact.model(IMAGES).numpy(), rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize(
    ("config", "most"),
    [(BINARY, 210_000), (TERNARY, 250_000), ({}, 630_000), ({**BINARY, "first_last": "8bit"}, 120_000)],
    ids=["binary", "ternary", "W8A8", "binary-8bit-ends"],
)
def test_nin_gc_is_as_small_as_promised(config, most):
    program = pack_model(to_onnx(quantized("nin_gc", {}, **config), IMAGES))
    data = to_bytes(program)
    parts = 0
    for operation in program.operations:
        for values in (operation.weight, operation.limits):
            if values is not None and values.dtype.kind == "i":
                parts += packed_bytes(values.size, find_levels(values).number)
        floats = [operation.weight, operation.scale, operation.bias]
        parts += sum(
            4 * v.size for v in floats if v is not None and not (v is operation.weight and v.dtype.kind == "i")
        )
    assert len(data) <= most
    assert len(data) <= parts + 8 * 1024


@pytest.fixture(scope="module")
def packed(chain, tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "int8.packed"
    assert command(["pack", str(chain / "fused.safetensors"), "-o", str(path), "--quiet"]) == 0
    return path


def test_the_commands_take_packed_files(micronet, chain, packed):
    rows = micronet("compare", chain / "fused.safetensors", packed, "--json").json["rows"]
    assert [row["runtime"] for row in rows] == ["torch", "packed"]
    assert rows[1]["agreement"] >= 0.999 and rows[1]["size_bytes"] == packed.stat().st_size
    assert rows[1]["stages"] == [record.stage for record in load(chain / "fused.safetensors").history]
    assert rows[1]["macs"] == rows[0]["macs"] > 0
    assert micronet("evaluate", packed, "--json").json["accuracy"] == rows[1]["accuracy"]
    assert micronet("evaluate", packed, "--device", "cuda").code == 2
    assert micronet("evaluate", packed.with_name("none.packed")).code == 2


def test_it_runs_in_a_process_without_torch(packed):
    code = (
        "import sys, numpy as np\n"
        "from micronet.runtimes.packed.predictor import PackedNetwork\n"
        f"network = PackedNetwork({str(packed)!r})\n"
        "print(network(np.zeros((2, 3, 32, 32), np.float32)).shape, network.classes[0])\n"
        "assert 'torch' not in sys.modules and 'onnx' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["(2,", "10)", "0"]


def test_damaged_files_are_one_line(packed, tmp_path):
    whole = packed.read_bytes()
    damaged = tmp_path / "x.packed"
    cases = [b"", whole[:100], whole[:-7], whole + b"x", b"\xff" * 200]
    header = int.from_bytes(whole[:8], "little")
    told = json.loads(json.loads(whole[8 : 8 + header])["__metadata__"]["micronet-packed"])
    first, *rest = told["operations"]
    for key, value in [
        ("format", 99), ("shape", [3, 32]), ("shape", [3, 0, 32]), ("operations", []), ("about", 3),
        ("operations", [{"op": "exec", "in": [0]}]), ("operations", [{"op": "relu", "in": [5]}]),
        ("operations", [{"op": "conv", "in": [0], "shape": [10**9, 10**9], "levels": [0, 1, 2]}]),
        ("operations", told["operations"][:-6]), ("operations", [{**first, "stride": [0, 1]}, *rest]),
        ("operations", [{**first, "kernel": 3}, *rest]), ("operations", [{**first, "surprise": 1}, *rest]),
        ("operations", [{**first, "scale": None}, *rest]), ("operations", [{**first, "pads": [9**9] * 4}, *rest]),
        ("operations", [{"op": "relu", "in": []}]), ("operations", 7),
    ]:  # fmt: skip
        changed = json.loads(whole[8 : 8 + header])
        changed["__metadata__"] = {"micronet-packed": json.dumps({**told, key: value})}
        text = json.dumps(changed)
        body = text.encode() + b" " * (-len(text) % 8)
        cases.append(len(body).to_bytes(8, "little") + body + whole[8 + header :])
    for data in cases:
        damaged.write_bytes(data)
        with pytest.raises(MicronetError, match=r"packed network|damaged|format"):
            read(damaged)


def test_images_of_another_size_or_kind_are_refused(packed):
    with pytest.raises(MicronetError, match=r"takes images of \[3, 32, 32\], not \[3, 16, 16\]"):
        PackedNetwork(packed)(np.zeros((1, 3, 16, 16), np.float32))
    with pytest.raises(MicronetError, match="as they were normalised for training, not uint8"):
        PackedNetwork(packed)(np.zeros((1, 3, 32, 32), np.uint8))


def test_what_the_runtime_does_not_have_is_named():
    artifact = plain("torchvision:vit_b_16", {"image_size": 32, "num_classes": 3})
    with pytest.raises(MicronetError, match=r"does not have .*LayerNormalization"):
        pack_model(to_onnx(artifact, IMAGES))


def test_a_pool_with_gaps_is_named():
    class Gaps(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.pool = torch.nn.Conv2d(3, 8, 3), torch.nn.MaxPool2d(3, 1, dilation=2)

        def forward(self, x):
            return self.pool(self.conv(x)).mean((2, 3))

    with pytest.raises(MicronetError, match="no pools with gaps"):
        pack_model(to_onnx(Artifact(Gaps().eval(), ModelSpec("gaps.py:Gaps")), IMAGES))


class Reshaped(torch.nn.Module):
    """Maps of 8 channels and 5 x 5 pixels, shuffled and made anew in some shape."""

    def __init__(self, shuffled, shape):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, 7)
        self.shuffled, self.shape = shuffled, shape

    def forward(self, x):
        x = self.conv(x)
        if self.shuffled:
            x = x.reshape(-1, 2, 4, 5, 5).transpose(1, 2)
        return x.reshape(self.shape)


def test_a_shuffle_may_end_flat():
    model = Reshaped(True, (-1, 200)).eval()
    found = run(pack_model(to_onnx(Artifact(model, ModelSpec("x.py:Reshaped")), IMAGES)), IMAGES.numpy())
    with torch.no_grad():
        np.testing.assert_allclose(found, model(IMAGES).numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("shuffled", "shape"), [(False, (-1, 8)), (True, (-1, 8)), (True, (-1, 40, 1, 5))])
def test_other_reshapes_are_named(shuffled, shape):
    with pytest.raises(MicronetError, match=r"Reshape.*: the packed runtime (reshapes|shuffles)"):
        pack_model(to_onnx(Artifact(Reshaped(shuffled, shape).eval(), ModelSpec("x.py:Reshaped")), IMAGES))


def test_numpy_gives_no_scores_for_no_images(packed, monkeypatch):
    monkeypatch.setitem(sys.modules, "micronet.runtimes.packed.compiled_backend", None)
    network = PackedNetwork(packed)
    assert network.kernel.startswith("numpy") and network(IMAGES.numpy()[:0]).shape == (0, 10)


def test_a_map_beyond_memory_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "micronet.runtimes.packed.compiled_backend", None)
    conv = Operation("conv", [0], {"pads": [2000] * 4}, np.ones((1 << 22, 1, 1, 1), np.float32))
    (tmp_path / "x.packed").write_bytes(to_bytes(Program([conv], [1, 1, 1], {})))
    with pytest.raises(MicronetError, match="Unable to allocate"):
        PackedNetwork(tmp_path / "x.packed")(np.zeros((1, 1, 1, 1), np.float32))


def test_scores_that_are_not_finite_are_no_prediction(micronet, packed, tmp_path):
    program = read(packed)
    weight = np.full((10, 3, 1, 1), 3e38, np.float32)
    program.operations[:] = [Operation("conv", [0], {}, weight), Operation("mean", [1])]
    (tmp_path / "x.packed").write_bytes(to_bytes(program))
    Image.new("RGB", (32, 32), "white").save(tmp_path / "x.png")
    done = micronet("predict", tmp_path / "x.packed", tmp_path / "x.png")
    assert done.code == 1 and "not finite" in done.err


def test_sixteen_bit_activations_pack():
    artifact = quantized("nin", {"width": 0.1}, w_bits=16, a_bits=16)
    program = pack_model(to_onnx(artifact, IMAGES))
    with torch.no_grad():
        wanted = artifact.model.eval()(IMAGES).numpy()
    assert np.linalg.norm(run(program, IMAGES.numpy()) - wanted) < 0.01 * np.linalg.norm(wanted)
