import json
import shlex
import subprocess
import sys

import pytest
import torch
from PIL import Image

from micronet import registry
from micronet.cli import console
from micronet.cli.app import run
from micronet.core.config import options
from micronet.evaluation.report import LATENCIES
from micronet.stages.stage import find, uses

IN_ORDER = ("train", "sparse-train", "prune", "finetune", "quantize", "bn-fuse", "export-onnx", "export", "check-onnx",
            "pack", "evaluate", "compare", "plot", "predict", "inspect", "verify", "import", "sensitivity", "card",
            "list", "init")  # fmt: skip


TRAINING = {"train", "sparse-train", "finetune", "quantize"}


def test_every_help_shows_an_example_and_every_example_runs(tmp_path, monkeypatch, capsys):
    """Trainings are cut short here; `pytest -m slow tests/cli/test_readme.py` runs whole ones."""
    monkeypatch.chdir(tmp_path)
    # A recipe of configs/ takes minutes: scripts/demo runs it. Engines: tests/deploy. Others have tests of their own.
    own = {"report", "compress", "doctor"} & set(registry.COMMANDS)
    assert {*IN_ORDER, "run", "schema", "trt-build", "trt-eval", *own} == set(registry.COMMANDS)
    Image.new("RGB", (40, 32)).save("photo.png")
    assert run(["run", "--help"]) == 0
    for name in IN_ORDER:
        command = registry.load_object(registry.COMMANDS[name].stage)
        assert run([name, "--help"]) == 0
        shown = capsys.readouterr().out
        assert command.example.split()[2] in shown
        short = ["--epochs", "1", "--limit", "160"] if name in TRAINING else []
        if name == "train":
            short += ["--width", "0.1"]  # the others take what it wrote
        assert run([*shlex.split(command.example)[1:], *short]) == 0, command.example


def test_help_shows_one_default_of_a_setting(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    assert run(["finetune", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "[default: 0.005]" in shown and "Default: 0.01" not in shown
    assert run(["train", "--help"]) == 0
    assert "Default: 0.01" in capsys.readouterr().out


@pytest.mark.parametrize("name", registry.COMMANDS)
def test_the_list_of_commands_says_what_their_help_does(name):
    stage = registry.load_object(registry.COMMANDS[name].stage)
    assert stage.name == name
    assert f"micronet {name}" in stage.example
    shown = [option for option in options(stage) if stage.is_basic(option) and not option.about["argument"]]
    assert len(shown) <= 10  # what a newcomer needs first


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("train --epoch 3", "unknown option --epoch (did you mean --epochs?); see micronet train --help"),
        ("train --epochs=x", "--epochs is 'x'; expected an integer; see micronet train --help"),
        ("train --lr x", "--lr is 'x'; expected a number; see micronet train --help"),
        ("train --preset slow", "unknown value for --preset: 'slow'; allowed: fast, plain; see micronet train --help"),
        ("train --epochs", "--epochs needs a value; see micronet train --help"),
        ("prune", "ARTIFACT is required; see micronet prune --help"),
        ("prune a b", "unexpected argument: b; see micronet prune --help"),
        ("--vers", "unknown option --vers (did you mean --version?); see micronet --help"),
    ],
)
def test_a_mistyped_command_line_gets_one_line(micronet, typed, message):
    done = micronet(*typed.split())
    assert (done.code, done.out, done.err) == (2, "", f"error: {message}\n")


def test_an_unknown_command_gets_the_list_of_commands(micronet):
    assert micronet("trian").err.startswith("error: unknown command 'trian'; allowed: train, ")
    assert micronet().code == 2


@pytest.mark.parametrize(
    ("typed", "expected"),
    [("micronet qu", {"quantize"}), ("micronet prune --sco", {"--scope"}), ("micronet train --optimizer s", {"sgd"})],
)
def test_shells_complete_commands_options_and_values(monkeypatch, capsys, typed, expected):
    monkeypatch.setenv("_MICRONET_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split()) - 1))
    monkeypatch.setattr("sys.argv", ["micronet"])
    assert run([]) == 0
    assert set(capsys.readouterr().out.split()) == expected


def test_compare_measures_everything(micronet, chain):
    names = ["float.onnx", "float.safetensors", "int8.safetensors", "fused.safetensors", "int8.onnx"]
    rows = micronet("compare", *(chain / name for name in names), "--json").json["rows"]
    assert [row["name"] for row in rows] == names
    assert len({row["macs"] for row in rows}) == 1
    for row, name in zip(rows, names, strict=True):
        assert row["size_bytes"] == (chain / name).stat().st_size
        assert 0 <= row["accuracy"] <= 1
        assert 0 < row["latency_ms"] <= row["latency_p95_ms"]
    assert rows[0]["params"] == rows[3]["params"] == rows[4]["params"]
    assert rows[0]["agreement"] == 1
    table = micronet("compare", chain / "float.onnx", "--markdown").out
    assert table.startswith("| name | runtime |")
    assert "ms (p95" in table


def test_figures_without_timing_are_the_others(micronet, chain):
    untimed = dict.fromkeys(LATENCIES)
    files = [chain / name for name in ("float.onnx", "int8.onnx")]
    timed, plain = (micronet("compare", *files, "--json", *more).json["rows"] for more in ([], ["--skip-timing"]))
    assert plain == [row | untimed for row in timed]
    assert micronet("evaluate", files[1], "--json", "--skip-timing").json.items() >= untimed.items()
    shown = [micronet(*words, "--skip-timing").out for words in (["compare", *files], ["evaluate", files[1]])]
    assert all(" ms" not in text and "64 images" not in text for text in shown)


def test_stages_that_time_share_one_option():
    timing = [name for name in registry.STAGES if uses(find(name), "skip_timing")]
    assert set(timing) >= {"compare", "evaluate", "export", "export-onnx", "pack", "prune", "quantize", "report"}


def test_inspect_tells_everything(micronet, chain):
    shown = micronet("inspect", chain / "fused.safetensors", "--json").json
    assert [record["stage"] for record in shown["history"]] == ["train", "quantize", "bn-fuse"]
    assert shown["data"]["name"] == "digits"
    assert shown["seed"] == 1
    assert "torch" in shown["versions"]
    assert any("weight 8-bit sym signed per channel" in layer["quantization"] for layer in shown["layers"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--model", "nim"], "allowed: nin"),
        (["train", "--data", "digit"], "allowed: digits"),
        (["train", "--epochs", "-1"], "--epochs"),
        (["train", "--lr", "nan"], "--lr"),
        (["train", "--device", "tpu"], "cuda"),
        (["train", "--width", "0"], "--width"),
        (["train", "--limit", "0"], "--limit"),
        (["train", "--model-args", "{"], "not valid JSON"),
        (["quantize", "missing.safetensors"], "does not exist"),
        (["quantize", "--w-bits", "1"], "--w-bits"),
        (["quantize", "INT8", "-o", "x.safetensors"], "quantize the float artifact again"),
        (["bn-fuse", "FUSED", "-o", "x.safetensors"], "export-onnx"),
        (["bn-fuse", "INT8", "-o", "INT8"], "--force"),
        (["evaluate", "INT8", "--data", "nowhere"], "unknown data set"),
        (["evaluate", "README.md"], ".onnx"),
        (["evaluate", "broken.onnx"], "not a complete ONNX"),
        (["import", "--model", "torchvision:resnet"], "allowed: resnet"),
        (["train", "--resume", "-o", "INT8"], "nothing to resume"),
        (["import", "--weights", "none.pth"], "does not exist"),
        (["import", "--mean", "1,2"], "used together"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_users_mistakes_are_one_line_and_exit_2(micronet, chain, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.onnx").write_bytes(b"\x08\x0agarbage")
    (tmp_path / "README.md").write_text("x")
    before = sorted(tmp_path.iterdir())
    places = {"INT8": chain / "int8.safetensors", "FUSED": chain / "fused.safetensors"}
    done = micronet(*(places.get(argument, argument) for argument in arguments))
    assert done.code == 2
    assert message in done.err
    assert done.err.strip().count("\n") == 0
    assert done.out == ""
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("arguments", [["train", "--optimizer", "adm"], ["train", "--colour"], ["nonsense"]])
def test_wrong_options_exit_2(micronet, arguments):
    assert micronet(*arguments).code == 2


def original_checkpoint(path, prefix):
    """Write what the original micronet would: other names, the same layers in the same order."""
    from micronet.models.build import ModelSpec, build_model

    model = build_model(ModelSpec("nin", {"widths": [16, 12, 8, 16, 16, 16, 16, 16]}))
    state, block = {}, 0
    for name, tensor in model.state_dict().items():
        if name.endswith("conv.weight"):
            block += 1
        part = "bn" if ".bn." in name else "tnn_bin_conv"
        state[f"{prefix}tnn_bin_model.{block}.{part}.{name.rpartition('.')[2]}"] = tensor
    torch.save({"cfg": [16, 12, 8, 16, 16, 16, 16, 16], "best_acc": 90.0, "state_dict": state}, path)
    return model


@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_originals_checkpoints_come_in(micronet, tmp_path, prefix):
    from micronet.artifact.artifact import load

    model = original_checkpoint(tmp_path / "nin_prune.pth", prefix)
    done = micronet(
        "import", "--model", "nin", "--weights", tmp_path / "nin_prune.pth", "-o", tmp_path / "a.safetensors"
    )
    assert done.code == 0, done.err
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(load(tmp_path / "a.safetensors").model.eval()(images), model.eval()(images))


def test_a_file_cannot_say_what_code_to_run(micronet, chain, tmp_path):
    from dataclasses import replace

    from micronet.artifact.artifact import load, save

    artifact = load(chain / "float.safetensors")
    evil = tmp_path / "evil.safetensors"
    save(replace(artifact, data={**artifact.data, "name": "webbrowser:main"}), evil)
    done = micronet("evaluate", evil)
    assert done.code == 2
    assert "--data webbrowser:main" in done.err


def test_a_pickle_with_code_is_refused_and_not_run(micronet, tmp_path):
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
    done = micronet("import", "--weights", tmp_path / "evil.pth", "-o", tmp_path / "a.safetensors")
    assert done.code == 2
    assert "holds an object of the class io.open in the place of weights" in done.err
    assert not marker.exists()


MINE = """
from torch import nn
class Net(nn.Module):
    def __init__(self, classes=2):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.fc = nn.Linear(8, classes)
    def forward(self, x):
        return self.fc(nn.functional.relu(self.conv(x)).mean((2, 3)))
"""


@pytest.mark.parametrize("kind", ["torchvision", "file"])
def test_foreign_networks_go_the_whole_way(micronet, tmp_path, monkeypatch, kind):
    from tests.data.test_data import make_folder

    monkeypatch.chdir(tmp_path)
    folder = make_folder(tmp_path / "images", sizes=((40, 40),), count=8)
    (tmp_path / "mine.py").write_text(MINE)
    network = ["--model", "mine.py:Net"] if kind == "file" else ["--model", "torchvision:mobilenet_v2"]
    small = '{"num_classes": 2, "inverted_residual_setting": [[1, 16, 1, 1], [6, 24, 1, 2]]}'
    args = [] if kind == "file" else ["--model-args", small]
    code = network if kind == "file" else []
    steps = (
        ["import", *network, *args, "-o", "r.safetensors"],
        ["quantize", "r.safetensors", *code, "--data", folder, "--epochs", "1", "-o", "q.safetensors"],
        ["evaluate", "q.safetensors", *code],
        ["export-onnx", "q.safetensors", *code, "-o", "q.onnx"],
        ["evaluate", "q.onnx"],
    )
    for step in steps:
        done = micronet(*step)
        assert done.code == 0, (step, done.err)
    assert "--data" in micronet("evaluate", "r.safetensors", *code).err  # which it has from its quantized child alone
    rows = micronet("compare", "r.safetensors", "q.safetensors", *code, "--json").json["rows"]
    assert [row["images"] for row in rows] == [16, 16]
    if kind == "file":
        assert "--trust-code" in micronet("evaluate", "q.safetensors").err
        done = micronet("verify", "q.safetensors")  # what needs no code is checked and shown
        assert (done.code, "was not built, because custom code" in done.err) == (2, True)
        assert "tensors match" in done.out and "-> quantize" in done.out
        assert micronet("verify", "q.safetensors", "--trust-code").code == 0
        assert micronet("evaluate", "q.safetensors", "--trust-code").code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export-onnx", "ONNX"], "is an ONNX file; expected an artifact (.safetensors)"),
        (["trt-build", "x.engine"], "is a TensorRT engine; expected an artifact (.safetensors) or an ONNX file"),
        (["check-onnx", "FLOAT"], "is an artifact; expected an ONNX file (.onnx); convert it with micronet export-"),
        (["evaluate", "x.pth"], "micronet import --model NAME --weights"),
        (["quantize", "folder", "--mode", "ptq"], "folder is a folder"),
        (["trt-eval", "ONNX"], "expected a TensorRT engine (.engine); use it with micronet evaluate"),
        *((command.split(), "--runtime openvino only applies to .onnx files; drop it") for command in (
            "evaluate FLOAT --runtime openvino", "compare FLOAT x.engine --runtime openvino",
            "predict FLOAT x.png --runtime openvino", "trt-eval x.engine --runtime openvino",
        )),
        *((f"{command} --runtime onnxruntime,openvino".split(), "only compare takes several") for command in (
            "evaluate ONNX", "predict ONNX x.png", "trt-eval x.engine --onnx ONNX",
        )),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_a_file_of_another_kind_is_told_what_it_is_and_what_takes_it(
    micronet, chain, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    for name in ("x.engine", "x.pth"):
        (tmp_path / name).touch()
    (tmp_path / "folder").mkdir()
    places = {"ONNX": chain / "float.onnx", "FLOAT": chain / "float.safetensors"}
    done = micronet(*(places.get(argument, argument) for argument in arguments))
    assert done.code == 2
    assert message in done.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["quantize", "FLOAT", "--mode", "ptq", "--calib-cache", "no/a.cache", "-o", "q.safetensors"],
        ["trt-build", "FLOAT", "--precision", "int8", "--calib-cache", "no/a.cache", "-o", "i.engine"],
        ["trt-build", "FLOAT", "--timing-cache", "no/a.cache", "-o", "f.engine"],
        ["sensitivity", "FLOAT", "--plot", "no/a.png"],
        ["prune", "FLOAT", "--sensitivity", "--plot", "no/a.png"],
    ],
    ids=" ".join,
)
def test_a_missing_folder_is_told_before_the_work(micronet, chain, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("micronet.artifact.artifact.load", None)  # nothing is opened, let alone calibrated
    done = micronet(*(chain / "float.safetensors" if argument == "FLOAT" else argument for argument in arguments))
    assert done.code == 2
    assert "mkdir -p" in done.err


def test_json_holds_null_where_a_number_is_none(capsys):
    console.print_json({"loss": float("nan"), "rows": [(1.5, float("inf"))]})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {"loss": None, "rows": [[1.5, None]]}


def test_python_runs_the_package_as_the_command():
    done = subprocess.run([sys.executable, "-m", "micronet", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("micronet ")
