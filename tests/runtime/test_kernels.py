"""The compiled kernels: the same integers as numpy's, for every shape, and however the differing bits are counted."""

import os
import random
import subprocess
import sys

import numpy as np
import pytest

from micronet.export.onnx import to_onnx
from micronet.export.pack import pack_model
from micronet.runtime.packed.predictor import PackedNetwork
from micronet.runtime.packed.program import Operation, to_bytes
from micronet.runtime.packed.run import RUN, Value, conv_sums, run
from tests.export.test_onnx import IMAGES, quantized

pytest.importorskip("numba", reason="pip install 'micronet[fast]'")

from micronet.runtime.packed import kernels
from micronet.runtime.packed.fast import Bits, FastSteps, pack, pool, prepare, shuffle


def signs(seed, *shape):
    return np.random.default_rng(seed).choice([-1, 1], shape).astype(np.int8)


def drawn(seed):
    """A convolution of signs, and its input."""
    draw, rng = random.Random(seed), np.random.default_rng(seed)
    groups = draw.choice([1, 1, 1, 2])
    inner, each = (draw.choice([8, 16, 24]), draw.choice([8, 40])) if groups > 1 else (
        draw.choice([1, 7, 8, 24, 96, 300]), draw.choice([1, 20, 32, 70, 96]))  # fmt: skip
    kernel = draw.choice([1, 3, 5])
    levels = draw.choice([[-1, 1], [-1, 0, 1]])
    at = {"stride": [draw.choice([1, 2])] * 2, "pads": [draw.choice([0, 1, 2]) for _ in range(4)],
          "dilation": [draw.choice([1, 2])] * 2, "group": groups}  # fmt: skip
    weight = rng.choice(levels, (each * groups, inner, kernel, kernel)).astype(np.int32)
    limits = rng.integers(-12, 12, len(weight)).astype(np.int32)
    side = draw.choice([9, 10, 13])
    return Operation("threshold", [0], at, weight, limits=limits), signs(seed, 2, side, side - 1, inner * groups)


@pytest.mark.parametrize("seed", range(60))
def test_signs_behind_a_convolution_are_numpys(seed):
    operation, x = drawn(seed)
    wanted = RUN["threshold"](operation, Value(x, 1.0)).data
    np.testing.assert_array_equal(prepare(operation)(pack(x)).value().data, wanted)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("unit", [1, 64])
def test_sums_of_a_convolution_are_numpys(seed, unit):
    operation, x = drawn(seed)
    alone = {key: value for key, value in operation.attributes.items() if key != "group"}
    weight = operation.weight[:, : operation.weight.shape[1]] * unit
    x = x[..., : weight.shape[1]]
    conv = Operation("conv", [0], alone, weight, scale=np.ones(1, np.float32))
    np.testing.assert_array_equal(prepare(conv).sums(pack(x)) * unit, conv_sums(x, conv))


@pytest.mark.parametrize("channels", [8, 40, 96])
def test_pools_and_shuffles_of_bits_are_those_of_signs(channels):
    x = signs(0, 2, 9, 7, channels)
    pooling = Operation("max_pool", [0], {"kernel": [3, 2], "stride": [2, 1], "pads": [1, 0, 1, 1]})
    shuffling = Operation("shuffle", [0], {"groups": 4})
    for operation, fast in ((pooling, pool), (shuffling, shuffle)):
        wanted = RUN[operation.kind](operation, Value(x, 1.0)).data
        np.testing.assert_array_equal(fast(operation, pack(x)).value().data, wanted)


def test_what_has_no_fast_form_is_left_to_numpy():
    weight = np.ones((8, 12, 3, 3), np.int32)
    limits = np.zeros(8, np.int32)
    assert prepare(Operation("threshold", [0], {"group": 2}, weight[:, :6], limits=limits)) is None  # no whole bytes
    assert prepare(Operation("threshold", [0], {}, weight * [[[[1, 2, 3]]]], limits=limits)) is None  # more levels
    assert prepare(Operation("threshold", [0], {}, np.ones((8, 2048, 3, 3), np.int32), limits=limits)) is None
    assert prepare(Operation("conv", [0], {}, weight.astype(np.float32))) is None


@pytest.mark.parametrize(
    "config",
    [{"w_bits": "binary"}, {"w_bits": "ternary"}, {"w_bits": "binary", "first_last": "8bit"},
     {"w_bits": "binary", "first_last": "same"}],
    ids=["W1A1", "WtA1", "W1A1-8bit", "W1A1-all"],
)  # fmt: skip
@pytest.mark.parametrize(("network", "width"), [("nin", 0.25), ("nin_gc", 0.5), ("resnet18", 0.25)])
def test_whole_networks_compute_what_numpy_computes(network, width, config, tmp_path):
    program = pack_model(to_onnx(quantized(network, {"width": width}, a_bits="binary", **config), IMAGES))
    (tmp_path / "x.packed").write_bytes(to_bytes(program))
    images = IMAGES.numpy()
    np.testing.assert_allclose(run(program, images, FastSteps(program)), run(program, images), rtol=1e-5, atol=1e-6)
    two = PackedNetwork(tmp_path / "x.packed", threads=2)
    assert two.kernel == kernels.WAY
    np.testing.assert_allclose(two(images), run(program, images), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", ["lookup", "portable", "popcount"])
def test_every_way_to_count_counts_the_same(way, tmp_path):
    from llvmlite import binding

    if way == "lookup" and not binding.get_host_cpu_features().get("avx2"):
        pytest.skip("the processor has no AVX2")
    code = (
        "from tests.runtime.test_kernels import *\n"
        "for seed in range(12):\n"
        "    operation, x = drawn(seed)\n"
        "    wanted = RUN['threshold'](operation, Value(x, 1.0)).data\n"
        "    np.testing.assert_array_equal(prepare(operation)(pack(x)).value().data, wanted)\n"
        "print(kernels.WAY)\n"
    )
    environment = {**os.environ, "MICRONET_KERNEL": way, "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == way


def test_bits_hold_the_signs_and_zeros_behind_them():
    x = signs(1, 2, 3, 3, 20)
    bits = pack(x)
    assert isinstance(bits, Bits) and bits.data.shape == (2, 3, 3, 4)
    assert not (bits.data[..., 2] & 0xF0).any() and not bits.data[..., 3].any()
    np.testing.assert_array_equal(bits.value().data, x)
