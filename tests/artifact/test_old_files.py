"""Files that micronet wrote before it was rebuilt (commit 4b510be) load unchanged and compute the same scores.

``scores.npz`` holds the scores of every artifact in float64 on ``images()``, as that commit computed them,
``options.json`` the options of its commands, and ``evaluated.json`` what its ``evaluate`` printed. The recipes are its
own.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import typer.main
from safetensors.torch import load_file

from micronet.artifact.artifact import load, save
from micronet.cli.app import app
from micronet.quantization.fold import fold_model
from micronet.recipe.plan import plan
from micronet.recipe.reader import read_recipe

OLD = Path(__file__).parent / "old_files"
ARTIFACTS = sorted(OLD.glob("*.safetensors"))
STAGES = {  # what each is made of; the transformer's and the foreign network's code is recorded in them
    "float": ["train"],
    "w1a1fused": ["train", "sparse-train", "prune", "quantize", "bn-fuse"],
    "ptqfused": ["train", "sparse-train", "prune", "bn-fuse", "quantize"],
    "qaft": ["train", "sparse-train", "prune", "quantize", "finetune"],
    "vitptq": ["import", "prune", "quantize"],
    "netptq": ["import", "quantize"],
}


def images():
    """Normal values, in float64: rounding differs between processors by too little to move a value to another level."""
    drawn = np.random.default_rng(0).standard_normal((4, 3, 32, 32)).astype(np.float32)
    return torch.from_numpy(drawn).double()


@pytest.mark.parametrize("path", ARTIFACTS, ids=lambda path: path.stem)
def test_an_artifact_computes_what_it_computed(path):
    # Equal to the last bit on one machine, but for 3e-17 with ternary weights, which are now scaled after the sum.
    model = load(path, trust_code=True).model.eval().double()
    with torch.no_grad():
        scores = model(images()).numpy()
    np.testing.assert_allclose(scores, np.load(OLD / "scores.npz")[path.stem], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", ARTIFACTS, ids=lambda path: path.stem)
def test_an_artifact_saved_again_keeps_its_tensors_and_history(path, tmp_path):
    held = load(path, trust_code=True)
    save(held, tmp_path / "again.safetensors")
    left, right = load_file(path), load_file(tmp_path / "again.safetensors")
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    again = load(tmp_path / "again.safetensors", trust_code=True)
    assert (again.history, again.metrics) == (held.history, held.metrics)


@pytest.mark.parametrize(("name", "stages"), STAGES.items())
def test_a_history_names_the_stages_of_then(name, stages):
    assert [record.stage for record in load(OLD / f"{name}.safetensors", trust_code=True).history] == stages


@pytest.mark.parametrize(("name", "stage"), [("vitpruned", "prune"), ("vitwhole", "quantize")])
def test_attention_that_a_stage_split_is_recorded(name, stage):
    held = load(OLD / f"{name}.safetensors", trust_code=True)
    (record,) = (record for record in held.history if record.stage == stage)
    assert record.result["attention"] == ["encoder.layers.encoder_layer_0.self_attention"]
    assert "encoder.layers.encoder_layer_0.self_attention.q_proj.weight" in held.model.state_dict()


@pytest.mark.parametrize(("unfused", "fused"), [("iao", "fused"), ("w1a1", "w1a1fused"), ("ptq", "ptqfolded")])
def test_an_old_artifact_fuses_to_what_it_fused_to(unfused, fused):
    held = load(OLD / f"{unfused}.safetensors")
    model, _ = fold_model(held.model, held.history)
    expected = load_file(OLD / f"{fused}.safetensors")
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if not name.endswith(
            (".observer.low", ".observer.high")
        ):  # a fused layer's grid is frozen: nothing reads its range
            torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["int8.onnx", "int8.packed", "w1a1.packed"])
def test_evaluate_says_of_a_file_what_it_said(micronet, name):
    done = micronet("evaluate", OLD / name, "--json")
    assert done.code == 0, done.err
    expected = json.loads((OLD / "evaluated.json").read_text())[name]
    loss, accuracy = expected.pop("loss"), expected.pop("accuracy")
    assert {key: done.json[key] for key in expected} == expected
    assert done.json["loss"] == pytest.approx(loss, abs=1e-3)
    assert done.json["accuracy"] == pytest.approx(accuracy, abs=0.01)  # rounding may move few of 360 images


@pytest.mark.parametrize("path", sorted(OLD.glob("*.toml")), ids=lambda path: path.stem)
def test_a_recipe_of_then_is_sound(path):
    assert [each.stage.name for each in plan(read_recipe(path))][-1] == "compare"


def test_every_option_of_then_is_there():
    commands = typer.main.get_command(app).commands
    for name, expected in json.loads((OLD / "options.json").read_text()).items():
        assert expected
        with commands[name].make_context(name, [], resilient_parsing=True) as context:
            found = {option for each in context.command.params for option in (*each.opts, *each.secondary_opts)}
        assert found.issuperset(expected), name
