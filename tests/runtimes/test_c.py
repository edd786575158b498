"""Generated C code computes what the packed runtime computes, bit for bit, whatever the compiler and its flags."""

import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import SourceFileLoader
from importlib.resources import files
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import numpy as np
import pytest

from micronet.core.folders import read_note
from micronet.data.spec import DataSpec
from micronet.errors import MicronetError
from micronet.packed.file_format import read
from micronet.packed.program import Operation, Program
from micronet.runtimes.c.predictor import FLOAT_LAYER, CNetwork, CPredictor
from micronet.runtimes.c.reference import scores_of
from micronet.runtimes.c.sizes import layer_names
from micronet.runtimes.c.target import open_folder, write
from micronet.runtimes.c.writer import c_code, write_c
from micronet.runtimes.config import RuntimeOptions
from micronet.runtimes.network import to_pixels
from micronet.runtimes.packed.numpy_backend import run
from micronet.runtimes.packed.predictor import choose_backend
from micronet.stages.inspect_packed import inspect_folder
from tests.runtimes.c_programs import merged
from tests.runtimes.programs import other_operations, random_layer
from tests.runtimes.test_operators import COLUMNS, ELEMENTWISE, LAYERS, MOVES, POOLS, RESIZES, ROWS, model, packed

SCRIPT = str(Path(__file__).parents[2] / "scripts" / "check_c")
WARNINGS = "-Wall -Wextra -Wpedantic -Wconversion -Werror"
DATA = {"image_size": 6, "channels": 3, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.25]}
pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler (apt install gcc)")


@pytest.fixture(autouse=True)
def _flags(monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("CFLAGS", f"-O1 {WARNINGS}")


def check(program, images):
    """Compare a program's code with what it must compute."""
    code = c_code(program)
    found = CNetwork(program, code, code.files)(images)
    expected = scores_of(program, images)
    found = found if isinstance(found, list) else [found]
    assert [each.shape for each in found] == [each.shape for each in expected]
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def check_target(target, folder, monkeypatch, capsys):
    """Run scripts/check_c; its docstring has the packages that it needs."""
    loader = SourceFileLoader("check_c", SCRIPT)
    script = module_from_spec(spec_from_loader(loader.name, loader))
    loader.exec_module(script)
    monkeypatch.setattr("sys.argv", [SCRIPT, str(folder), "--images", "3", "--targets", target])
    failed, printed = script.main(), capsys.readouterr().out
    if "not installed" in printed:
        pytest.skip(printed.splitlines()[-1])
    assert not failed, printed


def pixel_network():
    """A network of 8-bit images of 6 by 5 pixels, with binary, ternary, 8-bit and float layers."""
    rng = np.random.default_rng(0)
    operations = [
        Operation("quantize", [0], {"scale": 0.02, "zero_point": 3, "range": [-128, 127]}),
        Operation("threshold", [1], {"pads": [1] * 4}, rng.integers(-99, 99, (70, 3, 3, 3), np.int32),
                  limits=rng.integers(-999, 999, 70, np.int32)),
        Operation("threshold", [2], {"pads": [1, 0, 0, 1]}, rng.choice([-1, 1], (24, 70, 2, 2)).astype(np.int32),
                  limits=rng.integers(-20, 20, 24, np.int32)),
        Operation("conv", [3], {}, rng.choice([-1, 0, 1], (16, 24, 1, 1)).astype(np.int32),
                  rng.uniform(0.01, 0.02, 16).astype(np.float32), rng.normal(size=16).astype(np.float32)),
        Operation("silu", [4]),
        Operation("conv", [5], {"stride": [2, 2]}, rng.normal(size=(20, 16, 3, 3)).astype(np.float32), name="tail"),
        Operation("mean", [6]),
        Operation("quantize", [7], {"scale": 0.02, "zero_point": 3, "range": [-128, 127]}),
        Operation("linear", [8], {}, rng.integers(-99, 99, (5, 20), np.int32), np.full(1, 0.01, np.float32)),
    ]  # fmt: skip
    return Program(operations, [3, 6, 5], {"data": DATA, "model": 'x */ int main(void) {} "'})


@pytest.mark.parametrize("seed", range(10))
def test_a_layer_computes_what_the_packed_runtime_computes(seed):
    program, images = random_layer(seed)
    check(program, images)


def test_every_other_operation_computes_what_the_packed_runtime_computes():
    for seed in range(3):
        programs, _ = other_operations(seed)
        by_shape = {}
        for program in programs:
            by_shape.setdefault(tuple(program.shape), []).append(program)
        for alike in by_shape.values():
            check(merged(alike), np.random.default_rng(0).normal(size=(2, *alike[0].shape)).astype(np.float32))


@pytest.mark.parametrize("integers", [False, True])
def test_every_onnx_operator_computes_what_the_packed_runtime_computes(integers, tmp_path):
    nodes = [*ELEMENTWISE, *POOLS, *RESIZES, *MOVES, *LAYERS]
    program = merged([packed(model(each, integers), tmp_path) for each in nodes])
    images = np.random.default_rng(1).normal(size=(2, 8, ROWS, COLUMNS)).astype(np.float32)
    check(program, images)
    expected = run(program, images)
    for kind, ours, theirs in zip(nodes, scores_of(program, images), expected, strict=True):
        if integers or kind not in LAYERS:  # only sums of float products depend on their order
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(("network", "scheme"), [("nin_gc", "W1A1-8bit"), ("resnet18", "W8A8-asym"), ("nin", "W1A8")])
def test_whole_networks_are_equal(network, scheme, exported):
    path, images, _, _ = exported(network, scheme)
    program, images = read(path), images[:4]
    check(program, images)
    if all(each.weight is None or each.weight.dtype.kind == "i" for each in program.operations):
        np.testing.assert_array_equal(scores_of(program, images)[0], run(program, images))


def test_sums_of_floats_are_those_of_the_compiled_kernels():
    score, kernel = choose_backend(pixel_network(), 1)
    if kernel not in ("avx512", "avx2"):
        pytest.skip(f"the kernels are {kernel}, whose sums may be rounded otherwise")
    images = np.random.default_rng(2).normal(size=(3, 3, 6, 5)).astype(np.float32)
    np.testing.assert_array_equal(scores_of(pixel_network(), images)[0], score(images))


@pytest.mark.parametrize("flags", ["-O1 -fsanitize=address,undefined -fno-sanitize-recover", "-O3 -march=native"])
def test_make_check_says_ok(flags, tmp_path):
    folder = tmp_path / "net"
    write_c(pixel_network(), folder)
    made = subprocess.run(
        ["make", "check", f"CFLAGS={flags} {WARNINGS}"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert made.stdout.splitlines()[-1:] == ["ok"], made.stdout + made.stderr
    assert "main(void) {}" not in (folder / "model.h").read_text()


def test_a_folder_is_a_network_of_normalized_images(tmp_path):
    program, folder = pixel_network(), tmp_path / "net"
    sizes = write_c(program, folder)
    network = open_folder(folder, read_note(folder), RuntimeOptions())
    pixels = np.random.default_rng(1).integers(0, 256, (4, 3, 6, 5)).astype(np.float32)
    mean, std = (np.array(DATA[name], np.float32).reshape(3, 1, 1) for name in ("mean", "std"))
    scale, shift = 1 / (255 * std), -mean / std
    images = pixels * scale + shift
    np.testing.assert_array_equal(network(images), scores_of(program, images)[0])
    between = images + np.float32(0.4) * scale.astype(np.float32)  # of no pixels
    np.testing.assert_array_equal(network(between), scores_of(program, between)[0])
    assert (network.params, network.data.mean) == (program.weights, DATA["mean"])
    assert sizes.flash == sum(layer.flash for layer in sizes.layers)
    counts = {"convolutions": {"integer": 3, "all": 4}, "linear": {"integer": 1, "all": 1}}
    assert network.integer_layers() == {**counts, "float": {"tail": FLOAT_LAYER}}
    names = {layer["name"]: layer["integer"] for layer in inspect_folder(folder)["layers"]}
    assert names == {"1": True, "2": True, "3": True, "tail": False, "8": True}
    assert layer_names({"sizes": {"layers": [{"operation": 1e999, "name": "a"}]}}) == {}
    code = folder / "model.c"
    code.write_text(code.read_text().replace("return MICRONET_OK", "return 0"))
    with pytest.raises(MicronetError, match="--trust-code"):
        CPredictor(folder, RuntimeOptions())
    np.testing.assert_array_equal(CPredictor(folder, RuntimeOptions(trust_code=True))(images), network(images))


def test_a_chain_needs_as_much_memory_as_its_widest_pair_of_maps():
    """Maps of one byte per value, in words of 8 bytes: 16 x 8, 16 x 24, 16 x 8 and 16 x 2 values."""
    quantizer = {"scale": 0.1, "zero_point": 0, "range": [0, 255]}
    operations, channels = [Operation("quantize", [0], quantizer)], 8
    for outputs in (24, 8, 2):
        weight = np.arange(outputs * channels, dtype=np.int32).reshape(outputs, channels, 1, 1) % 200 - 100
        operations += [Operation("conv", [len(operations)], {}, weight, np.ones(1, np.float32))]
        operations += [Operation("quantize", [len(operations)], quantizer)]
        channels = outputs
    window = 24  # the widest window, of 24 bytes
    assert c_code(Program(operations, [8, 4, 4], {})).sizes.ram == 16 * 8 + 16 * 24 + window


@pytest.mark.parametrize(
    ("operations", "why"),
    [([Operation("quantize", [0], {"scale": 1e-6, "zero_point": 0, "range": [-(2**23), 2**23]})], "21 bits"),
     ([Operation("slice", [0], {"begin": [0, 0, 0], "extent": [3, 4, 2]}), Operation("add", [0, 1])], "operation 1, a"),
     ([Operation("conv", [0], {}, np.full((1, 3, 1, 1), np.nan, np.float32))], "NaN"),
     ([Operation("conv", [0], {}, np.ones((1, 4, 1, 1), np.float32))], "fit together"),
     ([Operation("pad", [0], {"pads": [0, 2**16 - 3, 0, 0]}),
       Operation("resize", [1], {"size": [4, 4], "coordinates": "asymmetric", "nearest": "floor"})], "65,536 rows")],
    ids=["wide", "shapes", "nan", "channels", "wide resize"],
)  # fmt: skip
def test_what_c_cannot_run_is_refused_before_anything_is_written(operations, why, tmp_path):
    with pytest.raises(MicronetError, match=why):
        write_c(Program(operations, [3, 4, 4], {}), tmp_path / "net")
    assert not list(tmp_path.iterdir())


def test_an_emulated_arm_processor_computes_the_same(tmp_path, monkeypatch, capsys):
    write_c(pixel_network(), tmp_path / "net")
    check_target("aarch64", tmp_path / "net", monkeypatch, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["gcc", "gcc-avx2", "clang", "aarch64", "cortex-m4", "cortex-m55"])
def test_other_compilers_and_processors_compute_the_same(target, tmp_path, monkeypatch, capsys):
    """scripts/check_c, on every ONNX operator."""
    nodes = [*ELEMENTWISE, *POOLS, *RESIZES, *MOVES, *LAYERS]
    programs = [packed(model(each, kind), tmp_path) for each in nodes for kind in (False, True)]
    write_c(pixel_network(), tmp_path / "3")
    for part in range(3):  # boards have 512 KiB of flash
        write_c(merged(programs[part::3]), tmp_path / f"{part}")
    for name in "0123":
        check_target(target, tmp_path / name, monkeypatch, capsys)


def test_a_missing_compiler_is_one_line(monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    program, code = pixel_network(), c_code(pixel_network())
    with pytest.raises(MicronetError, match=r"no-such-compiler is not one; install one \(apt install gcc\)"):
        CNetwork(program, code, code.files)


def test_a_library_for_another_machine_is_one_line(monkeypatch, tmp_path):
    script = tmp_path / "cross"
    script.write_text('#!/bin/sh\nfor last; do :; done\necho of another machine > "$last"\n')
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    code = c_code(pixel_network())
    with pytest.raises(
        MicronetError, match=r"loaded on this machine \(.*cross \(CC\) with the flags '-O1 .*\(CFLAGS\)"
    ):
        CNetwork(pixel_network(), code, code.files)


def test_without_a_compiler_export_checks_the_packed_network_and_says_so(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("CC", "no-such-compiler")
    note = write(model(LAYERS[0], False), tmp_path)
    network = open_folder(tmp_path, note, RuntimeOptions(threads=1))
    images = np.random.default_rng(0).normal(size=(2, 8, ROWS, COLUMNS)).astype(np.float32)
    np.testing.assert_allclose(network(images), run(read(tmp_path / "model.packed"), images), rtol=1e-4, atol=1e-4)
    assert "the C code was not compiled here" in caplog.text
    assert network.integer_layers() is None
    with pytest.raises(MicronetError, match="no-such-compiler is not one"):
        open_folder(tmp_path, {**note, "files": {}}, RuntimeOptions())  # as evaluate opens it


def test_threads_share_a_network():
    program = pixel_network()
    code = c_code(program)
    network = CNetwork(program, code, code.files)
    rng = np.random.default_rng(0)
    batches = [rng.normal(size=(500, 3, 6, 5)).astype(np.float32) for _ in range(2)]
    alone = [network(each) for each in batches]
    with ThreadPoolExecutor(2) as pool:
        for number, scores in enumerate(pool.map(network, batches * 4)):
            np.testing.assert_array_equal(scores, alone[number % 2])


def test_only_pixels_become_pixels():
    spec, step = DataSpec.from_json(DATA), 1 / (255 * np.array(DATA["std"], np.float32)[:, None, None])
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16).repeat(3, 1)
    images = pixels * step - (np.array(DATA["mean"], np.float32) / np.array(DATA["std"], np.float32))[:, None, None]
    np.testing.assert_array_equal(to_pixels(images, spec), pixels)
    for wrong in (images + 0.03 * step, images + 256 * step, images * np.nan):
        with pytest.raises(MicronetError, match="takes 8-bit pixels, but these images are not"):
            to_pixels(wrong.astype(np.float32), spec)


FLAGS = ("-funsafe-math-optimizations", "-fassociative-math -fno-signed-zeros -fno-trapping-math", "-freciprocal-math",
         "-ffinite-math-only", "-ffast-math")  # fmt: skip


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_flags_that_allow_other_roundings_are_refused_or_change_nothing(compiler, tmp_path):
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    rng = np.random.default_rng(0)
    quantize = Operation("quantize", [0], {"scale": 0.03, "zero_point": 3, "range": [-128, 127]})
    layer = Operation("conv", [1], {}, rng.normal(size=(20, 3, 3, 3)).astype(np.float32))
    write_c(Program([quantize, layer, Operation("mean", [2])], [3, 9, 9], {}), tmp_path / "net")
    for flags in FLAGS:
        command = ["make", "check", f"CC={compiler}", f"CFLAGS=-O2 {flags}"]
        made = subprocess.run(command, cwd=tmp_path / "net", capture_output=True, text=True, check=False)
        assert "compile without -f" in made.stderr or made.stdout.splitlines()[-1:] == ["ok"], made.stdout + made.stderr


def test_only_weights_are_read_as_plain_floats():
    """Maps lie in memory of another type, which compilers may only assume of types that may alias."""
    kernels = [each.read_text() for each in files("micronet.runtimes.c").joinpath("kernels").iterdir()]
    assert {name for text in kernels for name in re.findall(r"\(const float \*\)([\w>-]+)", text)} == {"l->weight"}


@pytest.mark.parametrize("runtime", ["c", "ncnn"])
def test_it_runs_in_a_process_without_torch_and_onnx(runtime):
    code = (
        f"import sys; sys.modules['torch'] = sys.modules['onnx'] = None; import micronet.runtimes.{runtime}.predictor"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
