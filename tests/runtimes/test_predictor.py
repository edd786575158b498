"""Packed files as predictors: on the command line, without torch, and refused if images or layers do not fit."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from micronet.artifact.artifact import load
from micronet.core.tensor_file import read_table
from micronet.errors import MicronetError
from micronet.packed.file_format import KEY, read, to_bytes
from micronet.packed.program import Operation, Program
from micronet.runtimes.packed.predictor import PackedNetwork
from tests.runtimes.conftest import OLD_FILES


def test_the_commands_take_packed_files(micronet, chain, tmp_path):
    artifact, path = chain / "fused.safetensors", tmp_path / "int8.packed"
    assert micronet("pack", artifact, "-o", path, "--quiet").code == 0
    rows = micronet("compare", artifact, path, "--json").json["rows"]
    assert [row["runtime"] for row in rows] == ["torch", "packed"]
    assert rows[1]["agreement"] >= 0.999 and rows[1]["size_bytes"] == path.stat().st_size
    assert rows[1]["stages"] == [record.stage for record in load(artifact).history]
    assert rows[1]["macs"] == rows[0]["macs"] > 0
    assert micronet("evaluate", path, "--json").json["accuracy"] == rows[1]["accuracy"]
    assert micronet("evaluate", path, "--device", "cuda").code == 2
    assert micronet("evaluate", path.with_name("none.packed")).code == 2


@pytest.mark.parametrize("name", ["w1a1", "w2a8", "wta8"])
def test_files_of_earlier_versions_give_the_same_scores(name, tmp_path):
    images = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)
    expected = np.load(OLD_FILES / f"{name}.npy")
    path = OLD_FILES / f"{name}.packed"
    np.testing.assert_allclose(PackedNetwork(path)(images), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    file, table = to_bytes(read(path)), read_table(path)
    assert file.endswith(path.read_bytes()[len(table.text) :])  # the same tensors
    assert len(file) <= path.stat().st_size + 64  # and checksums, which earlier versions had none of
    (tmp_path / "new.packed").write_bytes(file)
    assert read_table(tmp_path / "new.packed").header(KEY) == table.header(KEY)


@pytest.mark.parametrize("backend", ["compiled", "numpy"])
def test_it_runs_in_a_process_without_torch_and_onnx(old_file, backend):
    code = (
        "import sys, numpy as np\n"
        "sys.modules['torch'] = sys.modules['onnx'] = None\n"
        f"if {backend == 'numpy'}:\n    sys.modules['numba'] = None\n"
        "from micronet.runtimes.packed.predictor import PackedNetwork\n"
        f"network = PackedNetwork({str(old_file)!r})\n"
        "print(network(np.zeros((2, 3, 32, 32), np.float32)).shape, network.classes[0], network.kernel)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("(2, 10) 0")
    if backend == "numpy":
        assert done.stdout.split()[3] == "numpy"


def test_images_of_another_size_or_type_are_refused(old_file):
    network = PackedNetwork(old_file)
    with pytest.raises(MicronetError, match=r"shape \(N, 3, 32, 32\), but got \(1, 3, 16, 16\)"):
        network(np.zeros((1, 3, 16, 16), np.float32))
    with pytest.raises(MicronetError, match="float images, normalized as in training, but got uint8"):
        network(np.zeros((1, 3, 32, 32), np.uint8))


def test_numpy_gives_no_scores_for_no_images(old_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "micronet.runtimes.packed.compiled_backend", None)
    network = PackedNetwork(old_file)
    assert network.kernel.startswith("numpy")
    assert network(np.zeros((0, 3, 32, 32), np.float32)).shape == (0, 10)


def test_a_feature_map_beyond_memory_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "micronet.runtimes.packed.compiled_backend", None)
    conv = Operation("conv", [0], {"pads": [2000] * 4}, np.ones((1 << 22, 1, 1, 1), np.float32))
    (tmp_path / "x.packed").write_bytes(to_bytes(Program([conv], [1, 1, 1], {})))
    with pytest.raises(MicronetError, match="Unable to allocate"):
        PackedNetwork(tmp_path / "x.packed")(np.zeros((1, 1, 1, 1), np.float32))


def test_scores_that_are_not_finite_are_not_a_prediction(micronet, old_file, tmp_path):
    program = read(old_file)
    weight = np.full((10, 3, 1, 1), 3e38, np.float32)
    program.operations[:] = [Operation("conv", [0], {}, weight), Operation("mean", [1])]
    (tmp_path / "x.packed").write_bytes(to_bytes(program))
    Image.new("RGB", (32, 32), "white").save(tmp_path / "x.png")
    done = micronet("predict", tmp_path / "x.packed", tmp_path / "x.png")
    assert done.code == 1 and "NaN or infinity" in done.err
