"""Every command of the READMEs: its names and options exist, and (slow) it runs, as written, one after the other."""

import re
import shlex
import shutil
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import typer.main
from PIL import Image

from micronet.cli.app import app, run
from micronet.cli.old_spellings import modern
from tests.data.test_data import make_folder

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "README.zh-CN.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))
# Pages whose commands run one after the other, each reading what earlier ones wrote.
CHAIN = ("README.md", *(f"docs/{name}.md" for name in (
    "pruning", "quantization", "packed", "export", "training", "recipes", "compare", "ci", "compress",
)))  # fmt: skip
NET = """from torch import nn
def Net():
    return nn.Sequential(nn.Conv1d(2, 8, 5), nn.ReLU(), nn.Conv1d(8, 3, 1))
"""
TRAINS = {"train", "sparse-train", "finetune", "quantize"}


def commands(name):
    """Return the arguments of every micronet command in a README's shell blocks, comments left out."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("micronet ")]
    return [shlex.split(line, comments=True)[1:] for line in lines]


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


@pytest.mark.slow
def test_t43_every_readme_command_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    make_folder(tmp_path / "path/to/images", sizes=((64, 64),), count=8)
    Image.new("RGB", (40, 32)).save("photo.jpg")
    Path("net.py").write_text(NET, encoding="utf-8")
    np.savez("inputs.npz", x=np.random.default_rng(0).standard_normal((16, 2, 32)))
    with monkeypatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        torch.save(import_module("net").Net().state_dict(), "net.pth")
    assert run(["import", "--model", "nin", "--model-args", '{"num_classes": 10}', "--data", "digits", "-q", "-o",
                "net.safetensors"]) == 0  # fmt: skip
    for number, arguments in enumerate(each for page in CHAIN for each in commands(page)):
        if "cifar10" in arguments or arguments[:2] in (["run", "digits"], ["run", "configs/digits.toml"]):
            continue  # scripts/demo runs the digits recipe; CIFAR-10 is no part of the repository
        if arguments[0] in TRAINS and "ptq" not in arguments:
            arguments = [*arguments, "--epochs", "1"]
        for promise in {"--max-drop", "--target-drop"}.intersection(arguments):
            arguments = [*arguments, promise, "100"]  # an epoch teaches too little for a promise of one point
        if arguments[0] in {"train", "quantize"} and "-o" not in arguments:
            arguments = [*arguments, "-o", f"{number}.safetensors"]
        assert run([*arguments, "--force"] if arguments[0] in TRAINS else arguments) == 0, (
            arguments, capsys.readouterr().err
        )  # fmt: skip
