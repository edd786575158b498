"""What commands say before they work and after: the data, the network, the command to run next."""

import re

import numpy as np
import pytest
from PIL import Image

from micronet.cli.app import run
from micronet.data.load import load_data

LINEAR = "tests/tasks/networks.py:Segmenter"


@pytest.fixture(scope="module")
def grey(tmp_path_factory):
    """A folder of grey images of two classes."""
    root, random = tmp_path_factory.mktemp("grey"), np.random.default_rng(0)
    for place in ("train/a", "train/b", "test/a", "test/b"):
        (root / place).mkdir(parents=True)
        for number in range(10):
            Image.fromarray(random.integers(0, 256, (8, 8), np.uint8)).save(root / place / f"{number}.png")
    return root


def test_trainings_begin_with_what_they_found_and_end_with_a_command_that_runs(grey, tmp_path, micronet):
    path = tmp_path / "a.safetensors"
    train = ["train", "--model", "nin", "--width", "0.1", "--data", grey, "--image-size", "32", "--epochs", "0"]
    done = micronet(*train, "-o", path)
    assert done.err.splitlines()[0] == (
        "18 training and 2 validation images, 2 classes, 1 channel, 32x32; nin with 0.01 M parameters; cpu"
    )
    command = done.out.splitlines()[-1]
    assert command == f"next: micronet quantize {path}"
    assert run([*command.split()[2:], "--dry-run"]) == 0


def test_grey_folders_have_one_channel_only_for_networks_that_take_it(grey, tmp_path, micronet):
    three = micronet(
        "train", "--model", "torchvision:resnet18", "--data", grey, "--epochs", "0", "-o", tmp_path / "b.safetensors"
    )
    assert "3 channels, 8x8; resnet18" in three.err
    assert load_data(str(grey)).spec.channels == 3  # as files of earlier versions record it


def test_import_says_the_size_of_the_network_at_the_input_that_it_was_given(tmp_path, micronet):
    np.save(tmp_path / "x.npy", np.zeros((9, 1, 12, 20), np.float32))
    imported = ["import", "--model", LINEAR, "--task", "agreement", "--data", tmp_path / "x.npy"]
    done = micronet(*imported, "-o", tmp_path / "a.safetensors")
    macs = 6 * 10 * (8 * 9 + 3 * 8)
    assert done.out.splitlines()[0] == f"Segmenter with 123 parameters, {macs:,} MACs for an input of float32 1x12x20"
    assert done.out.splitlines()[-1].endswith(f"a.safetensors --mode ptq --model {LINEAR}")
    alone = micronet("evaluate", tmp_path / "a.safetensors", "--model", LINEAR)
    assert alone.code == 2
    assert f"micronet compare FLOAT {tmp_path / 'a.safetensors'} --model {LINEAR}" in " ".join(alone.err.split())


def test_an_error_of_a_users_forward_has_its_line(tmp_path, micronet):
    np.save(tmp_path / "x.npy", np.zeros((9, 6), np.float32))
    model = ["--model", "tests/tasks/networks.py:Particular", "--task", "agreement", "--data", tmp_path / "x.npy"]
    done = micronet("import", *model, "-o", tmp_path / "a.safetensors")
    line = r"does not accept .*networks\.py:\d+ \(raise ValueError.*\): \d is no number of samples"
    assert done.code == 2 and re.search(line, " ".join(done.err.split()))


def test_no_part_of_a_path_is_taken_for_an_emoji(tmp_path, micronet):
    done = micronet("import", "--model", "absent.py:X", "-o", tmp_path / "a.safetensors")
    assert done.code == 2 and "absent.py:X: absent.py cannot be read" in done.err


def test_quantize_says_first_that_a_network_cannot_be_traced_and_names_no_next_command_that_would_refuse_it(
    tmp_path, micronet
):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(9, 6)).astype(np.float32))
    model, path = ["--model", "tests/tasks/networks.py:LeavesEarly"], tmp_path / "a.safetensors"
    micronet("import", *model, "--task", "agreement", "--data", tmp_path / "x.npy", "-o", path)
    done = micronet("quantize", path, "--mode", "ptq", *model, "-o", tmp_path / "b.safetensors")
    assert done.code == 0 and "next:" not in done.out and "far from" not in done.err
    first = " ".join(done.err.split())
    assert first.startswith("warning: forward() depends on") and "networks.py:41 (if x.sum() > 1e9:)" in first
    two_bits = ["--w-bits", "2", "--a-bits", "2", "--first-last", "same"]
    rough = micronet("quantize", path, "--mode", "ptq", *two_bits, *model, "-o", tmp_path / "c.safetensors")
    assert "warning: the outputs are far from the float network's (SQNR" in " ".join(rough.err.split())


def test_a_loop_over_time_steps_fixes_their_number_and_that_is_said(tmp_path, micronet):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(9, 4, 6)).astype(np.float32))
    model, path = ["--model", "tests/tasks/networks.py:Steps"], tmp_path / "a.safetensors"
    micronet("import", *model, "--task", "agreement", "--data", tmp_path / "x.npy", "-o", path)
    done = micronet("quantize", path, "--mode", "ptq", *model, "-o", tmp_path / "b.safetensors")
    assert "warning: the sizes of the inputs are fixed from now on (float32 4x6)" in " ".join(done.err.split())
    options = [*model, "--dynamic", "batch,1", "-o", tmp_path / "b.onnx"]
    refused = micronet("export-onnx", tmp_path / "b.safetensors", *options)
    assert refused.code == 2 and "quantize fixed the sizes of this network's inputs" in refused.err


def test_outputs_that_nothing_changes_are_said(tmp_path, micronet):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(9, 6)).astype(np.float32))
    model, path = ["--model", "tests/tasks/networks.py:Untrained"], tmp_path / "a.safetensors"
    micronet("import", *model, "--task", "agreement", "--data", tmp_path / "x.npy", "-o", path)
    done = micronet("quantize", path, "--mode", "ptq", *model, "-o", tmp_path / "b.safetensors")
    said = " ".join(done.err.split())
    assert "warning: the outputs equal the float network's exactly" in said and "ranges set from" not in said
    for rows, words in (
        (np.zeros((9, 6)), "inputs hold one value only"),
        ([range(6)] * 9, "calibration samples are the same"),
    ):
        np.save(tmp_path / "c.npy", np.asarray(rows, np.float32))
        options = ["--mode", "ptq", *model, "--calib-data", tmp_path / "c.npy", "--force"]
        done = micronet("quantize", path, *options, "-o", tmp_path / "b.safetensors")
        assert " ".join(done.err.split()).startswith("warning: ") and words in " ".join(done.err.split())


def test_bn_fuse_follows_any_quantization(tmp_path, micronet):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(9, 6)).astype(np.float32))
    model, path = ["--model", "tests/tasks/networks.py:Twice"], tmp_path / "a.safetensors"
    micronet("import", *model, "--task", "agreement", "--data", tmp_path / "x.npy", "-o", path)
    assert micronet("bn-fuse", path, *model, "-o", tmp_path / "b.safetensors").code == 2
    micronet("quantize", path, "--mode", "ptq", *model, "-o", tmp_path / "c.safetensors")
    done = micronet("bn-fuse", tmp_path / "c.safetensors", *model, "-o", tmp_path / "d.safetensors")
    assert done.code == 0 and done.out.startswith("no batch norms left to fold, and no biases to round")
