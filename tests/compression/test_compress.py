"""A search: its recipe makes the same bytes, a killed one ends with the same files, an error is one line."""

import json
import random
import tomllib
from pathlib import Path

import numpy as np
import pytest
from onnx import helper, numpy_helper

import micronet as api
from micronet.artifact.header import read_header
from micronet.cli.compress_view import show_search
from micronet.compression import bits, compressing, narrowing, rounds, workshop
from micronet.core.files import files_in
from micronet.errors import MicronetError
from micronet.quantization import adaround
from micronet.recipe.plan import plan
from micronet.recipe.reader import read_recipe
from micronet.runtimes import openvino
from micronet.stages.stage import Outcome, find


@pytest.fixture(autouse=True)
def _few_candidates(monkeypatch):
    monkeypatch.setattr(narrowing, "POINTS", (0.6,))
    monkeypatch.setattr(narrowing, "UNIFORM", (0.5,))
    monkeypatch.setattr(compressing, "SHARES", ())
    monkeypatch.setattr(rounds, "MOST_EPOCHS", (1,))
    monkeypatch.setattr(rounds, "MOST_SAMPLES", (0,))
    monkeypatch.setattr(workshop, "SECONDS", 0.0)


SIZE = ["--target-size", "0.2", "--max-drop", "100", "--skip-timing"]
FILES = ("network.safetensors", "network.onnx", "recipe.toml")


def contents(folder):
    """Return the bytes of a folder's results, and the figures of its candidates without what was timed."""
    found = json.loads((folder / "front.json").read_text())
    for each in found["candidates"]:
        del each["minutes"]
    return [found, *((folder / name).read_bytes().replace(bytes(folder), b"") for name in FILES)]


@pytest.fixture
def original(shared, micronet):
    """The file of a tiny network, whose export takes half a second."""

    def fill(folder: Path) -> None:
        words = ["--model", "lenet_bn", "--limit", "160", "--epochs", "1", "-o", folder / "float.safetensors"]
        assert micronet("train", *words).code == 0

    return shared("tiny", fill) / "float.safetensors"


@pytest.fixture
def small(shared, original, micronet):
    """A folder with a finished search."""

    def fill(folder: Path) -> None:
        done = micronet("compress", original, *SIZE, "-o", folder / "out")
        assert done.code == 0, done.err
        (folder / "printed.txt").write_text(done.out)

    return shared("compressed", fill) / "out"


def test_the_recipe_makes_the_chosen_network_and_its_file_again(micronet, small, tmp_path):
    stages = tomllib.loads((small / "recipe.toml").read_text())["stage"]
    assert [each["command"] for each in stages] == ["prune", "finetune", "quantize", "bn-fuse", "export-onnx"]
    assert micronet("run", small / "recipe.toml", "-o", tmp_path / "again").code == 0
    for name in FILES[:2]:
        assert (tmp_path / "again" / name).read_bytes() == (small / name).read_bytes()


def test_the_front_has_the_single_stages_too(small):
    found = json.loads((small / "front.json").read_text())
    names = [each["name"] for each in found["candidates"]]
    assert names[:2] == ["float", "int8"]
    assert "50% of every layer, 1 epoch" in names
    [chosen] = [each for each in found["candidates"] if each["name"] == found["chosen"]]
    whole = found["candidates"][0]
    assert chosen["size_bytes"] <= 0.2 * whole["size_bytes"]
    assert chosen["size_bytes"] == (small / "network.onnx").stat().st_size
    printed = (small.parent / "printed.txt").read_text()
    assert f"chosen: {found['chosen']}" in printed
    assert "front.json" in printed


def test_the_next_stage_of_a_recipe_takes_what_compress_leaves(original, tmp_path):
    recipe = tmp_path / "r.toml"
    stages = [f'command = "compress"\nartifact = "{original}"\noutput = "small"', 'command = "evaluate"']
    recipe.write_text(f'folder = "{tmp_path}/out"\n' + "".join(f"[[stage]]\n{each}\n" for each in stages))
    compress, evaluate, compare = plan(read_recipe(recipe))
    assert compress.values["output"] == tmp_path / "out" / "small"
    assert evaluate.inputs == compare.inputs == [tmp_path / "out" / "small" / "network.safetensors"]


def test_compress_keeps_the_contracts_of_a_recipe(tmp_path):
    train = 'command = "train"\nname = "float"\nmodel = "lenet_bn"'
    small = 'command = "compress"\noutput = "small"'
    twice = f'{small}\nname = "{{}}"\nartifact = "{{}}"'
    for stages, message in (
        ([train, twice.format("a", "float"), twice.format("b", "float")], "also the output of another stage"),
        ([train, twice.format("a", "float"), twice.format("b", "net.onnx")], "also the output of another stage"),
        ([train, small, 'command = "export"\ntarget = "c"\noutput = "small"'], "also the output of another stage"),
        ([train, 'command = "compress"\noutput = "no/where"'], "create it with mkdir -p"),
        ([train, small, 'command = "quantize"'], "quantize cannot follow quantize.* what compress chose"),
        ([train, small, 'command = "finetune"'], "finetune cannot follow bn-fuse"),
    ):
        with pytest.raises(MicronetError, match=message):
            _plan(tmp_path, *stages)
    onward = [f'command = "{name}"\nartifact = "compress"' for name in ("pack", "export-onnx")]
    assert len(_plan(tmp_path, train, small, *onward)) == 5  # with the comparison
    file = _plan(tmp_path, train, 'command = "compress"\nname = "own"\nartifact = "net.onnx"')[1]
    assert file.values["output"] == tmp_path / "out" / "own" and file.output is None


def test_a_users_task_is_named_once_in_a_recipe(tmp_path):
    train, other = (f'command = "train"\nname = "{name}"\nmodel = "lenet_bn"\n' for name in ("float", "other"))
    onward = ["prune", "quantize", "bn-fuse", "export-onnx", "evaluate", "compress"]
    stages = [f'command = "{name}"' for name in onward]
    stages[-1] += '\nartifact = "float"\noutput = "small"'
    own = [each.values.get("task") for each in _plan(tmp_path, f'{train}task = "task.py:Own"', *stages)]
    assert own == ["task.py:Own"] * 3 + [None] + ["task.py:Own"] * 4  # bn-fuse has no task; the last is the comparison
    given = _plan(
        tmp_path, f'{train}task = "task.py:Own"', 'command = "evaluate"\ntask = "agreement"', other, stages[0]
    )
    assert [each.values.get("task") for each in given[1:4]] == ["agreement", None, None]
    named = _plan(tmp_path, f'{train}task = "segmentation"', stages[0])  # which the file records and may choose
    assert named[1].values.get("task") is None


def _plan(tmp_path, *stages):
    path = tmp_path / "r.toml"
    (tmp_path / "net.onnx").touch()
    text = "".join(f"[[stage]]\n{each}\n" for each in stages).replace("net.onnx", f"{tmp_path}/net.onnx")
    path.write_text(f'folder = "{tmp_path}/out"\n{text}')
    return plan(read_recipe(path))


def test_what_the_budget_left_out_is_said_in_a_line(small, capsys):
    """During the search each was said, and front.json keeps them all."""
    found = json.loads((small / "front.json").read_text())
    about = {"chosen": found["candidates"][0], "noun": "image", "tested_on": "", "output": "out", "names": []}
    for number, said in ((1, "no time for 0;"), (2, "no time for some candidates, which front.json names")):
        left_out = [f"no time for {each}; a larger --budget would give it" for each in range(number)]
        show_search({**found, **about, "words": ["chosen: x", *left_out], "left_out": left_out})
        lines = capsys.readouterr().out.splitlines()
        [line] = [line for line in lines if "no time" in line]
        assert line.startswith(said) and "chosen: x" in lines


def test_candidates_leave_the_test_data_alone(small):
    header, _ = read_header(small / "network.safetensors")
    assert [record.stage for record in header.history][-2:] == ["quantize", "bn-fuse"]
    assert not any(name.startswith("test") for name in header.metrics)


def test_a_full_disk_is_not_a_candidate_that_cannot_be_made(micronet, original, tmp_path, monkeypatch):
    made = workshop.Workshop._make

    def make(self, plan):
        if plan.widths:
            raise api.FailedError("x could not be written") from OSError("no space left on device")
        made(self, plan)

    monkeypatch.setattr(workshop.Workshop, "_make", make)
    done = micronet("compress", original, *SIZE, "--no-training", "-o", tmp_path / "out")
    assert done.code == 1
    assert done.err.splitlines()[-1] == "error: x could not be written"


class Killed(BaseException):
    """The process ends here."""


def test_a_search_that_was_killed_ends_with_the_same_files(micronet, original, small, tmp_path, monkeypatch):
    execute, left = workshop.execute, [*random.Random(5).choices(range(1, 5), k=2), 1]

    def killed(stage, *given):
        left[-1] -= 1
        if left[-1] == 0:
            left.pop()
            raise Killed
        return execute(stage, *given)

    kills = 0
    while True:
        monkeypatch.setattr(workshop, "execute", killed if left else execute)
        try:
            done = micronet("compress", original, *SIZE, "-o", tmp_path / "out")
        except Killed:
            kills += 1
            continue
        break
    assert done.code == 0, done.err
    assert kills == 3
    assert contents(tmp_path / "out") == contents(small)


def test_a_finished_search_makes_nothing_again(micronet, original, small, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in files_in(small / workshop.CANDIDATES)}
    monkeypatch.setattr(workshop, "execute", None)
    assert micronet("compress", original, *SIZE, "-o", small).code == 0
    assert {path: path.stat().st_mtime_ns for path in files_in(small / workshop.CANDIDATES)} == before


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--target-size", "0.5", "--minimize", "latency"], 2, "--target-size and --minimize both say what to reach"),
        (["--budget", "soon"], 2, "--budget is 'soon'; expected a time, for example 90s, 30m or 2h"),
        (["--runtime", "onnxruntim"], 2, "unknown runtime 'onnxruntim'"),
        (["--skip-timing"], 2, "--skip-timing measures no latency"),
        ([*SIZE, "--metric", "precision"], 2, "unknown metric 'precision'; allowed: accuracy"),
        ([*SIZE, "--budget", "0.1s"], 2, "--budget 0.1s is too short"),
    ],
    ids=lambda case: case[-1] if isinstance(case, list) else "",
)
def test_a_wrong_setting_gets_one_line(micronet, original, tmp_path, words, code, message):
    done = micronet("compress", original, *words, "-o", tmp_path / "out")
    assert done.code == code, done.err
    assert message in done.err.splitlines()[-1]


def test_a_target_out_of_reach_is_a_failure():
    stage = find("compress").configure({"artifact": Path("a.safetensors"), "target_size": 0.01})
    with pytest.raises(api.FailedError, match="is not met"):
        stage.judge(Outcome(None, {"miss": "--target-size 0.01 is not met"}))
    stage.judge(Outcome(None, {"miss": ""}))


def test_a_dry_run_writes_nothing(micronet, original, tmp_path):
    words = ["--target-size", "0.2", "--threads", "1024", "--limit", "160", "--dry-run", "-o", tmp_path / "out"]
    done = micronet("compress", original, *words)
    assert done.code == 0, done.err
    assert "narrower" in done.out
    assert "--threads 1024 is more than" in done.err
    assert "validation images is 6.2 points, so a drop of 1 cannot be measured" in done.out
    assert not (tmp_path / "out").exists()


def test_a_network_of_any_inputs_is_compressed_without_labels(tmp_path, monkeypatch):
    """Agreement with the original, float inputs, from Python, with the original in memory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(
        "from torch.nn import Linear, ReLU, Sequential\n\n"
        "def net():\n    return Sequential(Linear(64, 96), ReLU(), Linear(96, 64))\n"
    )
    np.savez("x.npz", x=np.random.default_rng(0).standard_normal((64, 64), dtype=np.float32))
    network = api.import_model(model="net.py:net", data="x.npz", task="agreement")
    monkeypatch.setattr(compressing, "SHARES", bits.SHARES)
    monkeypatch.setattr(adaround, "STEPS", 10)
    small = api.compress(network, target_size=1.0, skip_timing=True, no_training=True, max_drop=100.0, output="out")
    assert small.history[0].stage == "import"
    found = json.loads(Path("out/front.json").read_text())
    assert found["words"][0] == "the original meets the target already"
    names = [each["name"] for each in found["candidates"]]
    assert names[:4] == ["float", "int8", "4 bits in 2 of 2 layers", "4 bits in 1 of 2 layers"]
    assert names[4:6] == [f"{name}, learned rounding" for name in names[2:4]]
    assert found["candidates"][2]["drop"] != found["candidates"][4]["drop"]
    sizes = [each["size_bytes"] for each in found["candidates"][:4]]
    assert sizes[2] < sizes[3] < sizes[1]
    assert not any(each["failed"] for each in found["candidates"])


@pytest.fixture
def file(tmp_path, monkeypatch):
    """An ONNX file with two convolutions, and inputs for it beside."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    first, second = (random.standard_normal(shape, np.float32) for shape in ((64, 3, 3, 3), (4, 64, 3, 3)))
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "first"], ["a"], "first", pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["a"], ["b"], "relu"),
            helper.make_node("Conv", ["b", "second"], ["y"], "second", pads=[1, 1, 1, 1]),
        ],
        "net", *([helper.make_tensor_value_info(name, 1, ["n", size, 8, 8])] for name, size in (("x", 3), ("y", 4))),
        [numpy_helper.from_array(first, "first"), numpy_helper.from_array(second, "second")],
    )  # fmt: skip
    opset = [helper.make_opsetid("", 21)]
    Path("net.onnx").write_bytes(helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString())
    np.savez("x.npz", x=random.standard_normal((32, 3, 8, 8), np.float32))
    return "net.onnx"


def test_of_an_onnx_file_only_the_bits_are_chosen(micronet, file):
    words = ["--data", "x.npz", "--minimize", "size", "--skip-timing", "-o", "out"]
    done = micronet("compress", file, *words, "--max-drop", "100")
    assert done.code == 0, done.err
    assert "cannot be trained or pruned" in done.err
    found = json.loads(Path("out/front.json").read_text())
    assert [each["name"] for each in found["candidates"]] == ["float", "int8"]
    assert found["chosen"] == "int8"
    assert micronet("run", "out/recipe.toml", "-o", "again").code == 0
    assert Path("again/network.onnx").read_bytes() == Path("out/network.onnx").read_bytes()


@pytest.mark.parametrize("vnni", [True, False])
def test_weights_have_7_bits_where_openvino_would_saturate(micronet, file, vnni, monkeypatch):
    pytest.importorskip("openvino")
    for module in (openvino, bits):
        monkeypatch.setattr(module, "has_vnni", lambda: vnni)
    words = ["--runtime", "openvino", "--data", "x.npz", "--skip-timing", "--minimize", "size", "--max-drop", "0"]
    done = micronet("compress", file, *words, "-o", "out", "--json")
    assert done.code == 0, done.err
    found = {each["name"]: each["plan"].get("bits") for each in done.json["candidates"]}
    seven = {} if vnni else {"int8, weights of 7 bits": 7, "int8, weights of 7 bits, 1 sensitive float": 7}
    assert found == {"float": None, "int8": 8, **(seven or {"int8, 1 sensitive float": 8})}
    assert not any(each["failed"] for each in done.json["candidates"])


def test_sensitive_layers_of_an_onnx_file_stay_float(micronet, file):
    words = ["--data", "x.npz", "--minimize", "size", "--skip-timing", "-o", "out", "--max-drop", "0"]
    done = micronet("compress", file, *words, "--json")
    assert done.code == 0, done.err
    assert [each["name"] for each in done.json["candidates"]] == ["float", "int8", "int8, 1 sensitive float"]
    assert done.json["chosen"]["name"] == "float"  # the others lose something
    [name] = done.json["candidates"][2]["plan"]["floats"]
    done = micronet("quantize", file, "--mode", "ptq", "--calib-data", "x.npz", "--exclude", name, "-o", "int8.onnx")
    assert done.code == 0, done.err
    assert f"float: {name}: excluded" in done.out
