"""The compiled kernels compute what numpy computes, for every arithmetic, shape and instruction set."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from micronet.errors import MicronetError
from micronet.packed.file_format import to_bytes
from micronet.packed.program import Operation, Program
from micronet.runtimes.packed import predictor
from micronet.runtimes.packed.numpy_backend import run
from micronet.runtimes.packed.predictor import PackedNetwork

pytest.importorskip("numba", reason="pip install numba")

from micronet.runtimes.packed import compiled_backend
from micronet.runtimes.packed.compiled_backend import CompiledNetwork, ExecutionPlan
from micronet.runtimes.packed.kernels import cpu
from micronet.runtimes.packed.memory import UnsupportedProgram
from tests.runtimes.programs import check_layer, check_other_operations, check_program, other_operations, random_layer


@pytest.mark.parametrize("seed", range(100))
def test_a_layer_computes_what_numpy_computes(seed):
    check_layer(seed)


@pytest.mark.parametrize("seed", range(8))
def test_other_operations_compute_what_numpy_computes(seed):
    check_other_operations(seed)


def test_a_plan_stores_each_weight_once():
    weight = np.random.default_rng(0).choice([-1, 1], (64, 64, 3, 3)).astype(np.int32)
    conv = Operation("conv", [1], {}, weight, np.ones(1, np.float32))
    plan = ExecutionPlan(Program([Operation("sign", [0]), conv], [64, 8, 8], {}))
    assert plan.constants[0].size == plan.instructions["weights"].max() + weight.size // 8 * cpu.WEIGHT_EXPANSION


def test_vectors_lie_in_one_cache_line():
    """A vector in two lines takes a tenth longer to read."""
    for seed in range(3):
        plan = ExecutionPlan(random_layer(seed)[0])
        assert all(each.ctypes.data % 64 == 0 for each in (*plan.constants, plan.workspace(2).memory))


@pytest.mark.parametrize("channels", [3, 32, 40])
@pytest.mark.parametrize("first", ["sign", "relu", "clip", "quantize", "add"])
def test_the_images_may_be_read_by_a_fused_operation_and_by_others(first, channels):
    images = np.random.default_rng(0).normal(size=(3, channels, 5, 7)).astype(np.float32)
    first_operation = {
        "clip": Operation("clip", [0], {"bounds": [-0.5, 0.5]}),
        "quantize": Operation("quantize", [0], {"scale": 0.05, "zero_point": 3, "range": [-128, 127]}),
        "add": Operation("add", [0, 0]),
    }.get(first, Operation(first, [0]))
    check_program(Program([first_operation], [channels, 5, 7], {}), images)
    check_program(Program([first_operation, Operation("add", [0, 1])], [channels, 5, 7], {}), images)


def test_callers_may_share_a_network(monkeypatch):
    monkeypatch.setattr(compiled_backend, "MIN_SHARED_WORK", 0)
    programs, images = other_operations(3)
    network = CompiledNetwork(programs[6], 2)
    expected = run(programs[6], images)
    failed = []

    def score(part):
        for _ in range(50):
            if not np.allclose(network(images[part]), expected[part], atol=1e-5):
                failed.append(part)

    callers = [threading.Thread(target=score, args=(part,)) for part in (slice(0, 1), slice(1, 2), slice(0, 2))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not failed


@pytest.mark.parametrize("instruction_set", ["avx2", "portable"])
def test_every_instruction_set_computes_the_same(instruction_set):
    if instruction_set not in cpu.SUPPORTED:
        pytest.skip(f"the processor does not have {instruction_set}")
    code = (
        "from tests.runtimes.programs import *\n"
        "for seed in range(60):\n"
        "    check_layer(seed)\n"
        "check_other_operations(0)\n"
        "from micronet.runtimes.packed.kernels import cpu\n"
        "print(cpu.INSTRUCTION_SET)\n"
    )
    environment = {**os.environ, "MICRONET_KERNEL": instruction_set}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == instruction_set


def test_numpy_runs_what_the_kernels_do_not_support(monkeypatch, tmp_path):
    wide = Operation("quantize", [0], {"scale": 0.1, "zero_point": 0, "range": [-32768, 32767]})
    program = Program([wide], [3, 4, 4], {})
    with pytest.raises(UnsupportedProgram, match="more than 8 bits"):
        ExecutionPlan(program)
    (tmp_path / "x.packed").write_bytes(to_bytes(program))
    network = PackedNetwork(tmp_path / "x.packed", threads=2)
    assert network.kernel == "numpy (compiled kernels do not support activations of more than 8 bits)"
    images = np.random.default_rng(0).normal(size=(5, 3, 4, 4)).astype(np.float32)
    np.testing.assert_array_equal(network(images), run(program, images))
    monkeypatch.setitem(sys.modules, "micronet.runtimes.packed.kernels.cpu", None)
    monkeypatch.delattr("micronet.runtimes.packed.kernels.cpu")
    assert "pip install" in predictor.choose_backend(program, 1)[1]


@pytest.mark.parametrize("part", ["bias", "limits", "scale"])
def test_numbers_that_do_not_fit_their_layer_are_refused(part):
    rng = np.random.default_rng(0)
    numbers = {part: np.ones(3, np.int32 if part == "limits" else np.float32)}
    if part != "limits":
        numbers["limits"] = None
    kind = "threshold" if part == "limits" else "conv"
    weight = rng.choice([-1, 1], (40, 8, 3, 3)).astype(np.int32)
    with pytest.raises((UnsupportedProgram, ValueError)):
        ExecutionPlan(Program([Operation("sign", [0]), Operation(kind, [1], {}, weight, **numbers)], [8, 5, 5], {}))


def test_a_threshold_may_be_followed_by_operations_that_others_fuse():
    weight, limits = np.ones((5, 3, 1, 1), np.int32), np.ones(5, np.int32)
    images = np.random.default_rng(0).normal(size=(2, 3, 4, 4)).astype(np.float32)
    for follower in (Operation("relu", [2]), Operation("clip", [2], {"bounds": [-0.5, 0.5]}), Operation("sign", [2])):
        program = Program([Operation("sign", [0]), Operation("threshold", [1], {}, weight, limits=limits), follower],
                          [3, 4, 4], {})  # fmt: skip
        check_program(program, images)


def test_shapes_match_numpys_for_maps_of_one_pixel():
    images = np.random.default_rng(0).normal(size=(2, 8, 4, 4)).astype(np.float32)
    weight = np.ones((4, 8), np.float32)
    for tail in (
        [Operation("mean", [0]), Operation("shuffle", [1], {"groups": 4})],
        [Operation("mean", [0], {"keep": True}), Operation("linear", [1], {}, weight)],
        [Operation("mean", [0]), Operation("linear", [1], {}, weight), Operation("shuffle", [2], {"groups": 2})],
    ):
        check_program(Program(tail, [8, 4, 4], {}), images)


@pytest.mark.parametrize(
    ("groups", "each", "inner", "size"),
    [(1, 20, 3640, 3), (1, 20, 3650, 3), (4, 4, 1024, 3), (2, 8, 1024, 3), (32, 1, 1024, 1), (13, 1, 5000, 1)],
)
@pytest.mark.parametrize("kind", ["threshold", "conv"])
def test_sums_of_tens_of_thousands_of_signs_are_exact(kind, groups, each, inner, size):
    """16-bit counts hold 32,766 of them; small groups are merged, and the zeros between them count too."""
    rng = np.random.default_rng(0)
    weight = rng.choice([-1, 1], (groups * each, inner, size, size)).astype(np.int32)
    weight[:, : inner // 3] = 1
    limits = rng.integers(-150, 150, groups * each).astype(np.int32)
    numbers = {"limits": limits} if kind == "threshold" else {"scale": np.ones(1, np.float32)}
    images = rng.normal(size=(2, groups * inner, size, size)).astype(np.float32)
    program = Program([Operation("sign", [0]), Operation(kind, [1], {"group": groups}, weight, **numbers)],
                      list(images.shape[1:]), {})  # fmt: skip
    np.testing.assert_array_equal(CompiledNetwork(program, 1)(images), run(program, images))


def test_a_max_pool_propagates_nan():
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
      "large weights"),
     ([Operation("quantize", [0], {"scale": 0.01, "zero_point": 0, "range": [0, 255]}),
       Operation("conv", [1], {}, np.full((2, 3, 1, 1), 127, np.int32), np.ones(1, np.float32),
                 np.full(2, 2**31 - 200, np.int32))], "32 bits")],
    ids=["range", "overflow", "inexact", "bias"],
)  # fmt: skip
def test_numpy_runs_what_would_be_inexact(operations, why):
    with pytest.raises(UnsupportedProgram, match=why):
        ExecutionPlan(Program(operations, [3, 4, 4], {}))


def test_a_stride_beyond_the_map_reads_nothing_beyond_memory():
    conv = Operation("conv", [0], {"stride": [1, 4096]}, np.ones((1, 16384, 1, 1), np.float32))
    check_program(Program([conv], [16384, 1, 1], {}), np.ones((1, 16384, 1, 1), np.float32))


def test_no_images_give_no_scores():
    program, images = random_layer(0)
    for threads in (1, 2):
        assert len(CompiledNetwork(program, threads)(images[:0])) == 0


def test_an_unknown_instruction_set_is_one_line(monkeypatch):
    monkeypatch.setenv("MICRONET_KERNEL", "foo")
    with pytest.raises(MicronetError, match=r"this processor supports .*portable"):
        cpu.check_requested()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_starts_its_own_threads():
    code = (
        "import os\nfrom tests.runtimes.programs import *\n"
        "program, images = other_operations(3)\n"
        "network = CompiledNetwork(program[6], 2)\nnetwork(images)\n"
        "child = os.fork()\n"
        "if not child:\n    network(images)\n    os._exit(7)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout.strip() == "7", done.stderr
