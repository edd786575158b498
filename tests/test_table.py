"""The results table: its recipes are valid and share their beginnings; the script skips, continues and takes over."""

import json
import shutil
import tomllib
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from micronet.recipe.plan import plan
from micronet.recipe.reader import read_recipe
from micronet.training.checkpoint import Checkpoint

ROOT = Path(__file__).parents[1]
FLOAT = """
[[stage]]
command = "train"
name = "net"
model = "lenet"
batch_size = 10
epochs = 2
"""
ROWS = {
    "net": """
[[stage]]
command = "compare"
files = ["net"]
""",
    "net-w8a8": """
[[stage]]
command = "quantize"
name = "net-w8a8"
artifact = "net"
mode = "ptq"
calib_batches = 1

[[stage]]
command = "compare"
files = ["net-w8a8"]
""",
}


def load_script():
    loader = SourceFileLoader("reproduce_table", str(ROOT / "scripts" / "reproduce_table"))
    module = module_from_spec(spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


TABLE = load_script()


@pytest.fixture
def folder(tmp_path):
    """Recipes of two rows and a few images of two classes."""
    (tmp_path / "recipes").mkdir()
    for name, rest in ROWS.items():
        (tmp_path / "recipes" / f"{name}.toml").write_text(FLOAT + rest)
    pixels = np.random.default_rng(0)
    for split, count in (("train", 10), ("test", 3)):
        for label in ("cat", "dog"):
            place = tmp_path / "images" / split / label
            place.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(pixels.integers(0, 256, (32, 32, 3), np.uint8)).save(place / f"{number}.png")
    return tmp_path


@pytest.fixture
def table(folder, capsys):
    """Call the script in this process; gives its exit code, standard output and standard error."""

    def call(*options, data=True):
        capsys.readouterr()
        images = ["--data", str(folder / "images")] if data else []
        code = TABLE.main([*images, "--out", str(folder / "out"), "--recipes", str(folder / "recipes"), *options])
        return code, *capsys.readouterr()

    return call


def shown(table):
    code, out, _ = table("--show", data=False)
    assert code == 0
    return {row["row"]: row for row in json.loads(out)}


@pytest.mark.parametrize("path", sorted(TABLE.RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_recipes_are_valid_and_end_with_their_own_measurement(path):
    planned = plan(read_recipe(path), "images")
    assert [each.name for each in planned[-1].values["files"]][1:] == [f"{path.stem}.onnx", f"{path.stem}.packed"]
    assert (
        planned[0].values["preset"] == "fast" and "width" not in planned[0].values and "limit" not in planned[0].values
    )


def test_stages_of_one_name_are_the_same_in_all_recipes():
    """So the shared journal finds them unchanged; every network of the table has a float row."""
    found, rows = {}, [path.stem for path in TABLE.find_rows(TABLE.RECIPES, None)]
    for path in TABLE.RECIPES.glob("*.toml"):
        for stage in tomllib.loads(path.read_text())["stage"][:-1]:
            assert found.setdefault(stage["name"], stage) == stage, (path, stage["name"])
    assert rows[0] == "nin_3x3" and set(TABLE.NETWORKS) <= set(rows)


def test_finished_rows_are_skipped_and_shared_stages_run_once(table, folder):
    code, _, log = table()
    assert code == 0 and log.count("micronet train") == 1, log
    rows = shown(table)
    assert list(rows) == ["net", "net-w8a8"] and all(row["accuracy"] is not None for row in rows.values())
    assert rows["net"]["images"] == 6 and rows["net"]["versions"]["torch"]
    assert rows["net-w8a8"]["onnx_bytes"] is None and rows["net-w8a8"]["seed"] == 1
    assert rows["net-w8a8"]["minutes"] > rows["net"]["minutes"]  # the float network's are in both

    code, _, log = table()
    assert (code, log) == (0, "net: done\nnet-w8a8: done\n")

    changed = folder / "recipes" / "net.toml"
    changed.write_text(changed.read_text() + "limit = 4\n")
    assert shown(table)["net"]["accuracy"] is None  # it is another row now
    code, _, log = table("--only", "net")
    assert code == 0 and "micronet train" not in log and shown(table)["net"]["images"] == 4


def test_table_holds_every_file_and_the_originals_figures(table, folder):
    recipe = folder / "recipes" / "net-w1a1.toml"
    recipe.write_text(ROWS["net"])
    figures = {"accuracy": 0.5, "images": 6, "params": 7, "macs": 8}
    files = [
        {"name": "net-w1a1.safetensors", **figures, "size_bytes": 3000, "latency_ms": 3.0},
        {"name": "net-w1a1.onnx", **figures, "size_bytes": 2000, "latency_ms": 2.0},
        {"name": "net-w1a1.packed", **figures, "size_bytes": 1000, "latency_ms": 1.0},
    ]
    record = {"recipe": tomllib.loads(recipe.read_text()), "seed": 1, "minutes": {"a": 1.0, "b": 2.0}, "rows": files}
    (folder / "out").mkdir()
    (folder / "out" / "net-w1a1.json").write_text(json.dumps(record))
    row = shown(table)["net-w1a1"]
    assert [row[name] for name in ("onnx_bytes", "packed_bytes", "onnx_ms", "packed_ms")] == [2000, 1000, 2.0, 1.0]
    _, text, _ = table("--markdown", data=False)
    cells = "| net | W1A1 | 50.00% |  | 90.02%, later 86.23% (nin_gc) | 7 | 2,000 | 1,000 | 2.00 | 1.00 | 3 |"
    assert "CIFAR-10 (JPEG)" in text and cells in text and "| net | W8A8, QAT |  |" in text


def test_time_limit_and_ctrl_c_leave_what_the_next_call_continues(table, monkeypatch):
    code, _, log = table("--only", "net", "--max-time", "0")
    assert code == 3 and "run the same command to continue" in log and shown(table)["net"]["accuracy"] is None
    save = Checkpoint.save

    def save_and_stop(self, *arguments, **options):
        save(self, *arguments, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as first_epoch:
        first_epoch.setattr(Checkpoint, "save", save_and_stop)
        code, _, log = table("--only", "net")
    assert code == 130 and "interrupted: run the same command to continue" in log
    code, _, log = table("--only", "net")
    assert code == 0 and "resuming after epoch 1 of 2" in log
    assert shown(table)["net"]["accuracy"] is not None


def train(micronet, folder, *options):
    out = folder / "out"
    out.mkdir(exist_ok=True)
    arguments = ["--model", "lenet", "--batch-size", "10", "--data", folder / "images"]
    assert micronet("train", *arguments, *options, "-o", out / "net.safetensors").code == 0


def test_networks_trained_by_hand_are_taken_over_if_the_settings_agree(table, folder, micronet):
    train(micronet, folder, "--epochs", 2)
    code, _, log = table("--only", "net")
    assert code == 0 and "taking it over" in log and "micronet train" not in log
    shutil.rmtree(folder / "out")
    train(micronet, folder, "--epochs", 1)
    code, _, log = table("--only", "net")
    assert code == 2 and "was not created by this recipe" in log


def test_a_training_of_another_process_is_left_alone(table, folder):
    (folder / "out").mkdir()
    (folder / "out" / "net.checkpoint.safetensors").write_bytes(b"in progress")
    code, _, log = table("--only", "net")
    assert code == 2 and "another process seems to be training" in log
    assert (folder / "out" / "net.checkpoint.safetensors").read_bytes() == b"in progress"


def test_mistakes_end_in_one_line(table):
    for options, message in (
        (["--data", "no/such/folder"], "no/such/folder"),
        (["--only", "net-w3a3"], "unknown row 'net-w3a3'; allowed: net-w8a8, net"),
        ([], "add --data FOLDER"),
    ):
        code, out, log = table(*options, data=False)
        assert code == 2 and out == "" and log.count("\n") == 1 and message in log, log
