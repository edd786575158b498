import argparse
import collections
import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from micronet.artifact import foreign
from micronet.artifact.foreign import import_model, read_weights
from micronet.errors import MicronetError


def test_initial_weights_follow_from_the_seed_alone():
    first, other = (import_model("lenet", {"width": 0.1}, None, seed=seed).model.state_dict() for seed in (1, 2))
    torch.rand(3)
    again = import_model("lenet", {"width": 0.1}, None).model.state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


def test_checkpoints_averaged_in_floats_load_as_they_do_in_torch(tmp_path):
    own = import_model("nin", {"width": 0.1}, None).model.state_dict()
    torch.save({name: tensor.float() + 3 for name, tensor in own.items()}, tmp_path / "w.pth")
    loaded = import_model("nin", {}, tmp_path / "w.pth").model.state_dict()
    assert all(torch.equal(loaded[name], own[name] + 3) and loaded[name].dtype == own[name].dtype for name in own)


def test_weights_of_a_compiled_network_load_as_those_of_the_network(tmp_path):
    own = import_model("nin", {"width": 0.1}, None).model.state_dict()
    torch.save({"state_dict": {f"_orig_mod.module.{name}": tensor for name, tensor in own.items()}}, tmp_path / "w.pth")
    loaded = import_model("nin", {}, tmp_path / "w.pth").model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in own.items())


def test_weights_of_a_module_around_the_network_load_as_those_of_the_network(tmp_path):
    own = import_model("lenet", {"width": 0.1}, None).model.state_dict()
    held = {"loss.weight": torch.ones(10), **{f"model.net.{name}": tensor for name, tensor in own.items()}}
    torch.save({"epoch": 3, "state_dict": held}, tmp_path / "w.ckpt")
    loaded = import_model("lenet", {"width": 0.1}, tmp_path / "w.ckpt").model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in own.items())
    torch.save({**held, **{f"ema.{name}": tensor for name, tensor in own.items()}}, tmp_path / "w.ckpt")
    with pytest.raises(MicronetError, match=r"has the network several times \(model.net., ema.\); save one"):
        import_model("lenet", {"width": 0.1}, tmp_path / "w.ckpt")


def test_weights_larger_than_the_free_memory_are_refused_for_that(tmp_path, monkeypatch):
    torch.save({"a": torch.zeros(2)}, tmp_path / "w.pth")
    monkeypatch.setattr(foreign, "available_memory", lambda: 100)
    with pytest.raises(MicronetError, match=r"has 0 MiB, but 0 MiB of memory are free"):
        import_model("nin", {}, tmp_path / "w.pth")


class Held(dict):
    """An object of a class that torch does not read, such as Lightning's AttributeDict; ``made`` counts its calls."""

    made = 0

    def __init__(self, *args):
        Held.made += 1
        super().__init__(*args)

    def __reduce__(self):
        return Held, ({},), {"lr": 0.1}, None, iter({"depth": 3}.items())

    def __setstate__(self, state):
        Held.made += 1


class Opens:
    """An attack: code that runs if the file is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


class HeldList(list):
    """A list of a class of its own, such as OmegaConf's."""


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_the_weights_of_a_checkpoint_are_read_without_its_other_objects(tmp_path, protocol):
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Conv1d(4, 2, 1, dtype=torch.bfloat16))
    model.register_buffer("part", torch.arange(12.0).view(3, 4).t()[1:])  # shares a larger storage
    model.register_buffer("same", model.part)
    beside = {
        "hyper_parameters": Held(), "namespace": argparse.Namespace(lr=0.1, depths=[1, 2]), "code": eval,
        "optimizer": functools.partial(torch.optim.SGD, lr=0.1),
        "callbacks": {"ModelCheckpoint": {"path": Path("best.ckpt"), "kind": Held}}, "loops": {"epoch": 1},
        "attack": Opens(tmp_path / "ran"), "list": HeldList([1, 2]), "sets": [{1, 2}, frozenset({3})], "bytes": b"a",
        "numbers": [True, None, 1 << 70, -3, 0.5, 1j, torch.Size([1]), torch.float16, torch.device("cpu")],
        "arrays": [np.float64(0.5), np.arange(3)], "deque": collections.deque([1]), "words": "\u00e9" * 300,
    }  # fmt: skip
    torch.save({"state_dict": model.state_dict(), **beside}, tmp_path / "a.ckpt", pickle_protocol=protocol)
    made = Held.made
    read = read_weights(tmp_path / "a.ckpt")
    assert read.keys() == model.state_dict().keys() and Held.made == made
    assert not (tmp_path / "ran").exists()
    assert all(torch.equal(read[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "content",
    [nn.Linear(2, 3), Held(), {"state_dict": Held()}, {"state_dict": {"weight": Held()}}, {"weight": Held()}],
    ids=["network", "object", "state", "tensor", "bare"],
)
def test_objects_in_place_of_weights_are_refused(content, tmp_path):
    torch.save(content, tmp_path / "a.ckpt")
    allowed = set(torch.serialization.get_safe_globals())
    name = "Linear" if isinstance(content, nn.Module) else "Held"
    with pytest.raises(MicronetError, match=rf"\.{name} in .*torch\.save\(model\.state_dict\(\), path\)"):
        read_weights(tmp_path / "a.ckpt")
    assert set(torch.serialization.get_safe_globals()) == allowed


def test_a_tensor_that_repeats_what_is_stored_is_refused(tmp_path):
    """A few bytes that would take all of the memory."""
    torch.save({"weight": torch.zeros(1).expand(1 << 40)}, tmp_path / "a.ckpt")
    with pytest.raises(MicronetError, match="weight has more values than the file holds"):
        read_weights(tmp_path / "a.ckpt")
