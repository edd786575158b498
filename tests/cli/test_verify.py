"""Verify: whole files pass, and a damaged or wrong one is one line that names what is wrong with it."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from micronet.artifact.artifact import load, save
from micronet.artifact.header import KEY
from micronet.core.tensor_file import read_table


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
