"""The artifact: a network with its history, in the one file that every command reads and writes.

Loading builds the network by its name, replays the structure of each recorded stage and then loads the tensors, all of
which must match. Nothing is pickled.
"""

import hashlib
import json
import math
import platform
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from micronet import registry
from micronet.artifact.header import KEY, Header, StageRecord, read_header
from micronet.core.files import write_bytes
from micronet.core.machine import version as micronet_version
from micronet.core.tensor_file import Table, check_tensors, seal
from micronet.data.spec import DataSpec
from micronet.errors import FailedError, MicronetError, first_line, unknown
from micronet.models.build import ModelSpec, build_model, check_same_code, make_spec
from micronet.models.calling import take_in_order
from micronet.models.finite import check_finite

ROOM, SMALL_BYTES = 4, 2**26  # tensors that several modules share are stored once, some buffers never
_PACKAGES = ("torch", "torchvision", "numpy", "onnx", "onnxruntime")


@dataclass(frozen=True)
class Artifact:
    """A network, how to build it, what was done to it and what was measured.

    Attributes:
        model: The network.
        spec: The name of its factory, with the arguments.
        history: One record per stage: its name, its settings and the structure that it gave the network.
        metrics: What the last training measured: ``test_accuracy``, ``validation_accuracy``, losses (0..1, nats).
        data: The data set and its preprocessing, in JSON values.
        seed: The seed of the last training.
    """

    model: nn.Module
    spec: ModelSpec
    history: list[StageRecord] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] | None = None
    seed: int | None = None

    @property
    def left_float(self) -> dict[str, str]:
        """The layers that quantization left float -> why."""
        return {name: why for record in self.history for name, why in record.left_float.items()}

    def after(self, record: StageRecord, **changes: Any) -> "Artifact":
        """Return the artifact with a record added to its history and other fields replaced."""
        return replace(self, history=[*self.history, record], **changes)


def save(artifact: Artifact, path: Path) -> None:
    """Write an artifact; raise FailedError if that fails or a tensor holds NaN or infinity.

    An earlier file at ``path`` is then unchanged.
    """
    check_finite(artifact.model, "the network")
    _check_metrics(artifact.metrics, "the network")
    tensors, tied = _untie(artifact.model.state_dict())
    spec, made = artifact.spec.to_json(), versions()
    header = Header(spec, artifact.history, artifact.metrics, artifact.data, artifact.seed, versions=made, tied=tied)
    write_tensors(path, tensors, KEY, header.to_json())


def load(path: Path, model: str | nn.Module | None = None, *, trust_code: bool = False) -> Artifact:
    """Read an artifact.

    Args:
        model: The user's code (``path/to/file.py:factory``), which may then run; or a new network to load into.
        trust_code: Whether code recorded in the file may run.

    Raises:
        MicronetError: The file is damaged or not an artifact, its code is not trusted, or a tensor does not fit.
        FailedError: A tensor holds NaN or infinity.
    """
    header, table = read_header(path)
    spec = ModelSpec.from_json(header.model)
    network = _build_network(spec, model, trust_code, _most_bytes(header, table))
    take_in_order(network, DataSpec.from_json(header.data).inputs)
    network = _replay(network, header.history, str(path))
    tensors = read_tensors(path, table)
    tensors.update({name: tensors[stored] for name, stored in header.tied.items() if stored in tensors})
    load_state(network, tensors, str(path))
    check_finite(network, str(path))
    _check_metrics(header.metrics, str(path))
    return Artifact(network, spec, header.history, header.metrics, header.data, header.seed)


def load_state(model: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Load the tensors of a file, ``source``, into a model; raise MicronetError unless they fit (``_check_fit``).

    The file may hold a tensor that several names share under one of them.
    """
    own, state = model.state_dict(), OrderedDict(tensors)
    for pair in _untie(own)[1].items():
        for name, other in (pair, pair[::-1]):
            if name not in state and other in state:
                state[name] = state[other]
    _check_fit(own, state, source)
    state._metadata = own._metadata  # type: ignore[attr-defined]  # torch has no public way to pass module versions on
    model.load_state_dict(state)


def check_builds(artifact: Artifact) -> None:
    """Build an artifact's network by its spec and history; raise MicronetError if that gives another network."""
    name = artifact.spec.name
    try:
        with torch.random.fork_rng(devices=[]):
            built = build_model(artifact.spec, trusted=True)
            take_in_order(built, DataSpec.from_json(artifact.data).inputs)
            built = _replay(built, artifact.history, name)
        _check_fit(built.state_dict(), artifact.model.state_dict(), "the network to be saved")
    except MicronetError as error:
        raise MicronetError(
            f"build={name!r} builds a different network ({error}); pass the factory that created this network as build"
        ) from error


def read_tensors(path: Path, table: Table) -> dict[str, Tensor]:
    """Read a tensor file's tensors; raise MicronetError if they are damaged."""
    check_tensors(path, table)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise MicronetError(f"{path} is corrupted ({error}); copy it again or recreate it") from error


def write_tensors(path: Path, tensors: dict[str, Tensor], key: str, header: dict[str, Any]) -> None:
    """Write a tensor file: tensors, a JSON header under ``key`` and checksums.

    Raises FailedError if that fails; an earlier file at ``path`` is then unchanged.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(path, *seal(save_tensors(contiguous, {key: json.dumps(header, sort_keys=True)})))


def tensor_bytes(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[bytes]:
    """Yield the bytes of named tensors, with their names and shapes, to be hashed."""
    for name, tensor in tensors:
        yield f"{name} {tuple(tensor.shape)}".encode()
        yield tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def weights_hash(model: nn.Module) -> str:
    """Return the SHA-256 of a network's tensors in hexadecimal."""
    digest = hashlib.sha256()
    for part in tensor_bytes(sorted(model.state_dict().items())):
        digest.update(part)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that affect a model's results."""
    found = {"python": platform.python_version(), "micronet": micronet_version()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _most_bytes(header: Header, table: Table) -> int | None:
    """Return a bound on the size of the network for whose tensors a file has room; None if stages have cut it."""
    if any(record.stage == "prune" for record in header.history):
        return None
    return ROOM * sum(tensor.size_bytes for tensor in table.tensors.values()) + SMALL_BYTES


def _build_network(
    spec: ModelSpec, model: str | nn.Module | None, trust_code: bool, most_bytes: int | None
) -> nn.Module:
    if isinstance(model, nn.Module):
        return model
    if isinstance(model, type):
        raise MicronetError(f"model is the class {model.__name__}; pass a network, {model.__name__}(...), or its name")
    if model is None:
        return build_model(spec, trusted=trust_code, most_bytes=most_bytes)
    if spec.runs_user_code:
        check_same_code(make_spec(model), spec)
        return build_model(replace(spec, name=model), trusted=True)  # the file may have moved; its text is the same
    if model != spec.name:
        raise MicronetError(f"this artifact contains a {spec.name} network, not {model}; drop --model")
    return build_model(spec, most_bytes=most_bytes)


def _replay(network: nn.Module, history: list[StageRecord], source: str) -> nn.Module:
    """Return the network with the structure that its history records."""
    for record in history:
        if record.stage not in registry.STAGES:
            raise MicronetError(f"{source}: {unknown('stage', record.stage, registry.STAGES)}")
        stage = registry.load_object(registry.STAGES[record.stage].stage)
        try:
            network = stage.restore(network, record)
        except (KeyError, AttributeError, TypeError, ValueError, IndexError, RuntimeError) as error:
            raise MicronetError(
                f"{source} is corrupted: its {record.stage} record does not match the network ({first_line(error)}); "
                "recreate it"
            ) from error
    return network


def _check_fit(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise MicronetError unless tensors have the names and shapes of a network's own, and its kinds of numbers.

    Floats of another width are converted, and so are integers and booleans, and whole floats of averaged checkpoints
    in place of integers.
    """
    problems = {
        "missing": [name for name in own if name not in tensors],
        "unexpected": [name for name in tensors if name not in own],
        "with the wrong shape": [
            f"{name} is {tuple(tensors[name].shape)}, expected {tuple(own[name].shape)}"
            for name in own
            if name in tensors and tensors[name].shape != own[name].shape
        ],
        "with the wrong type": [
            f"{name} is {tensors[name].dtype}, expected {own[name].dtype}".replace("torch.", "")
            for name in own
            if name in tensors and not _converts(tensors[name], own[name].dtype)
        ],
    }
    found = [
        f"{len(names)} {problem} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for problem, names in problems.items()
        if names
    ]
    if found:
        raise MicronetError(f"the tensors in {source} do not match the network: {'; '.join(found)}")


def _converts(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Return True if a tensor is of the same kind of numbers as a type, or its floats are whole and fit in integers."""
    if tensor.is_floating_point() and not (dtype.is_floating_point or dtype.is_complex):
        values = tensor.double()
        return torch.equal(values.to(dtype).double(), values)
    return (tensor.is_floating_point(), tensor.is_complex()) == (dtype.is_floating_point, dtype.is_complex)


def _check_metrics(metrics: Mapping[str, Any], source: str) -> None:
    """Raise FailedError if a metric is NaN or infinite."""
    for name, value in metrics.items():
        if any(isinstance(each, float) and not math.isfinite(each) for each in tree_leaves(value)):
            raise FailedError(f"{source} has {name} {value}; train it again")


def _untie(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the distinct tensors, and for each tied name the name that its tensor is stored under."""
    stored: dict[tuple[Any, ...], str] = {}
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    for name, tensor in state.items():
        memory = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and memory in stored:
            tied[name] = stored[memory]
        else:
            stored[memory], tensors[name] = name, tensor
    return tensors, tied
