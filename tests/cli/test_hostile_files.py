"""Files that would run, exhaust or mislead something: each is one line, and exit code 1 or 2."""

import json
import os
import resource
import struct
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from micronet.artifact.header import KEY
from micronet.cli import app, command
from micronet.stages.stage import find

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/tmp/x) (w) file\nshowpage\n"


def _bomb(path):
    """A PNG of 14,000 x 14,000 pixels in a few bytes; only its header is whole."""
    Image.new("1", (14_000, 14_000)).save(path)


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("a.png", lambda path: path.write_bytes(EPS), "cannot identify"),
        ("a.png", _bomb, "pixels"),
        ("a.png", os.mkfifo, "not a regular file"),
    ],
    ids=["EPS", "bomb", "pipe"],
)
def test_a_hostile_image_is_refused(micronet, chain, tmp_path, name, make, message):
    make(tmp_path / name)
    done = micronet("predict", chain / "float.safetensors", tmp_path / name)
    assert done.code == 2
    assert message in done.err


def test_a_label_that_would_need_a_list_of_a_trillion_classes_is_refused(micronet, tmp_path):
    images, labels = np.zeros((4, 8, 8), np.uint8), np.array([0, 1, 0, 2**40])
    np.savez(tmp_path / "a.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    done = micronet("train", "--data", tmp_path / "a.npz", "-o", tmp_path / "x.safetensors")
    assert (done.code, "1099511627776" in done.err) == (2, True)


def test_an_array_that_says_it_is_larger_than_its_file_is_refused(micronet, chain, tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(4, np.float32))
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes().replace(b"(4,)", b"(9,)"))
    output = tmp_path / "x.safetensors"
    done = micronet("import", "--model", "nin", "--task", "agreement", "--data", tmp_path / "a.npy", "-o", output)
    assert (done.code, "size that its header says" in done.err) == (2, True)


@pytest.mark.parametrize(
    ("tensor", "word"),
    [
        (torch.zeros(4, dtype=torch.complex64), "complex"),
        (torch.zeros(4, 4).to_sparse(), "sparse"),
        (torch.quantize_per_tensor(torch.zeros(4), 0.1, 0, torch.qint8), "quantized"),
    ],
)
def test_tensors_that_are_not_plain_numbers_are_refused(micronet, tmp_path, tensor, word):
    torch.save({"a": tensor}, tmp_path / "w.pth")
    done = micronet("import", "--model", "nin", "--weights", tmp_path / "w.pth", "-o", tmp_path / "x.safetensors")
    assert (done.code, word in done.err) == (2, True)


def _compressed(path):
    torch.save({"a": torch.zeros(1 << 16)}, path)
    with zipfile.ZipFile(path) as stored:
        members = {name: stored.read(name) for name in stored.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def _bytearray(path):
    """A pickle of a few bytes that asks for two billion."""
    path.write_bytes(b"\x80\x02c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R.")


@pytest.mark.parametrize(
    ("make", "why"), [(_compressed, "has compressed members"), (_bytearray, "is not a file of torch.save")]
)
def test_weights_that_take_more_memory_than_their_file_are_refused(micronet, tmp_path, make, why):
    make(tmp_path / "w.pth")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    done = micronet("import", "--model", "nin", "--weights", tmp_path / "w.pth", "-o", tmp_path / "x.safetensors")
    assert (done.code, why in done.err) == (2, True)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB


def test_control_characters_of_a_file_are_escaped(micronet, tmp_path):
    header = {"format": 1, "model": {"name": "nin\x1b[2J\x07"}, "history": []}
    text = json.dumps({"__metadata__": {KEY: json.dumps(header)}}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    done = micronet("inspect", tmp_path / "a.safetensors")
    assert "\\x1b[2J\\x07" in done.out
    assert "\x1b" not in done.out + done.err


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: x")]
)
def test_out_of_memory_is_one_line(micronet, monkeypatch, error):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(app, "app", fail)
    done = micronet("inspect", "x")
    assert (done.code, done.err.startswith("error: out of memory")) == (1, True)


def test_a_network_that_returns_more_rows_than_images_is_refused(micronet, chain, tmp_path):
    model = onnx.load(chain / "float.onnx")
    name = model.graph.output[0].name
    for node in model.graph.node:
        node.output[:] = ["once" if each == name else each for each in node.output]
    model.graph.node.append(onnx.helper.make_node("Concat", ["once", "once"], [name], axis=0))
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "rows"
    onnx.save(model, tmp_path / "a.onnx")
    done = micronet("evaluate", tmp_path / "a.onnx", "--skip-timing", "--limit", "8")
    assert (done.code, "rows of scores" in done.err) == (2, True), done.err


def test_an_integer_beyond_floats_in_a_recipe_is_one_line(micronet, tmp_path):
    (tmp_path / "a.toml").write_text(f'[[stage]]\ncommand = "train"\nlr = {10**400}\n')
    done = micronet("run", tmp_path / "a.toml")
    assert (done.code, "lr is inf" in done.err) == (2, True), done.err


def test_child_processes_import_nothing_from_the_working_directory(monkeypatch):
    started = []
    monkeypatch.setattr(command, "run_in_processes", lambda work, count, program, report: started.append(program) or 0)
    command.perform(find("train").configure({"processes": 2}))
    assert started[0][0] == "-P"  # Python's option


@pytest.mark.parametrize("library", ["onnxruntime", "openvino"])
def test_runtimes_report_nothing_to_their_makers(tmp_path, library):
    """They would write what they are about to send into the user's home, from the moment they are imported."""
    if find_spec(library) is None:
        pytest.skip(f"needs {library}")
    load = (
        "import onnxruntime"
        if library == "onnxruntime"
        else "from micronet.runtimes.openvino import load_library as f; f()"
    )
    code = [sys.executable, "-c", f"import micronet; {load}"]
    subprocess.run(code, check=True, env={"HOME": str(tmp_path)}, cwd=Path(__file__).parents[2], timeout=60)
    assert not list(tmp_path.rglob("*"))
