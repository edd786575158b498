"""Verify: whole files pass, and a damaged or wrong one is one line that names what is wrong with it."""

import json

import numpy as np
import pytest
import safetensors.numpy
import torch
from safetensors.torch import load_file, save_file

from micronet.artifact.artifact import load, save, write_tensors
from micronet.artifact.header import KEY
from micronet.core.tensor_file import read_table, seal
from micronet.packed import file_format
from micronet.quantization.histogram import BINS, Histogram, save_statistics


def test_whole_files_pass_and_agree_with_their_artifact(micronet, chain, tmp_path):
    packed = tmp_path / "a.packed"
    assert micronet("pack", chain / "fused.safetensors", "-o", packed, "-q").code == 0
    done = micronet("verify", chain / "int8.onnx", packed, chain / "fused.safetensors", "--json")
    assert done.code == 0, done.err
    rows = {row["file"].rpartition(".")[2]: row for row in done.json}
    assert rows["safetensors"]["quantizers"] > 0
    assert rows["packed"]["checksums"] == "3 tensors match"
    assert rows["onnx"]["agrees"] and rows["packed"]["agrees"]


def test_a_flipped_bit_is_named_beside_a_whole_file(micronet, chain, tmp_path):
    path = chain / "fused.safetensors"
    table, content = read_table(path), bytearray(path.read_bytes())
    name, info = max(table.tensors.items(), key=lambda item: item[1].size_bytes)
    content[len(table.text) + info.begin + 1] ^= 16
    (tmp_path / "a.safetensors").write_bytes(content)
    done = micronet("verify", tmp_path / "a.safetensors", path)
    assert done.code == 2
    assert f"tensor {name} does not match its checksum" in done.err


def test_another_networks_file_does_not_agree(micronet, chain, tmp_path):
    artifact = load(chain / "float.safetensors")
    with torch.no_grad():
        artifact.model.features[0].conv.weight.neg_()
    save(artifact, tmp_path / "a.safetensors")
    done = micronet("verify", tmp_path / "a.safetensors", chain / "float.onnx")
    assert done.code == 1
    assert "differ by" in done.err


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "command",
    [
        ["verify"], ["evaluate"], ["bn-fuse", "-o", "x.safetensors"], ["pack", "-o", "x.packed"],
        ["export-onnx", "-o", "x.onnx"], ["prune", "--percent", "0.5", "-o", "x.safetensors"],
        ["quantize", "--mode", "ptq", "-o", "x.safetensors"], ["finetune", "--epochs", "1", "-o", "x.safetensors"],
    ],
    ids=lambda command: command[0],
)  # fmt: skip
def test_a_network_with_nan_or_infinity_is_a_failure_of_every_command(
    micronet, chain, tmp_path, monkeypatch, command, value
):
    monkeypatch.chdir(tmp_path)
    path, tensors = tmp_path / "bad.safetensors", load_file(chain / "float.safetensors")
    tensors["features.0.conv.weight"].flatten()[3] = value
    save_file(tensors, path, {KEY: read_table(chain / "float.safetensors").metadata[KEY]})
    done = micronet(command[0], path, *command[1:])
    assert done.code == 1
    assert "features.0.conv.weight" in done.err
    assert [each.name for each in tmp_path.iterdir()] == ["bad.safetensors"]


def test_imported_weights_with_nan_are_a_failure(micronet, chain, tmp_path):
    tensors = load(chain / "float.safetensors").model.state_dict()
    tensors["features.0.conv.weight"].flatten()[3] = float("nan")
    torch.save(tensors, tmp_path / "w.pth")
    done = micronet("import", "--model", "nin", "--weights", tmp_path / "w.pth", "-o", tmp_path / "a.safetensors")
    assert (done.code, "features.0.conv.weight" in done.err) == (1, True)


def _data(**changes):
    return lambda tensors, header: header["data"].update(changes)


def _tensor(ending, change):
    def damage(tensors, header):
        name = next(name for name in tensors if name.endswith(ending))
        tensors[name] = change(tensors[name])

    return damage


@pytest.mark.parametrize(
    ("damage", "code", "message"),
    [
        (_tensor("num_batches_tracked", lambda x: torch.full(x.shape, float("nan"))), 2, "is float32, expected int64"),
        (_tensor("num_batches_tracked", lambda x: x + 0.5), 2, "is float32, expected int64"),
        (_tensor("num_batches_tracked", lambda x: torch.full(x.shape, 1e30)), 2, "is float32, expected int64"),
        (_tensor("num_batches_tracked", lambda x: x.cfloat()), 2, "is complex64, expected int64"),
        (_tensor("num_batches_tracked", lambda x: x.float()), 0, ""),
        (_tensor("running_mean", lambda x: x.long()), 2, "is int64, expected float32"),
        (_tensor("running_mean", lambda x: x.cfloat()), 2, "is complex64, expected float32"),
        (_tensor("running_mean", lambda x: x.double()), 0, ""),
        (_tensor("running_var", lambda x: -x - 1), 1, "a negative variance in"),
        (lambda tensors, header: header["metrics"].update(deep=[{"loss": float("nan")}]), 1, "deep"),
        (_data(image_size=2**20), 2, "images of 1,048,576x1,048,576"),
        (_data(inputs=[{"shape": [1], "dtype": "float32"}] * 2000), 2, "2,000 inputs"),
        (_data(inputs=[{"shape": [1] * 100, "dtype": "float32"}]), 2, "100 dimensions"),
        (_data(inputs=[{"shape": [2**27], "dtype": "float32"}] * 3), 2, "its inputs have more than"),
    ],
)
def test_a_hostile_artifact_with_valid_checksums_is_refused(micronet, chain, tmp_path, damage, code, message):
    source, path = chain / "float.safetensors", tmp_path / "a.safetensors"
    tensors, header = load_file(source), json.loads(read_table(source).metadata[KEY])
    damage(tensors, header)
    write_tensors(path, tensors, KEY, header)
    done = micronet("verify", path)
    assert (done.code, message in done.err) == (code, True), done.err


def test_a_header_with_a_key_twice_is_refused(micronet, chain, tmp_path):
    source, path = chain / "float.safetensors", tmp_path / "a.safetensors"
    text = read_table(source).metadata[KEY].replace("{", '{"format": 1, ', 1)
    save_file(load_file(source), path, {KEY: text})
    done = micronet("inspect", path)
    assert (done.code, "'format' twice" in done.err) == (2, True), done.err


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_packed_network_with_nan_is_a_failure(micronet, chain, tmp_path, value):
    whole, path = tmp_path / "a.packed", tmp_path / "b.packed"
    assert micronet("pack", chain / "fused.safetensors", "-o", whole, "-q", "--skip-timing").code == 0
    tensors = safetensors.numpy.load_file(whole)
    tensors["floats"][3] = value
    metadata = {file_format.KEY: read_table(whole).metadata[file_format.KEY]}
    path.write_bytes(b"".join(seal(safetensors.numpy.save(tensors, metadata))))
    for command in ("verify", "evaluate"):
        done = micronet(command, path)
        assert (done.code, "NaN or infinity" in done.err) == (1, True), done.err
    save = safetensors.numpy.save({**tensors, "packed": tensors["packed"].astype(np.int8)}, metadata)
    path.write_bytes(b"".join(seal(save)))
    assert micronet("verify", path).code == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_calibration_statistics_with_impossible_counts_are_refused(micronet, tmp_path, value):
    path, histogram = tmp_path / "a.safetensors", Histogram()
    histogram.add(torch.linspace(-1, 1, BINS))
    save_statistics({"sound": histogram, "empty": Histogram()}, path, "")
    assert micronet("verify", path).code == 0
    histogram.counts[5] = value
    save_statistics({"sound": histogram}, path, "")
    done = micronet("verify", path)
    assert (done.code, "counts or ends of sound" in done.err) == (2, True), done.err


def test_a_checkpoint_with_nan_is_a_failure(micronet, tmp_path):
    path = tmp_path / "a.checkpoint.safetensors"
    write_tensors(path, {"model.w": torch.tensor([1.0, float("nan")])}, "micronet-checkpoint", {})
    done = micronet("verify", path)
    assert (done.code, "NaN in model.w" in done.err) == (1, True), done.err
