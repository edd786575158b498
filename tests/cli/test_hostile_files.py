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
from onnx import TensorProto, helper
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


@pytest.mark.parametrize(("make", "why"), [(_compressed, "has compressed members"), (_bytearray, "makes a bytearray")])
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


LARGE = 2**15
MAKERS = {  # a node of each, what it reads, and constants
    "ConstantOfShape": (["shape"], {}), "Pad": (["x", "pads"], {}), "RandomNormal": ([], {"shape": [LARGE, LARGE]}),
    "RandomUniformLike": (["tiled"], {}), "Resize": (["x", "", "factors"], {}),
    "OneHot": (["shape", "many", "pair"], {}), "Expand": (["x", "shape3"], {}),
    "EyeLike": (["tiled"], {}), "Range": (["zero", "many1", "one"], {}),
}  # fmt: skip
NUMBERS = {
    "shape": np.array([LARGE, LARGE]), "shape3": np.array([LARGE, LARGE, 4]), "pads": np.array([0, 0, LARGE, LARGE]),
    "factors": np.array([LARGE, LARGE], np.float32), "many": np.array([2**33]), "pair": np.array([0, 1], np.float32),
    "zero": np.array(0), "one": np.array(1), "many1": np.array(2**31), "repeats": np.array([LARGE, LARGE]),
}  # fmt: skip


def _onnx(path, nodes, numbers):
    """Write an ONNX file whose input is x, (1, 4) float32, and whose output is y."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", "columns"])],
        [onnx.numpy_helper.from_array(value, name) for name, value in numbers.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), path)


def _in_a_branch(nodes, shape):
    """Return an If whose branches are ``nodes``, which compute ``sum``; it reads the constant ``true``."""
    branch = helper.make_graph(nodes, "b", [], [helper.make_tensor_value_info("sum", TensorProto.FLOAT, shape)])
    return helper.make_node("If", ["true"], ["branched"], then_branch=branch, else_branch=branch)


@pytest.mark.parametrize("branched", [False, True], ids=["graph", "branch"])
@pytest.mark.parametrize("maker", MAKERS)
def test_a_value_of_four_gigabytes_is_refused_whatever_makes_it(micronet, tmp_path, maker, branched):
    inputs, attributes = MAKERS[maker]
    nodes = [
        helper.make_node("Tile", ["x", "repeats"], ["tiled"]) if "tiled" in inputs else None,
        helper.make_node(maker, inputs, ["large"], **attributes),
        helper.make_node("Cast", ["large"], ["cast"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["cast"], ["sum"], keepdims=0),
    ]
    nodes = [node for node in nodes if node is not None]
    if branched:
        nodes = [_in_a_branch(nodes, [])]
    nodes.append(helper.make_node("Add", ["x", "branched" if branched else "sum"], ["y"]))
    _onnx(tmp_path / "a.onnx", nodes, {**NUMBERS, "true": np.array(True)})
    done = micronet("check-onnx", tmp_path / "a.onnx")
    assert (done.code, " values)" in done.err) == (2, True), done.err


NAN, INF = np.float32("nan"), np.float32("inf")


@pytest.mark.parametrize(
    ("operator", "value", "code"),
    [
        *(("MatMul", value, 1) for value in (NAN, INF, -INF)), ("Add", NAN, 1), ("Add", -INF, 0), ("Mul", INF, 1),
        ("Add", INF, 0),
    ],
)  # fmt: skip
@pytest.mark.parametrize("place", ["initializer", "constant", "branch"])
def test_nan_and_multiplied_infinity_of_onnx_files_are_failures(micronet, tmp_path, operator, value, code, place):
    weight = np.ones((4, 4), np.float32)
    weight[1, 2] = value
    numbers = {"true": np.array(True)}
    constant = helper.make_node("Constant", [], ["w"], value=onnx.numpy_helper.from_array(weight))
    moved = helper.make_node("Transpose", ["w"], ["moved"])
    if place == "initializer":
        nodes, numbers["w"] = [moved], weight
    else:
        nodes = [constant, moved]
    nodes.append(helper.make_node(operator, ["x", "moved"], ["sum"]))
    if place == "branch":
        nodes = [_in_a_branch(nodes, ["rows", "columns"]), helper.make_node("Identity", ["branched"], ["y"])]
    else:
        nodes[-1].output[0] = "y"
    _onnx(tmp_path / "a.onnx", nodes, numbers)
    done = micronet("verify", tmp_path / "a.onnx")
    assert done.code == code, done.err
    assert code == 0 or ("in w" in done.err)


@pytest.mark.parametrize(
    ("kind", "values", "code"),
    [
        ("DequantizeLinear", -1, 1), ("DequantizeLinear", 0, 0), ("QuantizeLinear", 0, 1),
        ("BatchNormalization", -1, 1), ("BatchNormalization", 0, 0),
    ],
)  # fmt: skip
def test_scales_and_variances_of_onnx_files_are_not_negative(micronet, tmp_path, kind, values, code):
    numbers = {
        "one": np.ones(4, np.float32), "tested": np.full(4, values, np.float32), "q": np.ones(4, np.int8),
        "zero": np.zeros(4, np.int8),
    }  # fmt: skip
    if kind == "BatchNormalization":
        nodes = [helper.make_node(kind, ["x", "one", "one", "one", "tested"], ["y"])]
    else:
        inputs = ["q", "tested", "zero"] if kind == "DequantizeLinear" else ["one", "tested", "zero"]
        nodes = [helper.make_node(kind, inputs, ["out"], axis=0)]
        nodes.append(helper.make_node("Cast", ["out"], ["cast"], to=TensorProto.FLOAT))
        nodes.append(helper.make_node("Add", ["x", "cast"], ["y"]))
    _onnx(tmp_path / "a.onnx", nodes, numbers)
    done = micronet("verify", tmp_path / "a.onnx")
    assert (done.code, code == 0 or "tested" in done.err) == (code, True), done.err


def test_a_network_that_returns_more_rows_than_images_is_refused(micronet, chain, tmp_path):
    model = onnx.load(chain / "float.onnx")
    name = model.graph.output[0].name
    for node in model.graph.node:
        node.output[:] = ["once" if each == name else each for each in node.output]
    model.graph.node.append(helper.make_node("Concat", ["once", "once"], [name], axis=0))
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
