import json
import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from micronet import registry
from micronet.errors import MicronetError
from micronet.evaluation.cost import count_macs
from micronet.models.build import ModelSpec, build_model, check_same_code, make_spec

# Counted from the original's networks: all parameters, multiply-accumulates at 3x32x32.
COUNTS = {
    "nin": (969_822, 222_486_528),
    "nin_3x3": (674_910, 146_989_056),
    "nin_gc": (591_390, 157_679_616),
    "resnet18": (11_173_962, 555_422_720),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_the_originals(name):
    model = build_model(ModelSpec(name))
    counted = sum(parameter.numel() for parameter in model.parameters()), count_macs(model, torch.zeros(1, 3, 32, 32))
    assert counted == COUNTS[name]


def test_the_originals_pruned_grouped_network_has_its_counts():
    model = build_model(ModelSpec("nin_gc", {"widths": [154, 162, 144, 304, 320, 320, 608, 584]}))
    assert sum(parameter.numel() for parameter in model.parameters()) == 222_994
    assert count_macs(model, torch.zeros(1, 3, 32, 32)) == 62_344_192


@pytest.mark.parametrize("name", registry.MODELS)
def test_every_network_takes_any_class_count_and_channels(name):
    args = {"num_classes": 7, "in_channels": 1, "width": 0.1}
    model = build_model(ModelSpec(name, args)).eval()
    size = 28 if name.startswith("lenet") else 24
    assert model(torch.zeros(2, 1, size, size)).shape == (2, 7)


@pytest.mark.parametrize("width", [0.05, 0.3, 0.77, 1.5])
def test_grouped_widths_stay_legal(width):
    model = build_model(ModelSpec("nin_gc", {"width": width})).eval()
    assert model(torch.zeros(1, 3, 16, 16)).shape == (1, 10)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("nim", {}, "unknown model 'nim'; allowed: nin"),
        ("torchvision:resnet19", {}, "allowed: resnet1"),
        ("efficientnet_b0", {}, "--model torchvision:efficientnet_b0"),
        ("nin", {"image_size": 4}, "--image-size"),
        ("nin", {"widths": [1, 2]}, "needs 8"),
        ("nin_gc", {"widths": [155, 162, 144, 304, 320, 320, 608, 584]}, "width 1 is 155"),
        ("lenet", {"image_size": 8}, "--image-size"),
        ("nin", {"depth": 3}, "could not be built with arguments"),
        ("torch.nn:LazyLinear", {"out_features": 3}, "has lazy layers, whose sizes are not known yet"),
    ],
)
def test_impossible_networks_are_one_clear_error(name, args, message):
    with pytest.raises(MicronetError, match=message):
        build_model(ModelSpec(name, args), trusted=True)


SOURCE = """from torch import nn
def make(classes=3):
    return nn.Sequential(nn.Flatten(), nn.Linear(12, classes))
"""


def test_a_users_file_runs_only_when_trusted(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(SOURCE)
    spec = make_spec(f"{file}:make", {"classes": 5})
    assert spec.source == SOURCE
    with pytest.raises(MicronetError, match="--trust-code"):
        build_model(spec)
    file.unlink()  # the recorded text is enough
    assert build_model(spec, trusted=True)(torch.zeros(1, 3, 2, 2)).shape == (1, 5)


def test_a_users_file_knows_its_place(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from os import path\nfrom torch import nn\nclass Net(nn.Module):\n    root = path.dirname(__file__)\n"
    )
    assert build_model(make_spec(f"{file}:Net"), trusted=True).root == str(tmp_path)


def test_changed_code_is_noticed(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(SOURCE)
    recorded = make_spec(f"{file}:make")
    check_same_code(make_spec(f"{file}:make"), recorded)
    file.write_text(SOURCE + "# changed\n")
    with pytest.raises(MicronetError, match="not the code"):
        check_same_code(make_spec(f"{file}:make"), recorded)


@pytest.mark.parametrize(
    ("source", "attribute", "message"),
    [
        ("1/0", "make", "ZeroDivisionError"),
        ("def (", "make", "SyntaxError"),
        ("from .sub import W", "make", r"uses relative imports; .*: --model \w+\.mine:make with PYTHONPATH=\S+$"),
        (SOURCE, "mak", "allowed: make$"),
        ("from pathlib import Path\ndef make(): ...", "mak", "allowed: make$"),
        ("def make(): return 3", "make", "expected a torch.nn.Module"),
    ],
)
def test_a_users_broken_file_is_one_clear_error(tmp_path, source, attribute, message):
    file = tmp_path / "mine.py"
    file.write_text(source)
    with pytest.raises(MicronetError, match=message):
        build_model(make_spec(f"{file}:{attribute}"), trusted=True)


def test_a_factory_may_import_its_neighbours_when_it_is_called(tmp_path):
    (tmp_path / "neighbour_of_mine.py").write_text("WIDTH = 12\n")
    file = tmp_path / "mine.py"
    file.write_text(
        "from torch import nn\ndef make():\n    from neighbour_of_mine import WIDTH\n    return nn.Linear(WIDTH, 2)\n"
    )
    assert build_model(make_spec(f"{file}:make"), trusted=True).in_features == 12


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("torchvision:resnet18", {"weights": "DEFAULT"}),  # a file must not choose a download
        ("nin_3x3", {"conv4_kernel": 5}),
        ("nin_gc", {"groups": [1] * 9}),
        ("lenet_bn", {"batch_norm": False}),
    ],
    ids=["torchvision", "nin_3x3", "nin_gc", "lenet_bn"],
)
def test_what_a_name_fixes_cannot_be_overridden(name, args):
    with pytest.raises(MicronetError, match=f"does not accept {next(iter(args))}"):
        build_model(ModelSpec(name, args))


def test_packages_that_build_networks_by_name_say_how_to_name_one(monkeypatch):
    package = ModuleType("zoo")
    package.create_model = lambda model_name, pretrained: nn.Linear(2, 2)
    monkeypatch.setitem(sys.modules, "zoo", package)
    with pytest.raises(MicronetError, match="--model zoo:create_model --model-args") as refused:
        build_model(ModelSpec("zoo:small"), trusted=True)
    args = json.loads(str(refused.value).partition("'")[2].rpartition("'")[0])
    assert isinstance(build_model(ModelSpec("zoo:create_model", args), trusted=True), nn.Linear)


def test_torchs_advice_to_the_networks_author_is_not_repeated_but_the_authors_warnings_are(tmp_path, recwarn):
    file = tmp_path / "net.py"
    file.write_text(
        "import warnings\nfrom torch import nn\n\ndef make():\n    warnings.warn('mine')\n"
        "    layer = nn.TransformerEncoderLayer(8, 2, 8, norm_first=True)\n"
        "    return nn.Sequential(nn.TransformerEncoder(layer, 1), nn.utils.weight_norm(nn.Linear(8, 8)))\n"
    )
    build_model(make_spec(f"{file}:make"), trusted=True)
    assert [str(each.message) for each in recwarn] == ["mine"]


def test_a_network_that_reads_its_weights_while_it_is_built_is_built():
    assert build_model(ModelSpec("torchvision:regnet_y_400mf")).stem is not None  # not on torch's meta device
    assert build_model(ModelSpec("torchvision:regnet_y_400mf", {"weights": None})).stem is not None  # what it is anyway
