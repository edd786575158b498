"""The Python API, a recipe and the command line give identical files, for a network of the user's own."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import micronet as api
from micronet import registry

NET = """
from torch import nn
from torch.nn import functional as F


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = F.relu(self.norm(self.first(F.max_pool2d(x, 2))))
        x = F.relu(self.second(x) + x)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))
"""
RECIPE = """
[[stage]]
command = "import"
name = "net"
model = "net.py:Net"
data = "digits"

[[stage]]
command = "prune"
name = "pruned"
model = "net.py:Net"
percent = 0.5
criterion = "l2"

[[stage]]
command = "quantize"
name = "int8"
artifact = "pruned"
trust_code = true
mode = "ptq"
calib_batches = 2

[[stage]]
command = "export-onnx"
name = "exported"
artifact = "int8"
output = "int8.onnx"
trust_code = true

[[stage]]
command = "compare"
files = ["net", "int8", "exported"]
trust_code = true
limit = 100
"""
MADE = ("net.safetensors", "pruned.safetensors", "int8.safetensors", "int8.onnx")


def by_api():
    net = api.import_model(model="net.py:Net", data="digits", output="out/net.safetensors")
    pruned = api.prune(net, percent=0.5, criterion="l2", output="out/pruned.safetensors")
    int8 = api.quantize(pruned, mode="ptq", calib_batches=2, output="out/int8.safetensors")
    api.export_onnx(int8, output="out/int8.onnx")
    return [(row.name, row.accuracy, row.size_bytes) for row in api.compare([net, int8, "out/int8.onnx"], limit=100)]


def by_commands(micronet):
    net, pruned, int8, onnx = (f"out/{name}" for name in MADE)
    for arguments in (
        ["import", "--model", "net.py:Net", "--data", "digits", "-o", net],
        ["prune", net, "--model", "net.py:Net", "--percent", 0.5, "--criterion", "l2", "-o", pruned],
        ["quantize", pruned, "--trust-code", "--mode", "ptq", "--calib-batches", 2, "-o", int8],
        ["export-onnx", int8, "--trust-code", "-o", onnx],
    ):
        done = micronet(*arguments)
        assert done.code == 0, done.err
    return micronet("compare", net, int8, onnx, "--trust-code", "--limit", 100, "--json")


def by_recipe(micronet):
    Path("r.toml").write_text(RECIPE)
    return micronet("run", "r.toml", "-o", "out", "--json")


def test_all_three_write_identical_files(micronet, tmp_path, monkeypatch):
    contents, accuracies = [], []
    for number, way in enumerate((by_api, by_commands, by_recipe)):
        folder = tmp_path / str(number)
        (folder / "out").mkdir(parents=True)
        (folder / "net.py").write_text(NET)
        monkeypatch.chdir(folder)
        if way is by_api:
            accuracies.append([accuracy for _, accuracy, _ in way()])
        else:
            done = way(micronet)
            assert done.code == 0, done.err
            rows = done.json["rows"] if isinstance(done.json, dict) else done.json
            accuracies.append([row["accuracy"] for row in rows])
        contents.append({name: (folder / "out" / name).read_bytes() for name in MADE})
    assert contents[0] == contents[1] == contents[2]
    assert accuracies[0] == accuracies[1] == accuracies[2]


SCRIPT = """
import micronet

net = micronet.import_model(model="net.py:Net", data="digits")
pruned = micronet.prune(net, percent=0.5, criterion="l2")
int8 = micronet.quantize(pruned, mode="ptq", output="int8.safetensors")
print(int8.left_float)
micronet.export_onnx(int8, output="int8.onnx")
for row in micronet.compare([net, int8, "int8.onnx"]):
    print(row.name, row.accuracy, row.size_bytes, row.latency_ms)
"""


@pytest.mark.slow  # mypy reads torch's types first, for 20 seconds
def test_mypy_finds_no_any_in_a_users_script(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "mypy.ini").write_text("[mypy]\nstrict = True\ndisallow_any_expr = True\nfollow_imports = silent\n")
    command = [sys.executable, "-m", "mypy", "script.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", registry.API)
def test_the_documentation_speaks_python_and_explains_every_keyword_once(name):
    function = getattr(api, name)
    assert not re.search(r"(?<!``micronet )--[a-z]|exit code|Exit with", function.__doc__)
    args = function.__doc__.partition("Args:")[2].partition("\n\n")[0]
    items = [" ".join(item.split()).split(": ", 1) for item in re.split(r"\n    (?=\S)", args)[1:]]
    for keyword in inspect.signature(function).parameters:
        (text,) = [text for names, text in items if keyword in names.split(", ")]
        if home := re.fullmatch(r"As in ``(\w+)``\.", text):
            assert re.search(rf"\n    {keyword}: (?!As in)", getattr(api, home[1]).__doc__), keyword
