"""``list``, and the completion of names in shells: every name of the registry, without importing what it names."""

import subprocess
import sys

import pytest

from micronet import registry
from micronet.recipe.list_names import KINDS, names_of
from micronet.recipe.reader import bundled

TABLES = {
    "models": registry.MODELS, "data": registry.DATA, "tasks": registry.TASKS, "schemes": registry.SCHEMES,
    "criteria": registry.CRITERIA, "stages": registry.STAGES, "runtimes": registry.ONNX_RUNTIMES,
    "targets": registry.TARGETS, "recipes": bundled(),
}  # fmt: skip
PACKAGES = [
    "torch", "torchvision", "numpy", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "safetensors", "PIL", "numba",
    "openvino", "ncnn", "matplotlib", "tensorrt_rtx", "tensorrt", "pycuda", "jinja2",
]  # fmt: skip
COMPLETED = {  # what is typed -> a name that it completes, and how many there are
    "micronet train --model resnet1": {"resnet18", "resnet101", "resnet152"},
    "micronet train --data cifar": {"cifar10", "cifar100"},
    "micronet train --task s": {"segmentation"},
    "micronet run dig": {"digits"},
    "micronet run x.toml --data fa": {"fashion-mnist"},
    "micronet export a.safetensors --target o": {"onnxruntime", "openvino"},
    "micronet compare a.onnx --runtime open": {"openvino"},
    "micronet list mo": {"models"},
    "micronet prune a.safetensors --criterion fp": {"fpgm"},
}


def test_list_has_every_name_with_a_line(micronet):
    told = micronet("list", "--json").json
    assert set(told) == set(TABLES) == set(KINDS)
    for kind, table in TABLES.items():
        assert list(told[kind])[: len(table)] == list(table) == names_of(kind)
        assert all(line and len(line.splitlines()) == 1 for line in told[kind].values()), kind
    assert micronet("list", "criteria", "--json").json == {"criteria": told["criteria"]}
    assert micronet("list", "models").out.startswith("models\n  nin  ")
    done = micronet("list", "model")
    assert done.code == 2 and "allowed: models" in done.err


@pytest.mark.parametrize("typed", COMPLETED)
def test_shells_complete_names(monkeypatch, capsys, typed):
    from micronet.cli.app import run

    monkeypatch.setenv("_MICRONET_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split()) - 1))
    monkeypatch.setattr("sys.argv", ["micronet"])
    assert run([]) == 0
    assert set(capsys.readouterr().out.split()) == COMPLETED[typed]


def test_finding_ones_way_and_completion_need_no_package_but_the_command_lines(tmp_path):
    """``doctor`` above all: it is what one runs where something is missing."""
    completions = "; ".join(
        f"os.environ.update(COMP_WORDS={typed!r}, COMP_CWORD='{len(typed.split()) - 1}'); assert run([]) == 0"
        for typed in COMPLETED
    )
    code = (
        f"import os, sys; sys.modules.update(dict.fromkeys({PACKAGES})); from micronet.cli.app import run; "
        "assert [run(words) for words in (['list'], ['doctor'], ['init', '--yes'])] == [0, 0, 0]; "
        f"sys.argv = ['micronet']; os.environ['_MICRONET_COMPLETE'] = 'complete_bash'; {completions}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "pip install torch" in done.stdout and [path.name for path in tmp_path.iterdir()] == ["recipe.toml"]
