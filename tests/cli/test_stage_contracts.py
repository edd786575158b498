"""What holds for stages however they are called: from the command line, a recipe or Python."""

import shutil

import pytest
import torch
from torch import nn

import micronet as api
from micronet import registry
from micronet.stages.keywords import as_keywords
from micronet.stages.stage import find, uses


def network():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(8, 10))  # fmt: skip


def test_an_export_leaves_the_checkpoint_of_an_interrupted_training(micronet, chain, tmp_path):
    path, checkpoint = tmp_path / "a.safetensors", tmp_path / "a.checkpoint.safetensors"
    shutil.copy(chain / "float.safetensors", path)
    checkpoint.write_text("an interrupted training's")
    assert micronet("export-onnx", path).code == 0
    assert checkpoint.exists()


def test_a_recipe_that_prints_json_holds_its_gates(micronet, chain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gate = (
        f'[[stage]]\ncommand = "compare"\nfiles = ["{chain / "float.safetensors"}"]\nmax_drop = -1.0\nname = "gate"\n'
    )
    (tmp_path / "r.toml").write_text(f"{gate}{gate.replace('gate', 'last').replace('-1.0', '100.0')}")
    assert micronet("run", "r.toml", "--json").code == 1


def test_a_recipe_names_a_cache_that_does_not_exist_yet(micronet, chain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.toml").write_text(
        f'[[stage]]\ncommand = "quantize"\nartifact = "{chain / "float.safetensors"}"\nmode = "ptq"\n'
        'calib_cache = "c.safetensors"\nlimit = 100\n'
    )
    done = micronet("run", "r.toml", "-o", "out")
    assert done.code == 0, done.err
    assert (tmp_path / "c.safetensors").exists()


@pytest.mark.parametrize("name", [name for name in registry.STAGES if uses(find(name), "artifact")])
def test_a_file_of_another_kind_is_refused_in_one_line(micronet, tmp_path, name):
    path = tmp_path / "net.py"
    path.write_text("from torch import nn\n")
    done = micronet(name, path)
    assert done.code == 2, done.err
    assert done.err.splitlines()[-1].endswith(", not an artifact (.safetensors)")


def test_qaft_needs_an_artifact(micronet):
    done = micronet("quantize", "--mode", "qaft")
    assert done.code == 2
    assert "needs a quantized artifact" in done.err


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: api.finetune(network(), data=[x]), "the data have no labels"),
        (lambda x: api.evaluate(network(), data=[x]), "the data have no labels"),
        (lambda x: api.quantize(network(), data=[x], epochs=5), "no labels to train on"),
        (lambda x: api.train(max_time=1), "need output"),
        (lambda x: api.finetune(network(), data="digits", resume=True, output="a.safetensors"), "cannot be rebuilt"),
        (lambda x: api.evaluate(3), "got int"),
        (lambda x: api.prune(network(), x, output="a.safetensors"), "micronet.save"),
        (lambda x: api.quantize(network(), data=[x[:, :1]], mode="ptq"), "does not accept"),
        (lambda x: api.inspect(network()), "must be a path"),
        (
            lambda x: api.export_onnx(network()),
            r"one with data=… \(and image_size if needed\), or pass an example input$",
        ),
        (lambda x: api.pack(network()), r"one with data=… \(and image_size if needed\)$"),
        (lambda x: api.calibrate(api.quantize(network()), [x]), "artifact.model"),
    ],
    ids=[
        "finetune",
        "evaluate",
        "labels",
        "max_time",
        "resume",
        "type",
        "build",
        "shape",
        "inspect",
        "example",
        "pack",
        "calibrate",
    ],
)
def test_the_api_refuses_what_would_have_no_effect(call, message):
    with pytest.raises(api.MicronetError, match=message):
        call(torch.rand(4, 3, 8, 8))


def test_networks_in_memory_are_no_files_and_stay_as_they_were(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = network().train()
    rows = api.compare([model, model], data="digits", image_size=32)
    assert [row.name for row in rows] == ["Sequential", "Sequential 2"]
    assert model.training
    assert api.evaluate(api.fuse(model), data="digits", image_size=32).name == "Sequential (bn-fuse)"
    binary = api.quantize(model, w_bits="binary", a_bits=8, first_last="same", data=[torch.rand(4, 3, 8, 8)])
    assert "distill" not in binary.history[-1].config


def test_paths_and_command_lines_in_errors_of_the_api_stay_as_they_are(tmp_path):
    for line in ("micronet import --data", "micronet quantize FLOAT.onnx --mode ptq", "export --target c"):
        text = f"recreate it with micronet train, or with {line} or --mode ptq"
        spelled = f'recreate it with micronet train, or with {line} or mode="ptq"'
        assert as_keywords(text, find("quantize")) == spelled
    with pytest.raises(api.MicronetError, match="no--such-file"):
        api.load(tmp_path / "no--such-file.safetensors")
    with pytest.raises(api.MicronetError, match="no--such-file"):
        api.prune(tmp_path / "no--such-file.safetensors")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["quantize", "--a-gain", 1], "--a-gain 1.0 only applies to --method dorefa"),
        (["finetune", "--temperature", 2], "--temperature has no effect without a teacher"),
        (["quantize", "--distill-weight", 0.9], "--distill-weight has no effect without a teacher"),
        (["prune", "--steps", 1, "--temperature", 2], "--temperature has no effect without a teacher"),
    ],
    ids=lambda case: case[-2] if isinstance(case, list) else "",
)
def test_settings_without_effect_are_refused(micronet, words, message):
    done = micronet(words[0], "a.safetensors", *words[1:])
    assert done.code == 2
    assert message in done.err


def test_a_teacher_that_goes_without_saying_takes_its_settings():
    find("quantize").configure({"w_bits": "binary", "temperature": 2.0})


def test_python_takes_lists_of_layers_and_widths_and_dicts_of_arguments():
    example = torch.rand(2, 3, 8, 8)
    first, last = (
        api.quantize(network(), include=["0", "5"], data=[example]),
        api.prune(network(), example, widths=[4]),
    )
    assert first.history[-1].config["include"] == "0,5"
    assert last.model[0].out_channels == 4
    assert api.import_model(model="nin", model_args={"width": 0.1}).spec.args["width"] == 0.1
    with pytest.raises(api.MicronetError, match=r"model_args can only hold JSON values \(.*dtype"):
        api.import_model(model="nin", model_args={"width": torch.float16})


def test_errors_of_recipes_name_keys(micronet, chain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.toml").write_text(
        f'[[stage]]\ncommand = "prune"\nartifact = "{chain / "float.safetensors"}"\npercent = 2.0\n'
    )
    done = micronet("run", "r.toml")
    assert done.code == 2
    assert "prune: percent is 2" in done.err
