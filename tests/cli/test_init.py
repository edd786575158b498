"""``init``: every combination of answers gives a recipe that ``run`` takes; until then, nothing is written."""

import fcntl
import io
import os
import pty
import shutil
import signal
import subprocess
import sys
import termios
from itertools import product
from pathlib import Path
from typing import get_args

import pytest

from micronet import registry
from micronet.recipe.compose import BINARY_DROP, CAREFUL_DROP, Goal
from micronet.recipe.init import DEFAULTS, QUESTIONS, Init
from micronet.recipe.plan import plan
from micronet.recipe.reader import parse_recipe

NET = "from torch import nn\ndef Net():\n    return nn.Sequential(nn.Conv2d(3, 8, 3))\n"


@pytest.fixture
def place(chain, tmp_path, monkeypatch):
    """A folder with a network of each kind, and data."""
    for name in ("float.safetensors", "float.onnx", "int8.safetensors"):
        shutil.copy(chain / name, tmp_path / name)
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "images" / "train").mkdir(parents=True)
    (tmp_path / "a 'b' \\ é.npz").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("model", ["nin", "torchvision:resnet18", "net.py:Net", "float.safetensors", "float.onnx"])
def test_every_combination_of_answers_gives_a_recipe_that_run_takes(place, model):
    suffix = Path(model).suffix
    goals = [goal for goal in get_args(Goal) if suffix != ".onnx" or goal != "low-bit"]
    runtimes = registry.ONNX_RUNTIMES if suffix == ".onnx" else registry.TARGETS
    drops = (0.0, CAREFUL_DROP, BINARY_DROP)
    texts = set()
    data = (None, "digits") if suffix else ("cifar10", "images", "a 'b' \\ é.npz")
    for number, (goal, runtime, drop) in enumerate(product(goals, runtimes, drops)):
        answers = {"model": model, "data": data[number % len(data)], "goal": goal, "runtime": runtime, "max_drop": drop}
        init = Init.configure({**answers, "yes": True})
        text = init.compose()
        planned = plan(parse_recipe(text, init.output))  # as ``run`` does before it runs anything
        assert planned[-1].values["max_drop"] == drop
        assert "# Written by micronet init" in text and "\n# The run fails if the accuracy falls by" in text
        texts.add(text.partition("folder")[2])
    assert len(texts) >= len(runtimes) * len(drops)  # answers make a difference


def test_images_with_masks_are_for_segmentation(place):
    (place / "images" / "train" / "masks").mkdir()
    answers = {**DEFAULTS, "model": "net.py:Net", "data": "images"}
    assert 'task = "segmentation"' in Init.configure(answers).compose()
    assert "task" not in Init.configure({**answers, "data": "digits"}).compose().partition("folder")[2]


def test_a_recipe_of_answers_runs(micronet, place):
    done = micronet("init", "--model", "float.onnx", "--max-drop", "100", "--yes", "-o", "a.toml")
    assert done.code == 0 and done.out.splitlines()[-1] == "next: micronet run a.toml"
    text = Path("a.toml").read_text()
    Path("a.toml").write_text(text.replace('name = "int8"', 'limit = 60\nname = "int8"'))
    done = micronet("run", "a.toml", "-o", "out")
    assert done.code == 0, done.err
    assert Path("out/int8.onnx").exists()


WRONG = {
    ("--model", "nim"): "unknown model 'nim'; allowed: nin",
    ("--model", "x.onnx"): "--model x.onnx does not exist",
    ("--model", "x.py:Net"): "x.py does not exist",
    ("--model", "a.pth"): "micronet import",
    ("--model", "int8.safetensors"): "is quantized already",
    ("--data", "digit"): "unknown data set 'digit'; allowed: digits",
    ("--data", "no/images"): "the data folder no/images does not exist",
    ("--data", "images/train"): "has no train/ in it",
    ("--goal", "tiny"): "unknown value for --goal: 'tiny'",
    ("--runtime", "coreml"): "unknown runtime 'coreml'",
    ("--max-drop", "-1"): "--max-drop is -1; allowed: 0 to 100",
    ("-o", "float.onnx"): "does not end in .toml",
    ("-o", "no/r.toml"): "create it with mkdir -p",
}


def test_a_path_that_no_recipe_can_name_is_one_line(micronet, place):
    name = "\udcff.npz"
    (place / name).touch()
    done = micronet("init", "--yes", "--data", name)
    (place / name).unlink()
    assert done.code == 2 and done.err.count("\n") == 1 and "not UTF-8" in done.err


@pytest.mark.parametrize("words", WRONG, ids=" ".join)
def test_a_wrong_answer_is_one_line_and_writes_nothing(micronet, place, words):
    before = sorted(place.iterdir())
    done = micronet("init", "--yes", *words)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert WRONG[words] in done.err
    assert sorted(place.iterdir()) == before


def test_nothing_is_overwritten_and_without_a_terminal_nothing_is_asked(micronet, place):
    assert micronet("init", "--yes").code == 0
    text = Path("recipe.toml").read_text()
    done = micronet("init", "--yes", "--goal", "fast")
    assert done.code == 2 and "recipe.toml already exists" in done.err and Path("recipe.toml").read_text() == text
    done = micronet("init", "--goal", "fast", "-o", "b.toml")
    assert done.code == 2 and "give --model, --data, --runtime, --max-drop, or add --yes" in done.err
    every = [word for name, value in DEFAULTS.items() for word in (f"--{name.replace('_', '-')}", value)]
    assert micronet("init", *every, "-o", "b.toml").code == 0  # nothing is left to ask
    assert Path("b.toml").read_text().replace("runs/b", "runs/recipe").replace("b.toml", "recipe.toml") == text


class Terminal(io.StringIO):
    """Standard input or error that says it is a terminal."""

    def isatty(self):
        return True


@pytest.fixture
def typing(micronet, monkeypatch):
    """Run ``init`` as if at a terminal, with answers typed."""

    def call(typed, *words):
        monkeypatch.setattr("sys.stdin", Terminal(typed))
        monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
        return micronet("init", *words)

    return call


def test_enter_takes_the_defaults_and_a_wrong_answer_is_asked_again(typing, place):
    done = typing("nim\n\n\ntiny\nfast\npacked\nmuch\n200\n2.5\n")
    assert done.code == 0, done.err
    assert done.err.count("error: ") == 4
    for question in QUESTIONS.values():
        assert question.splitlines()[0][:40] in done.err
    text = Path("recipe.toml").read_text()
    assert 'model = "nin"' in text and 'command = "pack"' in text and "max_drop = 2.5" in text
    told = typing("\n\n", "--json", "--model", "float.safetensors", "--goal", "small", "--max-drop", 1, "-o", "b.toml")
    assert told.json["data"] is None  # the file records it
    assert "[digits]" in told.err


@pytest.mark.parametrize("typed", ["", "nin\n", "nin\ndigits\nfast\npacked\n"])
def test_the_end_of_the_input_leaves_nothing(typing, place, typed):
    before = sorted(place.iterdir())
    done = typing(typed)
    assert done.code == 2 and "the input ended" in done.err
    assert sorted(place.iterdir()) == before


def test_ctrl_c_at_a_question_leaves_nothing_and_takes_no_torch(tmp_path):
    """In a real terminal, whose Ctrl-C is a signal."""
    mine, its = pty.openpty()

    def own_terminal():
        os.close(mine)
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell started in the background

    code = (
        "import sys; from micronet.cli.app import run; code = run(['init']); "
        "open(2, 'w', closefd=False).write('torch' if 'torch' in sys.modules else 'light'); sys.exit(code)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=its, stdout=its, stderr=its, cwd=tmp_path, start_new_session=True,
        preexec_fn=own_terminal,
    ) as process:  # fmt: skip
        os.close(its)
        seen = b""
        while b"Which network" not in seen:
            seen += os.read(mine, 4096)
        os.write(mine, b"nin\r")
        while b"Which data" not in seen:
            seen += os.read(mine, 4096)
        os.write(mine, b"\x03")
        with open(mine, "rb", buffering=0) as rest:  # noqa: PTH123  # a descriptor
            try:
                while chunk := rest.read(4096):
                    seen += chunk
            except OSError:  # the other end is closed
                pass
    assert process.returncode == 130 and b"interrupted" in seen and b"light" in seen
    assert list(tmp_path.iterdir()) == []
