"""``export``: one command for every target; folders that are whole, known and never mixed with a user's files."""

import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import micronet as api
from micronet import registry
from micronet.core.files import file_size
from micronet.core.folders import Folder, check_output_folder, read_note, write_folder
from micronet.core.progress import Silent
from micronet.errors import FailedError, MicronetError
from micronet.onnx import check
from micronet.stages.stage import find

LIMITS = ["--check-images", "32", "--skip-timing"]
FOLDER = Folder({"a.bin": bytes(5), "sub/b.bin": b"b"}, {"target": "openvino"})
needs_openvino = pytest.mark.skipif(find_spec("openvino") is None, reason="needs openvino")


@pytest.mark.parametrize(
    ("target", "stage", "suffix"), [("onnxruntime", "export-onnx", ".onnx"), ("packed", "pack", ".packed")]
)
def test_a_target_with_its_own_stage_gets_the_same_file(micronet, chain, tmp_path, target, stage, suffix):
    ours, theirs = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    assert micronet("export", chain / "fused.safetensors", "--target", target, *LIMITS, "-o", ours).code == 0
    assert micronet(stage, chain / "fused.safetensors", *LIMITS, "-o", theirs).code == 0
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_setting_that_the_targets_stage_does_not_have_is_refused(micronet, chain):
    refused = micronet("export", chain / "float.safetensors", "--target", "tensorrt", "--check-images", "8")
    assert refused.code == 2 and "--check-images has no effect with --target tensorrt" in refused.err
    unknown = micronet("export", chain / "float.safetensors", "--target", "abacus")
    assert unknown.code == 2 and all(target in unknown.err for target in registry.TARGETS)


@pytest.mark.parametrize(
    ("target", "words"), [("c", "cannot be exported to c"), ("openvino", "evaluate a.onnx --runtime openvino")]
)
def test_an_onnx_file_is_refused_with_what_its_target_can_do_with_it(target, words):
    with pytest.raises(MicronetError, match=words):
        find("export").configure({"artifact": Path("a.onnx"), "target": target})


@pytest.mark.parametrize(
    ("stage", "target"), [("export", {"target": "ncnn"}), ("export", {"target": "c"}), ("pack", {})]
)
def test_inputs_that_are_no_image_are_refused_before_any_work(stage, target):
    inputs = [
        {"name": "left", "dtype": "float32", "shape": [6, 9]},
        {"name": "right", "dtype": "float32", "shape": [5]},
    ]
    source = SimpleNamespace(data={"name": "a.npz", "task": "agreement", "inputs": inputs})  # nothing that could run
    with pytest.raises(MicronetError, match=r"takes left \(6, 9\) and right \(5,\)"):
        find(stage).configure({"artifact": Path("a.safetensors"), **target}).run(SimpleNamespace(artifact=source))


def failing_rename(rename):
    """Return a rename that fails for new folders."""

    def failing(path, target):
        if path.name == "new":
            raise OSError("no space")
        return rename(path, target)

    return failing


def test_a_folder_is_replaced_whole_but_nobody_elses_is(tmp_path, monkeypatch):
    path = tmp_path / "net"
    write_folder(path, FOLDER)
    size = file_size(path)
    assert size == 6 + (path / "micronet.json").stat().st_size
    (path / "made").write_bytes(bytes(100))  # as make check does
    assert file_size(path) == size
    (path / "made").unlink()
    write_folder(path, FOLDER._replace(files={"c.bin": b"c"}))
    assert sorted(each.name for each in path.iterdir()) == ["c.bin", "micronet.json"]
    assert read_note(path)["target"] == "openvino"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(MicronetError, match="other files, which would be lost"):
        write_folder(tmp_path / "mine", FOLDER)
    (path / "my_main.c").touch()
    with pytest.raises(MicronetError, match=r"my_main\.c"):
        write_folder(path, FOLDER)
    (path / "my_main.c").unlink()
    killed = tmp_path / ".net.micronet-killed"
    killed.mkdir()
    path.rename(killed / "old")  # as between the two renames
    with pytest.raises(MicronetError, match="already exists"):
        check_output_folder(path, force=False)
    with monkeypatch.context() as patch, pytest.raises(FailedError):
        patch.setattr(Path, "rename", failing_rename(Path.rename))
        write_folder(path, FOLDER)
    assert [each.name for each in path.iterdir() if each.name != "micronet.json"] == ["c.bin"]
    (tmp_path / "file").touch()
    with pytest.raises(MicronetError, match="is a file"):
        write_folder(tmp_path / "file", FOLDER)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "mine", "net"]


def _note(**values):
    return json.dumps({"files": {}, "target": "openvino", "format": 1, **values})


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("a.bin", "other", "not the file that was written"),
        ("sub/b.bin", None, "not the file that was written"),
        ("micronet.json", "{", "is corrupted"),
        ("micronet.json", "[]", "is corrupted"),
        ("micronet.json", _note(target=1), "is corrupted"),
        ("micronet.json", _note(), "is not listed"),
        ("micronet.json", _note(files={"../x": ""}), "not the file that was written"),
        ("micronet.json", _note(files={"a\0": {}}), "not the file that was written"),
        ("micronet.json", _note(files={"a.bin": {"bytes": 5}}), "not the file that was written"),
        ("micronet.json", _note(format=9), "pip"),
        ("micronet.json", _note(target="x"), "for the target x"),
        ("micronet.json", None, "specify a file in it"),
    ],
)
def test_a_damaged_folder_is_one_clear_error(micronet, tmp_path, file, content, message):
    write_folder(tmp_path / "net", FOLDER)
    (tmp_path / "x").touch()
    damaged = tmp_path / "net" / file
    damaged.unlink() if content is None else damaged.write_text(content)
    refused = micronet("evaluate", tmp_path / "net")
    assert refused.code == 2 and message in refused.err, refused.err


@needs_openvino
def test_a_folder_is_a_network_like_any_other(micronet, chain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.toml").write_text(
        f'[[stage]]\ncommand = "export"\nname = "net"\nartifact = "{chain / "fused.safetensors"}"\n'
        'target = "openvino"\ncheck_images = 32\n'
    )
    assert micronet("run", "r.toml").code == 0
    again = micronet("run", "r.toml")
    assert again.code == 0 and "unchanged" in again.err
    net = next(tmp_path.rglob("micronet.json")).parent
    rows = micronet("compare", chain / "int8.onnx", net, "--limit", "64", "--skip-timing", "--json").json["rows"]
    assert (
        rows[1]["agreement"] >= 0.95 and rows[0]["macs"] == rows[1]["macs"] and rows[0]["params"] == rows[1]["params"]
    )
    assert micronet("verify", chain / "fused.safetensors", net, "--json").json[1]["agrees"] is True
    exists = micronet("export", chain / "fused.safetensors", "--target", "openvino", *LIMITS, "-o", net)
    assert exists.code == 2 and "--force" in exists.err
    found = micronet(
        "export", chain / "fused.safetensors", "--target", "openvino", *LIMITS, "-o", net, "--force", "--json"
    )
    counts = found.json["integers"]["convolutions"]
    assert counts["integer"] == counts["all"] > 0


@pytest.mark.parametrize("target", ["onnxruntime", pytest.param("openvino", marks=needs_openvino)])
def test_gates_stay_float_where_integers_would_not_agree_with_torch(monkeypatch, target):
    torch.manual_seed(0)
    images = torch.randn(8, 3, 8, 8)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Hardswish(), nn.Conv2d(8, 8, 3), nn.Hardswish(), nn.Conv2d(8, 4, 3))
    quantized = api.quantize(net.eval(), data=[images], mode="ptq")
    lines, seen = [], []

    def require(*arguments, **settings):
        seen.append(arguments)
        if len(seen) == 1:
            raise FailedError("too far apart")

    monkeypatch.setattr(check, "require_agreement", require)
    monkeypatch.setattr("micronet.stages.export_folder.require_close", require)
    progress = Silent()
    progress.line = lines.append
    api.export(quantized, images, target=target, progress=progress)
    assert len(seen) == 2 and any("stay float" in line and "too far apart" in line for line in lines)
