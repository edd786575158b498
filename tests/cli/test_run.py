"""Recipes: the same commands, in order, skipped where unchanged, and none begun before all are checked."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from micronet.cli.app import COMMANDS
from micronet.cli.recipe_stages import bind
from micronet.recipe import read_recipe

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = """
folder = "out"

[[stage]]
command = "train"
name = "float"
width = 0.1
limit = 160
batch-size = 32
epochs = 3

[[stage]]
command = "sparse-train"
name = "sparse"
s = 1e-3
epochs = 2
limit = 160

[[stage]]
command = "prune"
percent = 0.5

[[stage]]
command = "finetune"
name = "tuned"
epochs = 2
limit = 160
distill = "float"

[[stage]]
command = "quantize"
name = "int8"
epochs = 1
limit = 160

[[stage]]
command = "bn-fuse"
name = "fused"

[[stage]]
command = "export-onnx"
name = "onnx"
output = "int8.onnx"

[[stage]]
command = "compare"
files = ["float", "onnx"]
"""
MADE = ["float", "sparse", "prune", "tuned", "int8", "fused"]


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


def contents(folder):
    """What the stages wrote; the logs beside them hold measured seconds."""
    files = [folder / f"{name}.safetensors" for name in MADE] + [folder / "int8.onnx"]
    return {path.name: path.read_bytes() for path in files}


def test_a_recipe_makes_what_its_commands_make_and_skips_what_is_unchanged(micronet, recipe, tmp_path):
    done = micronet("run", recipe, "--json")
    assert done.code == 0, done.err
    assert [row["name"] for row in done.json["rows"]] == ["float.safetensors", "int8.onnx"]
    first = contents(tmp_path / "out")
    by_hand = tmp_path / "hand.safetensors"
    options = ["--width", 0.1, "--limit", 160, "--batch-size", 32, "--epochs", 3]
    assert micronet("train", *options, "-o", by_hand).code == 0
    shown = [micronet("inspect", path, "--json").json for path in (by_hand, tmp_path / "out" / "float.safetensors")]
    assert shown[0]["metrics"] == shown[1]["metrics"]
    assert shown[1]["command"].startswith("micronet train --width 0.1")
    stamps = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in first}
    again = micronet("run", recipe)
    assert again.err.count("unchanged") == 7
    assert stamps == {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in first}
    recipe.write_text(TINY.replace("percent = 0.5", "percent = 0.4"))
    changed = micronet("run", recipe)
    assert changed.err.count("unchanged") == 2
    recipe.write_text(TINY)
    anew = micronet("run", recipe, "--from", "fused")
    assert anew.code == 0
    assert anew.err.count("unchanged") == 2  # float and sparse; prune and all after it had become another's
    assert contents(tmp_path / "out") == first
    assert micronet("run", recipe, "--from", "fused").err.count("unchanged") == 5
    (tmp_path / "out" / "int8.onnx").write_bytes(b"meddled with")
    assert micronet("run", recipe).err.count("unchanged") == 6
    assert micronet("run", recipe, "--force").err.count("unchanged") == 0
    assert contents(tmp_path / "out") == first


@pytest.mark.parametrize("trial", [0, *(pytest.param(trial, marks=pytest.mark.slow) for trial in range(1, 6))])
def test_a_recipe_killed_at_a_random_moment_ends_with_the_same_files(recipe, tmp_path, trial):
    def start(folder):
        command = [sys.executable, "-m", "micronet.cli.app", "run", str(recipe), "-o", folder]
        return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)

    # Both run in folders of the same name, as a file's header records the command line that made it.
    began = time.monotonic()
    whole = start("out")
    assert whole.wait() == 0, whole.stderr.read()
    seconds = time.monotonic() - began
    expected = contents(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "kept")
    draw = random.Random(trial)
    kills = 0
    while True:
        process = start("out")
        try:
            process.wait(timeout=seconds * draw.uniform(0.25, 0.9))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            continue
        assert process.returncode == 0, process.stderr.read()
        break
    assert kills
    assert contents(tmp_path / "out") == expected
    assert not list((tmp_path / "out").glob("*.checkpoint.*"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('command = "prune"', 'command = "purne"', "line 20: unknown command 'purne'; allowed: prune"),
        ("percent = 0.5", "precent = 0.5", "line 21: unknown option of prune: 'precent'; allowed: percent"),
        ("percent = 0.5", 'percent = "half"', "line 21: percent is 'half'; expected a number"),
        ("percent = 0.5", "percent = 1.5", "line 19: prune: --percent is 1.5"),
        ("percent = 0.5", "percent = 0.5\nforce = true", "line 22: unknown option of prune: 'force'"),
        ("epochs = 3", "epochs = 2.5", "line 10: epochs is 2.5; expected a whole number"),
        ("epochs = 3", "epochs = true", "line 10: epochs is True; expected a whole number"),
        ('name = "sparse"', 'name = "float"', "line 14: there is a stage 'float' before"),
        ('name = "sparse"', 'name = "a/b"', "line 14: a stage's name"),
        ('command = "bn-fuse"', "", "line 36: this stage names no command"),
        ('command = "train"', 'command = "bn-fuse"', "line 7: unknown option of bn-fuse: 'width'"),
        ('folder = "out"', 'folders = "out"', "unknown key 'folders'; allowed: folder"),
        ('folder = "out"', "folder = 3", "folder is a string"),
        ('folder = "out"', "folder =", "at line 2"),
    ],
)
def test_a_mistake_is_found_before_anything_runs(micronet, recipe, tmp_path, old, new, message):
    recipe.write_text(TINY.replace(old, new))
    done = micronet("run", recipe)
    assert done.code == 2
    assert message in done.err
    assert done.err.strip().count("\n") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.toml"]


def test_what_a_recipe_lacks_is_said(micronet, recipe, tmp_path):
    assert "does not exist" in micronet("run", "nowhere.toml").err
    recipe.write_text("")
    assert "no stage" in micronet("run", recipe).err
    recipe.write_text('[[stage]]\ncommand = "bn-fuse"\n')
    assert "line 1: bn-fuse needs an artifact" in micronet("run", recipe).err
    recipe.write_text(TINY)
    assert "unknown stage 'flaot'; allowed: float" in micronet("run", recipe, "--from", "flaot").err


def test_a_stage_that_fails_says_which_and_the_rest_waits(micronet, recipe, tmp_path):
    recipe.write_text(TINY.replace('command = "bn-fuse"', 'command = "bn-fuse"\nartifact = "nowhere.safetensors"'))
    done = micronet("run", recipe)
    assert done.code == 2
    assert "stage fused" in done.err
    assert "line 36" in done.err
    assert (tmp_path / "out" / "int8.safetensors").exists()
    assert not (tmp_path / "out" / "int8.onnx").exists()


def test_a_damaged_journal_costs_a_new_run_and_nothing_else(micronet, recipe, tmp_path):
    recipe.write_text(TINY[: TINY.index('[[stage]]\ncommand = "sparse-train"')])
    assert micronet("run", recipe).code == 0
    for text in ("{", "[]", '{"float": 3}', json.dumps({"float": {"key": 1}})):
        (tmp_path / "out" / "recipe.json").write_text(text)
        assert micronet("run", recipe).code == 0


def test_the_first_stages_data_can_be_given(micronet, recipe, tmp_path):
    done = micronet("run", recipe, "--data", "nonesuch")
    assert done.code == 2
    assert "nonesuch" in done.err


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_that_ships_is_sound(path):
    commands = {command.NAME: command for command in COMMANDS if command.NAME != "run"}
    stages = bind(read_recipe(path), commands, {})
    assert stages[-1].stage.command == "compare"
    assert "# " in path.read_text().splitlines()[0]
