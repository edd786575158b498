"""Every command of the READMEs: its names and options exist, and (slow) it runs, as written, one after the other."""

import re
import shlex
import shutil
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import typer.main
from PIL import Image

import micronet
from micronet import registry
from micronet.cli.app import app, run
from micronet.cli.old_spellings import modern
from micronet.stages.stage import uses
from tests.data.test_data import make_folder

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "README.zh-CN.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))
# Pages whose commands run one after the other, each reading what earlier ones wrote.
CHAIN = ("README.md", *(f"docs/{name}.md" for name in (
    "pruning", "quantization", "packed", "export", "c", "ncnn", "training", "recipes", "compare", "ci", "compress",
)))  # fmt: skip
NET = """from torch import nn
def Net():
    return nn.Sequential(nn.Conv1d(2, 8, 5), nn.ReLU(), nn.Conv1d(8, 3, 1))
def UNet():
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1))
"""
TRAINS = {"train", "sparse-train", "finetune", "quantize"}


def commands(name):
    """Return the arguments of every micronet command in a page's shell blocks, comments and outputs left out."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)
    lines = [line.removeprefix("$ ") for block in blocks for line in block.replace("\\\n", "").splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("micronet ")]


@pytest.mark.parametrize(
    "arguments",
    [pytest.param(found, id=" ".join(found)) for name in PAGES for found in commands(name)],
)
def test_t43_every_readme_command_has_the_options_it_uses(arguments):
    name, *rest = modern(arguments)
    command = typer.main.get_command(app).commands[name]
    with command.make_context(name, rest) as context:  # raises where an option is unknown or a value impossible
        assert context.params


def test_the_translation_has_the_same_commands_and_figures():
    names = ("README.md", "README.zh-CN.md")
    assert commands(names[0]) == commands(names[1])
    assert len(commands("README.md")) > 15
    english, chinese = (_figures(name) for name in names)
    assert english == chinese


def _figures(name):
    """Return the numbers of every table row in a README."""
    rows = re.findall(r"^\| \w.*\|$", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)
    return [re.findall(r"\d[\d.,]*\d%?|\d%?", row) for row in rows]


def test_the_translation_has_the_same_structure():
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md"))
    for pattern in (r"^(#+) ", r"^```(\w*)$", r"\]\(([^)]*)\)"):  # headings by level, code blocks, links
        found = [re.findall(pattern, text, re.MULTILINE) for text in (english, chinese)]
        assert found[0][1:] == found[1][1:] if "]" in pattern else found[0] == found[1]
    assert len(english.splitlines()) < 150


@pytest.mark.slow
def test_the_example_of_data_in_memory_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(encoding="utf-8"), re.DOTALL)
    [example] = [block for block in blocks if "torch.randint(" in block]
    exec(example, {})
    assert len(capsys.readouterr().out.splitlines()) == 2


PTQ = ["quantize", "float.safetensors", "--mode", "ptq"]
# Files that pages name without making them -> the commands that do.
GIVEN = {
    "float.onnx": [["export-onnx", "float.safetensors"]],
    "w4a8.safetensors": [[*PTQ, "--w-bits", "4"]],
    "signed.safetensors": [[*PTQ, "--q-type", "sym", "--a-sign", "signed"]],
    "model.onnx": [
        ["train", "--width", "0.1", "--data", "path/to/images", "--image-size", "64", "--epochs", "1"],
        ["export-onnx", "model.safetensors"],
    ],
    "det.onnx": [["export-onnx", "float.safetensors", "--dynamic", "batch,height,width"]],
    "any.onnx": [["export-onnx", "own.safetensors", "--model", "net.py:Net"]],
}
# What a machine, or an epoch, cannot promise -> what every one can.
LAX = {
    "--max-drop": "100", "--target-drop": "100", "--max-latency": "100000", "--min-agreement": "2", "--budget": "1m",
}  # fmt: skip
NEED = ("cifar10", "trt-eval", "configs/digits.toml")  # a data set, a GPU; scripts/demo runs the recipe


@pytest.mark.slow
def test_t43_every_command_of_the_pages_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    make_folder(tmp_path / "path/to/images", sizes=((64, 64),), count=8)
    shutil.copytree(next((tmp_path / "path/to/images/train").iterdir()), tmp_path / "photos")
    Image.new("RGB", (40, 32)).save("photo.jpg")
    make_own_network(tmp_path, monkeypatch)
    new = [
        "import",
        "--model",
        "nin",
        "--model-args",
        '{"num_classes": 10}',
        "--data",
        "digits",
        "-o",
        "net.safetensors",
    ]
    assert run(new) == 0
    for number, arguments in enumerate(each for page in CHAIN for each in commands(page)):
        if set(NEED).intersection(arguments) or arguments[:2] == ["run", "digits"]:
            continue
        for name in GIVEN.keys() & set(arguments):
            make_given(name)
        if arguments[0] == "report":
            shutil.copytree(
                tmp_path, arguments[1], ignore=lambda _, names: {*names} - {"float.safetensors", "int8.onnx"}
            )
        words = able(arguments, number)
        assert run(words) == 0, (words, capsys.readouterr().err)


def make_own_network(folder, monkeypatch):
    """Write net.py, its weights and inputs into the working directory."""
    Path("net.py").write_text(NET, encoding="utf-8")
    np.savez("inputs.npz", x=np.random.default_rng(0).standard_normal((16, 2, 32)))
    with monkeypatch.context() as patch:
        patch.syspath_prepend(folder)
        torch.save(import_module("net").Net().state_dict(), "net.pth")


def python_blocks(name):
    """Return the Python of a page, block by block."""
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)


def run_all(lines, capsys):
    for number, arguments in enumerate(lines):
        words = able(arguments, number)
        assert run(words) == 0, (words, capsys.readouterr().err)


@pytest.mark.slow
@pytest.mark.parametrize("needs", [(), ("torchmetrics", "pycocotools")], ids=["segmentation-and-agreement", "detector"])
def test_every_command_for_tasks_runs(tmp_path, monkeypatch, capsys, needs):
    for package in needs:
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    make_own_network(tmp_path, monkeypatch)
    for part, kind in product(("train", "test"), ("images", "masks")):
        Path("shapes", part, kind).mkdir(parents=True)
        for index in range(8):
            Image.new("RGB" if kind == "images" else "L", (48, 40), 1).save(f"shapes/{part}/{kind}/{index}.png")
    for block in python_blocks("docs/tasks.md"):
        if "Draw a tiny" in block and needs:
            exec(block, {})
        elif "class Detector" in block:
            Path("det.py").write_text(block, encoding="utf-8")
    run_all([each for each in commands("docs/tasks.md") if bool(needs) == ("det.py:Detector" in each)], capsys)


@pytest.mark.slow
def test_every_command_for_networks_of_other_packages_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("timm")
    pytest.importorskip("ultralytics")
    monkeypatch.chdir(tmp_path)
    saves, builds = python_blocks("docs/networks.md")
    exec(saves, {})
    Path("yolo.py").write_text(builds, encoding="utf-8")
    np.savez("photos.npz", images=np.random.default_rng(0).random((16, 3, 128, 128), np.float32))
    with monkeypatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        torch.save(import_module("yolo").Net().state_dict(), "yolov8n.pth")
    run_all(commands("docs/networks.md"), capsys)


@pytest.mark.slow
def test_every_command_for_those_who_come_from_2021_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("models_save").mkdir()
    for model, file in (("nin", "nin.pth"), ("nin_gc", "nin_gc_sparse.pth")):
        trained = micronet.train(model=model, data="digits", epochs=0, limit=160)
        torch.save(trained.model.state_dict(), f"models_save/{file}")
    run_all([[word.replace("cifar10", "digits") for word in line] for line in commands("docs/migrating.md")], capsys)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="needs tensorrt-rtx")
def test_every_command_for_tensorrt_runs_where_there_is_no_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "path/to/images", sizes=((64, 64),), count=8)
    make_given("model.onnx")
    run_all([line for line in commands("docs/deployment.md") if line[0] != "trt-eval"], capsys)


def able(arguments, number):
    """Return a command line that takes seconds, overwrites what earlier ones wrote, and promises little."""
    more = ["--epochs", "1"] * (arguments[0] in TRAINS and "ptq" not in arguments)
    full_width = arguments[0] in TRAINS and arguments[1].startswith("--") and "--width" not in arguments  # no artifact
    more += ["--limit", "160"] * full_width
    more += ["--no-training"] * (arguments[0] == "compress")
    more += [word for option, value in LAX.items() if option in arguments for word in (option, value)]
    if arguments[0] in {"train", "quantize"} and "-o" not in arguments:
        more += ["-o", f"{number}{Path(arguments[1]).suffix or '.safetensors'}"]
    can_overwrite = uses(registry.load_object(registry.COMMANDS[arguments[0]].stage), "force")
    return [*arguments, *more, *["--force"] * can_overwrite]


def make_given(name):
    """Make a file that a page names, unless it is there."""
    for words in [] if Path(name).exists() else GIVEN[name]:
        suffix = ".safetensors" if words[0] == "train" else Path(name).suffix
        assert run([*words, "-q", "-o", Path(name).with_suffix(suffix).name]) == 0, words
