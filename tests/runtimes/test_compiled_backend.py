"""The compiled steps: what numpy computes, for every product, every shape and every processor's way."""

import os
import random
import subprocess
import sys
import threading

import numpy as np
import pytest

from micronet.errors import MicronetError
from micronet.onnx.export import to_onnx
from micronet.packed.file_format import to_bytes
from micronet.packed.from_onnx import pack_model
from micronet.packed.program import Operation, Program
from micronet.runtimes.packed import predictor
from micronet.runtimes.packed.numpy_backend import run
from micronet.runtimes.packed.predictor import PackedNetwork
from tests.onnx.test_onnx import IMAGES, quantized

pytest.importorskip("numba", reason="pip install 'micronet[fast]'")

from micronet.runtimes.packed import compiled_backend
from micronet.runtimes.packed.compiled_backend import CompiledNetwork
from micronet.runtimes.packed.execution_plan import ExecutionPlan
from micronet.runtimes.packed.feature_maps import UnsupportedProgram
from micronet.runtimes.packed.kernels import cpu


def quantize(source, draw, scale=0.05):
    """Eight bits, unsigned or signed, or fewer."""
    low, high = draw.choice([(0, 255), (-128, 127), (-127, 127), (0, 15), (-8, 7)])
    return Operation(
        "quantize", [source], {"scale": scale, "zero_point": draw.randint(low, high), "range": [low, high]}
    )


def drawn_weight(draw, rng, kind, shape):
    """Weights of a kind."""
    if kind == "float":
        return rng.normal(size=shape).astype(np.float32)
    if kind == "integers":
        most = draw.choice([1, 2, 5, 8, 9, 128, 255])  # less a zero point, weights have 9 bits
        return rng.integers(-most, most, shape, endpoint=True).astype(np.int32) * (
            draw.choice([1, 3]) if most < 9 else 1
        )
    levels = np.array([-1, 1] if kind == "binary" else [-1, 0, 1]) * draw.choice([1, 64])
    return rng.choice(levels, shape).astype(np.int32)


def drawn(seed):
    """A convolution of some product, what is before it and what follows, and images."""
    draw, rng = random.Random(seed), np.random.default_rng(seed)
    groups = draw.choice([1, 1, 1, 2, 3, 8])
    inner = draw.choice([1, 2, 8, 16, 24, 32, 40]) if groups > 1 else draw.choice([1, 3, 7, 8, 24, 32, 96, 300, 352])
    each = draw.choice([1, 5, 8, 16, 24, 40]) if groups > 1 else draw.choice([1, 10, 16, 40, 48, 70, 96, 130])
    size, side = draw.choice([1, 3, 5, 7]), draw.choice([9, 10, 13])
    reads, kind = draw.choice(
        [("sign", "binary"), ("sign", "ternary"), ("quantize", "integers"), ("quantize", "binary"), (None, "float"),
         ("quantize", "float"), ("sign", "integers")]
    )  # fmt: skip
    weight = drawn_weight(draw, rng, kind, (groups * each, inner, size, size))
    at = {"stride": [draw.choice([1, 2]), draw.choice([1, 2])], "pads": [draw.choice([0, 1, 2]) for _ in range(4)],
          "dilation": [draw.choice([1, 2]) if size < 7 else 1] * 2, "group": groups}  # fmt: skip
    operations = []
    if reads:
        operations.append(Operation("sign", [0]) if reads == "sign" else quantize(0, draw))
    before, outs = len(operations), len(weight)
    if kind != "float" and draw.random() < 0.4:
        spread = 300 if reads == "quantize" else 12
        limits = rng.integers(-spread, spread, outs).astype(np.int32)
        operations.append(Operation("threshold", [before], at, weight, limits=limits))
    else:
        scale = None if kind == "float" else rng.uniform(1e-3, 0.1, draw.choice([1, outs])).astype(np.float32)
        bias = rng.normal(size=outs).astype(np.float32) if draw.random() < 0.7 else None
        if bias is not None and kind != "float" and reads == "quantize" and draw.random() < 0.5:
            bias = rng.integers(-999, 999, outs).astype(np.int32)
        operations.append(Operation("conv", [before], at, weight, scale, bias))
        for follower in draw.choice([[], ["relu"], ["clip"], ["quantize"], ["relu", "quantize"], ["sign"]]):
            count = len(operations)
            operations.append(
                quantize(count, draw, 0.3) if follower == "quantize"
                else Operation(follower, [count], {"bounds": [-0.5, 6]} if follower == "clip" else {})
            )  # fmt: skip
    if operations[-1].kind in ("threshold", "sign"):  # what reads bits must not see any beyond the channels
        weight = rng.choice([-1, 1], (20, outs, 1, 1)).astype(np.int32)
        operations.append(Operation("conv", [len(operations)], {}, weight, np.ones(1, np.float32)))
    wide = side + draw.choice([0, 3, 25])  # rows of more than 32 pixels are done in parts
    images = rng.normal(size=(draw.choice([1, 2, 3]), inner * groups, side, wide))
    return Program(operations, list(images.shape[1:]), {}), images.astype(np.float32)


def check(program, images, threads=1):
    """Compare the compiled steps with numpy: to the bit where all is integers."""
    wanted = run(program, images)
    found = CompiledNetwork(program, threads)(images)
    assert found.shape == wanted.shape
    first = program.operations[0].kind
    if program.operations[-2:][0].kind in ("threshold", "sign") and first != "conv":
        np.testing.assert_array_equal(found, wanted)
    else:
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * max(1e-6, np.abs(wanted).max()))


@pytest.mark.parametrize("seed", range(150))
def test_a_layer_computes_what_numpy_computes(seed):
    program, images = drawn(seed)
    last = program.operations[-1]
    if last.kind == "quantize":  # floats of another order of sums may round to the next level
        step = last.attributes["scale"]
        found, wanted = CompiledNetwork(program, 1)(images), run(program, images)
        layer = next(operation for operation in program.operations if operation.kind == "conv")
        exact = layer.weight.dtype.kind == "i"
        assert np.abs(found - wanted).max() <= (1e-6 if exact else 1.01 * step)
        return
    check(program, images)


def operations_of(seed):
    """Programs of all that is no layer."""
    draw = random.Random(seed)
    start = draw.choice([[], [Operation("sign", [0])], [quantize(0, draw)]])
    n = len(start)
    channels = draw.choice([8, 12, 40, 64])
    pads = [1, 0, 1, 1]
    bodies = [
        [Operation("max_pool", [n], {"kernel": [3, 2], "stride": [2, 1], "pads": pads})],
        [Operation("average_pool", [n], {"kernel": [3, 2], "stride": [2, 1], "pads": pads})],
        [Operation("average_pool", [n], {"kernel": [2, 2], "pads": [0, 1, 1, 0], "count_pads": True})],
        [Operation("mean", [n], {"keep": True}), Operation("mul", [n, n + 1])],
        [Operation("mean", [n])],
        [Operation("shuffle", [n], {"groups": 4})],
        [Operation("relu", [n]), Operation("add", [n, n + 1]), Operation("clip", [n + 2], {"bounds": [-1, 1]})],
        [Operation("sign", [n]), Operation("concat", [n, n + 1])],
        [Operation("max_pool", [n], {"kernel": [1, 1]}), Operation("concat", [n + 1, n, n + 1])],
        [Operation("affine", [n], scale=np.linspace(-1, 1, channels, dtype=np.float32),
                   bias=np.ones(channels, np.float32)), Operation("sign", [n + 1])],
        [Operation("relu", [n]), Operation("flatten", [n + 1])],
        [Operation("flatten", [n]), Operation("linear", [n + 1], {}, np.random.default_rng(seed).normal(
            size=(5, channels * 6 * 7)).astype(np.float32))],
        [Operation("add", [n, n]), Operation("relu", [n + 1]), quantize(n + 2, draw), Operation("add", [n + 3, n])],
    ]  # fmt: skip
    images = np.random.default_rng(seed).normal(size=(2, channels, 6, 7)).astype(np.float32)
    return [Program(start + body, [channels, 6, 7], {}) for body in bodies], images


@pytest.mark.parametrize("seed", range(8))
def test_what_is_no_layer_computes_what_numpy_computes(seed):
    programs, images = operations_of(seed)
    for program in programs:
        check(program, images)


@pytest.mark.parametrize(
    "config",
    [{"w_bits": "binary"}, {"w_bits": "ternary"}, {"w_bits": "binary", "first_last": "8bit"},
     {"w_bits": "binary", "first_last": "8bit-input"}, {"w_bits": "binary", "first_last": "same"},
     {"a_bits": 8}, {"a_bits": 8, "q_type": "asym"},
     {"a_bits": 8, "w_bits": 2, "method": "lsq"}, {"a_bits": 32, "w_bits": "ternary"}],
    ids=["W1A1", "WtA1", "W1A1-8bit", "W1A1-W1A8", "W1A1-all", "W8A8", "W8A8-asym", "W2A8", "WtA32"],
)  # fmt: skip
@pytest.mark.parametrize(("network", "width"), [("nin", 0.25), ("nin_gc", 0.5), ("resnet18", 0.25)])
def test_whole_networks_compute_what_numpy_computes(network, width, config, tmp_path, monkeypatch):
    program = pack_model(to_onnx(quantized(network, {"width": width}, **{"a_bits": "binary", **config}), IMAGES))
    (tmp_path / "x.packed").write_bytes(to_bytes(program))
    images = IMAGES.numpy()
    first = Program(program.operations[:2], program.shape, {})  # a float layer's sum next to 0 may round either way
    alike = (CompiledNetwork(first, 1)(images) == run(first, images)).all((1, 2, 3))
    if first.operations[-1].kind == "sign":
        images = images[alike]
    assert len(images) > 8
    wanted = run(program, images)
    for threads in (1, 2):
        opened = PackedNetwork(tmp_path / "x.packed", threads)
        assert opened.kernel == cpu.INSTRUCTION_SET
        np.testing.assert_allclose(opened(images), wanted, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(compiled_backend, "MIN_SHARED_WORK", 0)  # two threads over its rows
    np.testing.assert_allclose(opened(images[:1]), wanted[:1], rtol=1e-4, atol=1e-5)


def test_a_plan_keeps_each_weight_once():
    weight = np.random.default_rng(0).choice([-1, 1], (64, 64, 3, 3)).astype(np.int32)
    conv = Operation("conv", [1], {}, weight, np.ones(1, np.float32))
    plan = ExecutionPlan(Program([Operation("sign", [0]), conv], [64, 8, 8], {}))
    assert plan.constants[0].size == plan.instructions["weights"].max() + weight.size // 8 * cpu.WEIGHT_EXPANSION


def test_vectors_lie_in_one_cache_line():
    """What lies in two takes a tenth longer to read."""
    for seed in range(3):
        plan = ExecutionPlan(drawn(seed)[0])
        assert all(each.ctypes.data % 64 == 0 for each in (*plan.constants, plan.workspace(2).memory))


@pytest.mark.parametrize("channels", [3, 32, 40])
@pytest.mark.parametrize("first", ["sign", "relu", "clip", "quantize", "add"])
def test_images_are_read_by_what_comes_first_and_by_others(first, channels):
    images = np.random.default_rng(0).normal(size=(3, channels, 5, 7)).astype(np.float32)
    begun = {
        "clip": Operation("clip", [0], {"bounds": [-0.5, 0.5]}),
        "quantize": Operation("quantize", [0], {"scale": 0.05, "zero_point": 3, "range": [-128, 127]}),
        "add": Operation("add", [0, 0]),
    }.get(first, Operation(first, [0]))
    check(Program([begun], [channels, 5, 7], {}), images)
    check(Program([begun, Operation("add", [0, 1])], [channels, 5, 7], {}), images)


def test_callers_may_share_a_network(monkeypatch):
    monkeypatch.setattr(compiled_backend, "MIN_SHARED_WORK", 0)
    programs, images = operations_of(3)
    network = CompiledNetwork(programs[6], 2)
    wanted = run(programs[6], images)
    failed = []

    def score(part):
        for _ in range(50):
            if not np.allclose(network(images[part]), wanted[part], atol=1e-5):
                failed.append(part)

    callers = [threading.Thread(target=score, args=(part,)) for part in (slice(0, 1), slice(1, 2), slice(0, 2))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not failed


@pytest.mark.parametrize("way", ["avx2", pytest.param("portable", marks=pytest.mark.slow)])
def test_every_way_computes_the_same(way):
    from llvmlite import binding

    if way == "avx2" and not binding.get_host_cpu_features().get("avx2"):
        pytest.skip("the processor has no AVX2")
    code = (
        "from tests.runtimes.test_compiled_backend import *\n"
        "for seed in range(60):\n"
        "    test_a_layer_computes_what_numpy_computes(seed)\n"
        "test_what_is_no_layer_computes_what_numpy_computes(0)\n"
        "print(cpu.INSTRUCTION_SET)\n"
    )
    environment = {**os.environ, "MICRONET_KERNEL": way}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == way


def test_what_the_steps_do_not_have_is_left_to_numpy(monkeypatch, tmp_path):
    wide = Operation("quantize", [0], {"scale": 0.1, "zero_point": 0, "range": [-32768, 32767]})
    program = Program([wide], [3, 4, 4], {})
    with pytest.raises(UnsupportedProgram, match="more than 8 bits"):
        ExecutionPlan(program)
    (tmp_path / "x.packed").write_bytes(to_bytes(program))
    network = PackedNetwork(tmp_path / "x.packed", threads=2)
    assert network.kernel == "numpy (not compiled: activations of more than 8 bits)"
    images = np.random.default_rng(0).normal(size=(5, 3, 4, 4)).astype(np.float32)
    np.testing.assert_array_equal(network(images), run(program, images))
    monkeypatch.setitem(sys.modules, "micronet.runtimes.packed.kernels.cpu", None)
    monkeypatch.delattr("micronet.runtimes.packed.kernels.cpu")
    assert "pip install" in predictor._choose_backend(program, 1)[1]


@pytest.mark.parametrize("part", ["bias", "limits", "scale"])
def test_numbers_that_do_not_fit_their_layer_are_not_run(part):
    rng = np.random.default_rng(0)
    numbers = {part: np.ones(3, np.int32 if part == "limits" else np.float32)}
    if part != "limits":
        numbers["limits"] = None
    kind = "threshold" if part == "limits" else "conv"
    weight = rng.choice([-1, 1], (40, 8, 3, 3)).astype(np.int32)
    with pytest.raises((UnsupportedProgram, ValueError)):
        ExecutionPlan(Program([Operation("sign", [0]), Operation(kind, [1], {}, weight, **numbers)], [8, 5, 5], {}))


def test_a_threshold_may_be_read_by_what_others_fuse():
    weight, limits = np.ones((5, 3, 1, 1), np.int32), np.ones(5, np.int32)
    images = np.random.default_rng(0).normal(size=(2, 3, 4, 4)).astype(np.float32)
    for follower in (Operation("relu", [2]), Operation("clip", [2], {"bounds": [-0.5, 0.5]}), Operation("sign", [2])):
        program = Program([Operation("sign", [0]), Operation("threshold", [1], {}, weight, limits=limits), follower],
                          [3, 4, 4], {})  # fmt: skip
        check(program, images)


def test_shapes_are_numpys_where_maps_are_one_pixel():
    images = np.random.default_rng(0).normal(size=(2, 8, 4, 4)).astype(np.float32)
    weight = np.ones((4, 8), np.float32)
    for tail in (
        [Operation("mean", [0]), Operation("shuffle", [1], {"groups": 4})],
        [Operation("mean", [0], {"keep": True}), Operation("linear", [1], {}, weight)],
        [Operation("mean", [0]), Operation("linear", [1], {}, weight), Operation("shuffle", [2], {"groups": 2})],
    ):
        check(Program(tail, [8, 4, 4], {}), images)


@pytest.mark.parametrize(
    ("groups", "each", "inner", "size"),
    [(1, 20, 3640, 3), (1, 20, 3650, 3), (4, 4, 1024, 3), (2, 8, 1024, 3), (32, 1, 1024, 1), (13, 1, 5000, 1)],
)
@pytest.mark.parametrize("kind", ["threshold", "conv"])
def test_sums_of_tens_of_thousands_of_signs_are_exact(kind, groups, each, inner, size):
    """Counts of 16 bits hold 32,766 of them; small groups are joined, with zeros between that count."""
    rng = np.random.default_rng(0)
    weight = rng.choice([-1, 1], (groups * each, inner, size, size)).astype(np.int32)
    weight[:, : inner // 3] = 1
    limits = rng.integers(-150, 150, groups * each).astype(np.int32)
    numbers = {"limits": limits} if kind == "threshold" else {"scale": np.ones(1, np.float32)}
    images = rng.normal(size=(2, groups * inner, size, size)).astype(np.float32)
    program = Program([Operation("sign", [0]), Operation(kind, [1], {"group": groups}, weight, **numbers)],
                      list(images.shape[1:]), {})  # fmt: skip
    np.testing.assert_array_equal(CompiledNetwork(program, 1)(images), run(program, images))


def test_a_pool_hands_nan_on():
    images = np.arange(64, dtype=np.float32).reshape(1, 1, 8, 8).repeat(9, 1)
    images[0, :, 3, 4] = np.nan
    program = Program(
        [Operation("max_pool", [0], {"kernel": [3, 3], "stride": [2, 2], "pads": [1] * 4})], [9, 8, 8], {}
    )
    np.testing.assert_array_equal(CompiledNetwork(program, 1)(images), run(program, images))


@pytest.mark.parametrize(
    ("operations", "why"),
    [([Operation("quantize", [0], {"scale": 0.01, "zero_point": 0, "range": [-100, 155]})], "8 bits"),
     ([Operation("sign", [0]), Operation("conv", [1], {}, np.full((2, 3, 1, 1), 2**30, np.int32))], "32 bits"),
     ([Operation("sign", [0]), Operation("conv", [1], {}, np.arange(6, dtype=np.int32).reshape(2, 3, 1, 1) * 2**22)],
      "wide weights"),
     ([Operation("quantize", [0], {"scale": 0.01, "zero_point": 0, "range": [0, 255]}),
       Operation("conv", [1], {}, np.full((2, 3, 1, 1), 127, np.int32), np.ones(1, np.float32),
                 np.full(2, 2**31 - 200, np.int32))], "32 bits")],
    ids=["range", "overflow", "inexact", "bias"],
)  # fmt: skip
def test_what_would_be_inexact_is_left_to_numpy(operations, why):
    with pytest.raises(UnsupportedProgram, match=why):
        ExecutionPlan(Program(operations, [3, 4, 4], {}))


def test_a_stride_beyond_the_map_reads_nothing_beyond_memory():
    conv = Operation("conv", [0], {"stride": [1, 4096]}, np.ones((1, 16384, 1, 1), np.float32))
    check(Program([conv], [16384, 1, 1], {}), np.ones((1, 16384, 1, 1), np.float32))


def test_no_images_give_no_scores():
    program, images = drawn(0)
    for threads in (1, 2):
        assert len(CompiledNetwork(program, threads)(images[:0])) == 0


def test_an_unknown_kernel_is_one_line(monkeypatch):
    monkeypatch.setenv("MICRONET_KERNEL", "foo")
    with pytest.raises(MicronetError, match=r"this processor has .*portable"):
        cpu.check_requested()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_has_threads_of_its_own():
    code = (
        "import os\nfrom tests.runtimes.test_compiled_backend import *\n"
        "program, images = operations_of(3)\n"
        "network = CompiledNetwork(program[6], 2)\nnetwork(images)\n"
        "child = os.fork()\n"
        "if not child:\n    network(images)\n    os._exit(7)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout.strip() == "7", done.stderr
