"""``inspect`` of files that are not artifacts: ONNX files from anywhere, packed networks, exported folders."""

import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from micronet.artifact.header import read_header
from micronet.core.folders import Folder, write_folder
from micronet.packed.file_format import to_bytes
from micronet.packed.program import Operation, Program
from micronet.stages.inspect_artifact import inspect_file

BITS = {1: [-1, 1], 1.58: [-1, 0, 1], 4: range(-7, 8), 8: range(-127, 128)}  # of a weight -> its levels


def weight(levels):
    return np.resize(np.array(levels, np.int32), (8, 3, 6, 6))


def packed(bits):
    first = Operation("quantize", [0], {"scale": 0.1, "zero_point": 3, "range": [0, 255]})
    layer = Operation("conv", [1], {"group": 1}, weight(BITS[bits]), scale=np.ones(1, np.float32))
    head = Operation("conv", [2], {"group": 1}, np.ones((2, 8, 1, 1), np.float32))
    about = {"model": "nin", "data": {"name": "digits"}, "stages": ["train", "quantize"]}
    return to_bytes(Program([first, layer, head], [3, 8, 8], about))


def test_an_exported_file_tells_what_its_artifact_does(micronet, chain):
    told = micronet("inspect", chain / "int8.onnx", "--json").json
    header, _ = read_header(chain / "fused.safetensors")
    proto = onnx.load(chain / "int8.onnx")
    assert [each["stage"] for each in told["metadata"]["history"]] == [each.stage for each in header.history]
    assert told["metadata"]["data"]["classes"] == header.data["classes"]
    assert (told["size_bytes"], told["kind"]) == ((chain / "int8.onnx").stat().st_size, "onnx")
    assert sum(told["operators"].values()) == len(proto.graph.node)
    [images], [scores] = told["inputs"], told["outputs"]
    assert (images["dtype"], images["shape"][1:], scores["shape"][1:]) == ("float32", [3, 32, 32], [10])
    quantized = {name for name, slots in header.history[-1].quantizers.items() if "weight_quantizer" in slots}
    assert {layer["name"] for layer in told["layers"]} == quantized
    assert all((layer["bits"], layer["weight"]) == (8, "int8 per channel") for layer in told["layers"])
    assert told["integer_layers"] == len(told["layers"]) == told["operators"]["Conv"]
    floats = micronet("inspect", chain / "float.onnx", "--json").json
    assert {(each["bits"], each["integer"]) for each in floats["layers"]} == {(32, False)}
    assert floats["params"] == told["params"]
    shown = micronet("inspect", chain / "int8.onnx").out
    assert "features.0.conv" in shown and "Conv 9" in shown and "quantize  a_bits=8" in shown


def test_weights_that_are_packed_tell_what_they_take_in_the_file(tmp_path):
    from micronet.onnx.low_bits import pack_weights

    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 256, 3, 3])
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "t"], ["v"]),
        helper.make_node("Conv", ["d", "v"], ["y"], name="conv"),
    ]
    arrays = {"s": np.float32(0.1), "z": np.uint8(3), "t": np.float32(0.1)}
    arrays["w"] = np.tile(weight(BITS[1.58]), (32, 1, 1, 1)).astype(np.int8)
    stored = [numpy_helper.from_array(np.asarray(value), name) for name, value in arrays.items()]
    proto = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y], stored), opset_imports=[helper.make_opsetid("", 18)]
    )
    for name, model, bits in (("plain", proto, 8), ("packed", pack_weights(proto), 1.6)):
        onnx.save(model, tmp_path / f"{name}.onnx")
        told = inspect_file(tmp_path / f"{name}.onnx")
        [layer] = told["layers"]
        assert (layer["bits"], layer["integer"], layer["input"]) == (pytest.approx(bits, abs=0.01), True, "uint8")
        assert sum(told["operators"].values()) == len(model.graph.node)


def foreign(path, nodes, inputs, arrays, functions=()):
    """Write a model in the way of another tool, with its weights in a second file."""
    stored = [numpy_helper.from_array(np.asarray(value), name) for name, value in arrays.items()]
    graph = helper.make_graph(
        nodes, "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["a", "b", "c"])], initializer=stored
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, producer_name="a tool", functions=list(functions))
    helper.set_model_props(model, {"author": "x" * 300, "stride": "32"})
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)


def test_foreign_files_tell_their_integers_recurrent_layers_branches_and_second_file(tmp_path):
    x, free = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", None, 4]) for name in ("x", "free"))
    branch = helper.make_graph(
        [helper.make_node("Neg", ["m"], ["n"])], "b", [], [helper.make_tensor_value_info("n", TensorProto.FLOAT, None)]
    )
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        helper.make_node("MatMulInteger", ["q", "w8"], ["i"]),
        helper.make_node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("LSTM", ["f", "wl", "rl"], ["h", "", ""], hidden_size=2),
        helper.make_node("MatMul", ["f", "w32"], ["m"]),
        helper.make_node("If", ["true"], ["y"], then_branch=branch, else_branch=branch),
    ]
    arrays = {
        "w8": np.ones((4, 4), np.int8), "w32": np.ones((4, 2), np.float32), "true": np.array(True),
        "wl": np.ones((1, 8, 4), np.float32), "rl": np.ones((1, 8, 2), np.float32),
    }  # fmt: skip
    foreign(tmp_path / "a.onnx", nodes, [x, free], arrays)
    told = inspect_file(tmp_path / "a.onnx")
    assert [(each["operator"], each["bits"], each["integer"]) for each in told["layers"]] == [
        ("MatMulInteger", 8, True), ("LSTM", 32, False), ("MatMul", 32, False),
    ]  # fmt: skip
    assert told["operators"]["Neg"] == 2 and told["producer"] == "a tool"
    assert [each["shape"] for each in told["inputs"]] == [["batch", None, 4]] * 2
    assert told["outputs"][0]["shape"] == ["a", "b", "c"]
    assert told["size_bytes"] == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert told["opsets"] == {"ai.onnx": 18, "com.microsoft": 1}
    assert told["other_metadata"] == {"author": "x" * 200, "stride": "32"} and told["metadata"]["history"] == []
    assert json.dumps(told)


@pytest.mark.parametrize("bits", BITS)
def test_a_packed_file_tells_the_width_of_its_weights(micronet, tmp_path, bits):
    path = tmp_path / "a.packed"
    path.write_bytes(packed(bits))
    told = micronet("inspect", path, "--json").json
    layer, head = told["layers"]
    assert (layer["bits"], layer["input"], layer["integer"]) == (bits, "integer", True)
    assert (head["bits"], head["input"], head["integer"]) == (32, "float32", False)
    assert abs(layer["size_bytes"] * 8 / layer["params"] - bits) < 0.05  # five ternary weights take a byte
    assert told["inputs"][0]["shape"] == ["N", 3, 8, 8]
    assert told["metadata"]["model"]["name"] == "nin"
    assert [each["stage"] for each in told["metadata"]["history"]] == ["train", "quantize"]
    assert micronet("inspect", path).code == 0


def test_a_folder_tells_its_target_its_files_and_the_packed_network_in_it(micronet, tmp_path):
    files = {"model.packed": packed(4), "model.c": b"int x;"}
    write_folder(tmp_path / "out", Folder(files, {"target": "c", "sizes": {"flash": 7}}))
    told = micronet("inspect", tmp_path / "out", "--json").json
    assert (told["kind"], told["target"], told["sizes"]) == ("folder", "c", {"flash": 7})
    assert told["files"] == {name: len(content) for name, content in files.items()}
    assert told["layers"][0]["bits"] == 4
    assert "target    c" in micronet("inspect", tmp_path / "out").out
    (tmp_path / "out" / "model.c").write_text("changed")
    done = micronet("inspect", tmp_path / "out")
    assert done.code == 2 and "is not the file that was written" in done.err


@pytest.mark.parametrize(
    "said",
    [
        {"about": {"model": {"name": "nin"}, "stages": ["train"]}, "layers": {"a": "int8"}, "outputs": ["out0"]},
        {"metadata": {"model": {"name": "nin"}, "history": [{"stage": "train"}]}, "layers": [{"name": "a"}],
         "params": 7},
        {"metadata": {"model": "nin", "stages": ["train"]}, "layers": 3, "params": "x", "outputs": 5, "inputs": [[]],
         "operators": 1, "opsets": [], "file": 3, "kind": 1, "size_bytes": "x", "integer_layers": {}},
    ],
    ids=["ncnn", "openvino", "hostile"],
)  # fmt: skip
def test_a_folder_of_any_target_is_described(micronet, tmp_path, said):
    write_folder(tmp_path / "out", Folder({"network.bin": b"x"}, {"target": "ncnn", **said}))
    for command in ("inspect", "card"):
        done = micronet(command, tmp_path / "out")
        assert done.code == 0 and "nin" in done.out and "train" in done.out
    assert micronet("inspect", tmp_path / "out", "--json").json["note"]["layers"] == said["layers"]


HOSTILE = [
    {"history": "x"}, {"history": [{}]}, {"history": [{"stage": 3, "config": []}]}, {"model": {"name": 1}},
    {"model": [1]}, {"metrics": 3}, {"versions": []}, {"seed": {"a": 1}},
    {"data": {"name": "\x1b[2J\n", "classes": ["a"]}},
    {"data": {"inputs": [{"shape": "x"}]}}, {"data": {"mean": [1], "std": [0]}}, {"data": {"unknown": 1}}, [], 3,
]  # fmt: skip


@pytest.mark.parametrize("said", HOSTILE, ids=str)
def test_what_a_hostile_file_says_of_itself_is_shown_or_refused_in_one_line(micronet, chain, tmp_path, said):
    proto = onnx.load(chain / "float.onnx")
    helper.set_model_props(proto, {"micronet": json.dumps(said), "\x1b]0;title\x07": "\x1b[2J"})
    path = tmp_path / "a.onnx"
    onnx.save(proto, path)
    for words in ((), ("--json",)):
        done = micronet("inspect", path, *words)
        assert done.code in (0, 2) and "\x1b" not in done.out + done.err and done.err.count("\n") == (done.code == 2)


@pytest.mark.parametrize("kind", ["onnx", "packed"])
@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.99])
def test_a_truncated_file_is_one_line_and_exit_2(micronet, chain, tmp_path, kind, share):
    whole = (chain / "float.onnx").read_bytes() if kind == "onnx" else packed(4)
    path = tmp_path / f"a.{kind}"
    path.write_bytes(whole[: int(share * len(whole))])
    done = micronet("inspect", path)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)


def test_no_file_takes_torch_to_inspect_or_to_describe(chain, tmp_path):
    (tmp_path / "a.packed").write_bytes(packed(8))
    artifact, *others = (
        str(each) for each in (chain / "fused.safetensors", chain / "int8.onnx", tmp_path / "a.packed")
    )
    code = (
        "import sys; from micronet.cli.app import run; "
        f"assert run(['card', {artifact!r}]) == 0 and 'onnx' not in sys.modules; "
        f"assert [run(['inspect', each]) for each in {others}] == [0, 0]; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
