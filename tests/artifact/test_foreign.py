import argparse
import collections
import functools
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from micronet.artifact import foreign, pickles
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


def _save(path, pickle, numbers=b""):
    """Write a checkpoint with a pickle written by hand."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + pickle)
        archive.writestr("a/version", "3\n")
        archive.writestr("a/data/0", numbers)


_NESTED = b"X\x01\0\0\0a" + b"q\x07h\x07\x86" * 60  # pairs in pairs: 2**60 letters
_STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\n%bX\x03\0\0\0cpuK\x01tQ"
_FIRST = _STORAGE % b"X\x01\0\0\x000"
_TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n(%bK\x00%b%b\x89Nt"
_ONE = _TENSOR % (_FIRST, b"K\x01\x85", b"K\x01\x85")
_MANY = _TENSOR % (_FIRST, b"\x8a\x06\0\0\0\0\0\x01\x85", b"K\x00\x85") + b"R"  # 2**40 values
_ATTACKS = {
    "module": _NESTED + b"X\x01\0\0\0b\x93.", "class": b"X\x01\0\0\0b" + _NESTED + b"\x93.",
    "key": _STORAGE % _NESTED + b".", "storage": _NESTED + b"Q.", "dict": b"}" + _NESTED + b"Ns.",
    "list": b"]" + _NESTED + b"a.", "call": _NESTED + b")R.", "arguments": b"ca\nb\n" + _NESTED + b"R.",
    "tensor": _TENSOR % (_NESTED, b")", b")") + b"R.",
    "shape": _TENSOR % (_FIRST, _NESTED, _NESTED) + b"R.",
    "ordered": b"ccollections\nOrderedDict\n(]" + _NESTED + b"atR.",
    "repeated": _MANY + b"Q.", "unpacked": b"ctorch._utils\n_rebuild_tensor_v2\n" + _MANY + b"R.",
    "itself": b"}q\x00X\x05\0\0\0modelh\x00s.", "in_list": b"]q\x00h\x00a.",
}  # fmt: skip


@pytest.mark.parametrize("pickle", _ATTACKS.values(), ids=_ATTACKS.keys())
def test_a_few_bytes_that_would_take_forever_or_all_of_the_memory_are_refused(pickle, tmp_path):
    _save(tmp_path / "a.ckpt", pickle, bytes(4))
    with pytest.raises(MicronetError, match="--weights"):
        read_weights(tmp_path / "a.ckpt")


def test_a_long_name_or_shape_does_not_take_memory_again_and_again(tmp_path):
    """It would take the square of the file's size."""
    name = b"X" + (1 << 20).to_bytes(4, "little") + b"a" * (1 << 20)
    _save(tmp_path / "a.ckpt", name + b"q\x00h\x00\x93" + b"h\x00h\x00\x93" * 200_000 + b".")
    with pytest.raises(MicronetError, match="names a class by an object, or at length"):
        read_weights(tmp_path / "a.ckpt")


def test_objects_that_take_more_than_the_free_memory_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(pickles, "available_memory", lambda: 100_000)
    _save(tmp_path / "a.ckpt", b"}" * 1000 + b".")
    with pytest.raises(MicronetError, match="need more memory than is free"):
        read_weights(tmp_path / "a.ckpt")


def test_widths_that_a_file_does_not_hold_are_refused(tmp_path):
    """The convolutions share a few values; a network of these widths takes gigabytes."""
    values = torch.zeros(4000, 1, 1, 1)
    torch.save({f"{index}.weight": values for index in range(9)}, tmp_path / "a.pth")
    with pytest.raises(MicronetError, match="for which its file is too small"):
        import_model("nin", {}, tmp_path / "a.pth")


@pytest.mark.parametrize("beside", [None, Held()], ids=["alone", "object"])
@pytest.mark.parametrize("new", [True, False], ids=["zip", "old"])
def test_all_kinds_of_tensors_are_read_as_torch_reads_them(new, beside, tmp_path):
    noted, parameter, values = torch.rand(2), nn.Parameter(torch.rand(3)), torch.arange(-3.0, 4)
    noted.note = parameter.note = "kept by torch"
    dtypes = "uint8 int8 int16 int32 int64 bool float16 bfloat16 float64 uint16 uint32 uint64 float8_e4m3fn float8_e5m2"
    tensors = {
        **{name: values.abs().to(getattr(torch, name)) for name in dtypes.split()},
        "noted": noted, "parameter": parameter, "buffer": nn.Buffer(torch.rand(2)), "empty": torch.empty(0, 3),
        "negative": torch.rand(2, 3, dtype=torch.complex64).conj().imag[1:], "trained": nn.Parameter(values)[::2],
    }  # fmt: skip
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": tensors, "beside": beside}, path, _use_new_zipfile_serialization=new)
    read = read_weights(path)
    assert read.keys() == tensors.keys()
    assert all(read[name].dtype == tensor.dtype for name, tensor in tensors.items())
    assert all(torch.equal(read[name].double(), tensor.double()) for name, tensor in tensors.items())


class Scaled(torch.Tensor):
    """A tensor whose values are others than its numbers."""


@pytest.mark.parametrize("beside", [None, Held()], ids=["alone", "object"])
@pytest.mark.parametrize(
    ("tensor", "why"),
    [
        (torch.eye(2).to_sparse(), "weight is sparse; convert"),
        (torch.empty(2, device="meta"), r"weight is without values \(on the meta device\); convert"),
        (torch.ones(2, dtype=torch.complex64).conj(), "weight is complex; convert"),
        (torch.ones(2).as_subclass(Scaled), r"the class \S*test_foreign.Scaled in the place of weights"),
    ],
    ids=["sparse", "meta", "complex", "class"],
)
def test_tensors_that_are_not_read_are_named(tensor, why, beside, tmp_path):
    torch.save({"state_dict": {"weight": tensor}, "beside": beside}, tmp_path / "a.ckpt")
    with pytest.raises(MicronetError, match=why):
        read_weights(tmp_path / "a.ckpt")


def test_metadata_of_a_tensor_that_are_unknown_are_refused(tmp_path):
    metadata = b"}X\x06\0\0\0scaled\x88s"
    tensor = _ONE.removesuffix(b"t") + metadata + b"tR"
    _save(tmp_path / "a.ckpt", b"}X\x06\0\0\0weight" + tensor + b"s.", bytes(4))
    with pytest.raises(MicronetError, match="a tensor with metadata that are not read"):
        read_weights(tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-40], lambda data: data.replace(b"\x03" + bytes(7), b"\xff" * 8)]
)
def test_files_of_old_torch_that_end_early_or_count_wrongly_are_refused(damage, tmp_path):
    torch.save({"weight": torch.ones(100)[:3].clone()}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "a.pth").write_bytes(damage((tmp_path / "a.pth").read_bytes()))
    with pytest.raises(MicronetError, match=r"a\.pth (cannot be read: it ends early|is corrupted)"):
        read_weights(tmp_path / "a.pth")


def test_ordered_dicts_of_python_2_are_read(tmp_path):
    tensor = _ONE + b"R"
    _save(tmp_path / "a.ckpt", b"ccollections\nOrderedDict\n]](U\x06weight" + tensor + b"ea\x85R.", bytes(4))
    assert read_weights(tmp_path / "a.ckpt") == {"weight": torch.zeros(1)}
