"""Recipes: the same commands, in order, skipped where unchanged, and none begun before all are checked."""

import json
import os
import random
import signal
import time
import tomllib
from pathlib import Path

import pytest

from micronet.recipe.plan import plan
from micronet.recipe.reader import bundled, read_recipe
from micronet.recipe.schema import recipe_schema
from tests.training.processes import Command

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = """
folder = "out"

[[stage]]
command = "train"
name = "float"
model = "lenet_bn"
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
limit = 100
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
    options = ["--model", "lenet_bn", "--limit", 160, "--batch-size", 32, "--epochs", 3]
    assert micronet("train", *options, "-o", by_hand).code == 0
    shown = [micronet("inspect", path, "--json").json for path in (by_hand, tmp_path / "out" / "float.safetensors")]
    assert shown[0]["metrics"] == shown[1]["metrics"]
    assert shown[0]["history"] == shown[1]["history"]
    stamps = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in first}
    again = micronet("run", recipe)
    assert again.err.count("unchanged") == 7
    assert stamps == {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in first}
    recipe.write_text(TINY.replace("percent = 0.5", "percent = 0.4"))
    changed = micronet("run", recipe)
    assert changed.err.count("unchanged") == 2
    assert "wrote " in changed.out and "next: " not in changed.out  # the recipe goes on by itself
    recipe.write_text(TINY)
    anew = micronet("run", recipe, "--from", "fused")
    assert anew.code == 0
    assert anew.err.count("unchanged") == 2  # float and sparse; prune and all after it had become another's
    assert contents(tmp_path / "out") == first
    assert micronet("run", recipe, "--from", "fused").err.count("unchanged") == 5
    (tmp_path / "out" / "int8.onnx").write_bytes(b"meddled with")
    assert micronet("run", recipe).err.count("unchanged") == 6
    assert contents(tmp_path / "out") == first


@pytest.mark.parametrize("trial", [0, *(pytest.param(trial, marks=pytest.mark.slow) for trial in range(1, 6))])
def test_a_recipe_killed_at_random_moments_ends_with_the_same_files(micronet, recipe, tmp_path, trial):
    # All run in folders of the same name, as a file's header records the command line that made it.
    done = micronet("run", recipe, "-o", "out")
    assert done.code == 0, done.err
    expected = contents(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "expected")
    draw = random.Random(trial)
    for stage in sorted(draw.sample(range(len(MADE)), 3 if trial else 1)):
        process = Command(tmp_path / "log", "run", recipe, "-o", "out")
        process.wait_for(tmp_path / "out" / f"{MADE[stage]}.safetensors")
        time.sleep(draw.uniform(0, 0.3))  # into the work of the stage after it
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    done = micronet("run", recipe, "-o", "out")
    assert done.code == 0, done.err
    assert "unchanged" in done.err
    assert contents(tmp_path / "out") == expected
    assert not list((tmp_path / "out").glob("*.checkpoint.*"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('command = "prune"', 'command = "purne"', "line 20: unknown command 'purne'; allowed: prune"),
        ('command = "bn-fuse"', 'command = "prune"', "line 36: prune: prune cannot follow quantize"),
        ("percent = 0.5", "regular = 0", "prune: regular is 0; allowed: 1 or more"),
        ("percent = 0.5", "precent = 0.5", "line 21: unknown option of prune: 'precent'; allowed: percent"),
        ("percent = 0.5", 'percent = "half"', "line 21: percent is 'half'; expected a number"),
        ("percent = 0.5", "percent = 1.5", "line 19: prune: percent is 1.5"),
        ("percent = 0.5", "percent = 0.5\nforce = true", "line 22: unknown option of prune: 'force'"),
        ('"lenet_bn"', '"nim"', "train: unknown model 'nim'; allowed: nin"),
        ('"lenet_bn"', f'"{"nim" * 100}"', "train: unknown model 'nimnim"),  # longer than a file's name may be
        ("epochs = 3", "epochs = 2.5", "line 10: epochs is 2.5; expected an integer"),
        ("epochs = 3", "epochs = true", "line 10: epochs is True; expected an integer"),
        ('name = "sparse"', 'name = "float"', "line 14: an earlier stage is also named 'float'"),
        ('name = "sparse"', 'name = "a/b"', "line 14: stage names can"),
        ('name = "sparse"', 'name = "."', "line 14: stage names can"),
        ('distill = "float"', 'distill = "flaot"', "unknown stage or file 'flaot'; allowed: float"),
        ('model = "lenet_bn"', 'model_args = "{bad"', "line 4: train: model_args is not valid JSON"),
        ("epochs = 3", "epochs = 3\nbatch_size = 2", "batch_size is set twice"),
        ('output = "int8.onnx"', 'output = "no/where.onnx"', "the folder out/no does not exist; create it with"),
        (
            'name = "fused"',
            'name = "fused"\noutput = "int8.safetensors"',
            "is also the output of another stage",
        ),
        ("percent = 0.5", "percent = 0.5\ndry_run = true", "unknown option of prune: 'dry_run'"),
        ('command = "bn-fuse"', "", "line 36: this stage has no command"),
        ('command = "train"', 'command = "bn-fuse"', "line 8: unknown option of bn-fuse: 'limit'"),
        ('folder = "out"', 'folders = "out"', "unknown key 'folders'; allowed: folder"),
        ('folder = "out"', "folder = 3", "folder must be a string"),
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
    assert "line 1: bn-fuse needs artifact" in micronet("run", recipe).err
    recipe.write_text(TINY)
    assert "unknown stage 'flaot'; allowed: float" in micronet("run", recipe, "--from", "flaot").err


def test_a_stage_that_fails_says_which_and_the_rest_waits(micronet, recipe, tmp_path):
    again = '[[stage]]\ncommand = "quantize"\nname = "again"\nartifact = "tuned"\ninclude = "nosuch"\n\n'
    recipe.write_text(TINY.replace('[[stage]]\ncommand = "export-onnx"', f'{again}[[stage]]\ncommand = "export-onnx"'))
    done = micronet("run", recipe)
    assert done.code == 2
    assert "stage again" in done.err
    assert "line 40" in done.err
    assert (tmp_path / "out" / "fused.safetensors").exists()
    assert not (tmp_path / "out" / "int8.onnx").exists()


def test_a_damaged_journal_costs_a_word_and_a_new_run(micronet, recipe, tmp_path):
    recipe.write_text(TINY[: TINY.index('[[stage]]\ncommand = "sparse-train"')])
    assert micronet("run", recipe).code == 0
    for text in ("{", "[]", '{"float": 3}'):
        (tmp_path / "out" / "recipe.json").write_text(text)
        assert "--force" in micronet("run", recipe).err
        assert micronet("run", recipe, "--force").code == 0


def test_data_go_to_the_first_stage_that_takes_any(micronet, recipe, chain, tmp_path):
    text = f"""
        [[stage]]
        command = "prune"
        percent = 0
        artifact = "{chain / "float.safetensors"}"
        [[stage]]
        command = "finetune"
        epochs = 1
        """
    recipe.write_text(text)
    done = micronet("run", recipe, "--data", "nonesuch", "-o", "out")
    assert done.code == 2
    assert "nonesuch" in done.err
    assert "line 6: finetune: unknown data set" in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.toml"]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ('command = "train"\n[[stage]]\ncommand = "finetune"\ndata = "gone.npz"', "line 3: finetune: gone.npz cannot"),
        ('command = "import"\n[[stage]]\ncommand = "finetune"', "specify one with data"),
        ('command = "train"\ndata = "gone/"', "the data folder gone/ does not exist"),
        ('command = "train"\nmodel = "gone.py:Net"', 'stage train (tiny.toml, line 1): model = "gone.py:Net": gone.py'),
    ],
)
def test_a_recipe_that_is_refused_leaves_nothing_behind(micronet, recipe, tmp_path, stages, message):
    recipe.write_text(f"[[stage]]\n{stages}\n")
    done = micronet("run", "tiny.toml", "-o", "new/out")
    assert done.code == 2
    assert message in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.toml"]


def test_a_file_that_the_recipe_did_not_make_is_not_overwritten(micronet, recipe, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "float.safetensors").write_text("precious")
    done = micronet("run", recipe)
    assert done.code == 2
    assert "--force" in done.err
    assert (tmp_path / "out" / "float.safetensors").read_text() == "precious"


def test_changed_code_of_a_users_network_is_noticed(micronet, recipe, tmp_path):
    code = "from torch import nn\nclass Net(nn.Sequential):\n    def __init__(self):\n        super().__init__("
    layers = "nn.Flatten(), nn.Linear(3072, {}), nn.ReLU(), nn.Linear({}, 10))"
    (tmp_path / "net.py").write_text(code + layers.format(4, 4))
    recipe.write_text('[[stage]]\ncommand = "train"\nmodel = "net.py:Net"\nepochs = 1\nlimit = 100\n'
                      '[[stage]]\ncommand = "evaluate"\n'
                      '[[stage]]\ncommand = "train"\nname = "other"\nepochs = 0\nwidth = 0.1\nlimit = 100\n'
                      '[[stage]]\ncommand = "compare"\n')  # fmt: skip  # code is named once, beside a built-in network
    assert micronet("run", recipe, "-o", "out").code == 0
    text = recipe.read_text()
    recipe.write_text('[[stage]]\ncommand = "finetune"\nartifact = "out/train.safetensors"\n')
    assert 'line 1: this stage needs custom code, net.py:Net; add model = "net.py:Net"' in micronet("run", recipe).err
    recipe.write_text(text)
    (tmp_path / "net.py").write_text(code + layers.format(5, 5))
    again = micronet("run", recipe, "-o", "out", "--json")
    assert again.code == 0, again.err
    assert again.json["rows"][0]["params"] == 3073 * 5 + 60


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_that_ships_is_sound(path):
    stages = plan(read_recipe(path))
    assert stages[-1].stage.name == "compare"
    assert stages[0].output.suffix == ".safetensors"


def test_the_schema_beside_the_recipes_is_up_to_date():
    """Write it by ``micronet schema recipe > configs/recipe.schema.json``."""
    written = json.loads((CONFIGS / "recipe.schema.json").read_text())
    assert written == json.loads(json.dumps(recipe_schema()))


def _allows(schema, value):
    """Return True if a value is valid by the keywords of JSON Schema that the schema of recipes uses."""
    if "oneOf" in schema:
        return sum(_allows(one, value) for one in schema["oneOf"]) == 1
    if "anyOf" in schema:
        return any(_allows(one, value) for one in schema["anyOf"])
    if "const" in schema or "enum" in schema:
        return value in schema.get("enum", [schema.get("const")])
    kinds = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": (int, float)}
    if not isinstance(value, kinds[schema["type"]]) or (isinstance(value, bool) and schema["type"] != "boolean"):
        return False
    if isinstance(value, dict):
        known = schema["properties"]
        return (set(schema.get("required", ())) <= set(value) <= set(known)) and all(
            _allows(known[key], item) for key, item in value.items()
        )
    if isinstance(value, list):
        return all(_allows(schema["items"], item) for item in value)
    return isinstance(value, str) or schema.get("minimum", value) <= value <= schema.get("maximum", value)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.name)
def test_every_recipe_that_ships_names_its_schema_and_is_valid_by_it(path):
    text = path.read_text()
    assert text.startswith("#:schema recipe.schema.json\n")
    assert bundled()[path.stem].name == path.name  # `micronet run NAME`
    recipe = tomllib.loads(text)
    assert _allows(recipe_schema(), recipe)
    recipe["stage"][0]["epochs"] = -1
    assert not _allows(recipe_schema(), recipe)
