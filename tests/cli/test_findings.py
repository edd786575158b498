"""Bugs that were found by reading, each by the command or recipe that showed it; other tests hold those of one room."""

import pytest
import torch

from micronet.recipe.plan import plan
from micronet.recipe.reader import read_recipe

TRAIN = '[[stage]]\ncommand = "train"\nname = "float"\nwidth = 0.1\nlimit = 160\n\n'
EXPORT = '[[stage]]\ncommand = "export-onnx"\nname = "exported"\n\n'


def stages(*commands):
    """Return a recipe: a training, then these commands, each on the result of the one before."""
    return TRAIN + "".join(f'[[stage]]\ncommand = "{name}"\nname = "s{n}"\n\n' for n, name in enumerate(commands))


@pytest.mark.parametrize(("command", "suffix"), [("pack", ".packed"), ("trt-build", ".engine")])
@pytest.mark.parametrize("exported", [False, True])
def test_a_recipe_names_the_file_by_what_the_command_writes(tmp_path, command, suffix, exported):
    path = tmp_path / "r.toml"
    last = f'[[stage]]\ncommand = "{command}"\nname = "last"\n'
    path.write_text('folder = "out"\n' + TRAIN + EXPORT * exported + last)
    found = {each.entry.name: each for each in plan(read_recipe(path))}
    assert found["last"].output.name == f"last{suffix}"
    assert found["last"].values["artifact"] == found["float"].output


def test_a_recipe_packs_and_compares(micronet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = 'model = "nin"\nmodel_args = "{\\"width\\": 0.1}"\ndata = "digits"\n'
    (tmp_path / "r.toml").write_text(
        f'[[stage]]\ncommand = "import"\nname = "float"\n{model}\n[[stage]]\ncommand = "pack"\nname = "small"\n'
    )
    done = micronet("run", "r.toml", "-o", "out", "--json")
    assert done.code == 0, done.err
    assert [row["name"] for row in done.json["rows"]] == ["float.safetensors", "small.packed"]


@pytest.mark.parametrize(
    ("command", "setting", "message"),
    [
        ("export-onnx", "check_images = -5", "check_images is -5"),
        ("pack", "check_images = 0", "check_images is 0"),
        ("prune", "steps = 1001", "steps is 1001"),
        ("finetune", "epochs = -1", "epochs is -1"),
        ("quantize", "calib_batches = 0", "calib_batches is 0"),
        ("quantize", 'mode = "ptq"\nepochs = 3', 'mode = "ptq" does not train'),
    ],
)
def test_a_recipe_has_the_bounds_of_the_command_line(micronet, tmp_path, monkeypatch, command, setting, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.toml").write_text(stages(command) + setting)
    done = micronet("run", "r.toml")
    assert done.code == 2
    assert message in done.err
    assert "line " in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["r.toml"]


@pytest.mark.parametrize(
    "commands",
    [
        ("quantize", "prune"), ("quantize", "sparse-train"), ("quantize", "quantize"), ("bn-fuse", "prune"),
        ("bn-fuse", "finetune"), ("quantize", "bn-fuse", "bn-fuse"), ("prune", "train"), ("import",),
    ],
    ids="-".join,
)  # fmt: skip
def test_an_illegal_order_is_refused_before_anything_runs(micronet, tmp_path, monkeypatch, commands):
    monkeypatch.chdir(tmp_path)
    text = stages(*commands)
    if commands[-1] in ("train", "import"):  # they begin, so they read no artifact at all
        text += f'artifact = "s{len(commands) - 2}"\n'
    (tmp_path / "r.toml").write_text(text)
    done = micronet("run", "r.toml")
    assert done.code == 2
    assert f"{commands[-1]}" in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["r.toml"]


def test_ptq_with_epochs_is_refused_before_a_network_is_trained(micronet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = micronet("quantize", "--mode", "ptq", "--epochs", 3)
    assert done.code == 2
    assert "--mode ptq does not train" in done.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", [["--resume"], ["--max-time", 5], ["--compile"]], ids=lambda option: option[0])
def test_prune_without_steps_refuses_what_is_for_training(micronet, chain, tmp_path, option):
    done = micronet("prune", chain / "float.safetensors", *option, "-o", tmp_path / "p.safetensors")
    assert done.code == 2
    assert f"{option[0]} only applies to training; add --steps N" in done.err
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_prune_without_steps_reads_its_device(micronet, chain, tmp_path):
    done = micronet("prune", chain / "float.safetensors", "--device", "cuda:0", "-o", tmp_path / "p.safetensors")
    assert done.code == 2
    assert "--device" in done.err
    assert not list(tmp_path.iterdir())


def test_the_same_imports_without_weights_give_the_same_bytes(micronet, tmp_path, monkeypatch):
    found = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        torch.rand(len(found) + 1)  # what was drawn before must not matter
        assert (
            micronet("import", "--model", "nin_gc", "--model-args", '{"width": 0.1}', "-o", "n.safetensors").code == 0
        )
        found.append((tmp_path / folder / "n.safetensors").read_bytes())
    assert found[0] == found[1]


@pytest.mark.parametrize("a_bits", ["binary", 8])
def test_an_untrained_ternary_network_is_packed(micronet, tmp_path, a_bits):
    path, ternary = tmp_path / "n.safetensors", tmp_path / "t.safetensors"
    imported = micronet("import", "--model", "nin_gc", "--model-args", '{"width": 0.1}', "--data", "digits", "-o", path)
    assert imported.code == 0, imported.err
    few = ["--mode", "ptq", "--calib-batches", 1, "-o", ternary]
    assert micronet("quantize", path, "--w-bits", "ternary", "--a-bits", a_bits, *few).code == 0
    done = micronet("pack", ternary, "--check-images", 64, "-o", tmp_path / "t.packed", "--json")
    assert done.code == 0, done.err
    assert done.json["classes"] == 1
