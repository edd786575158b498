"""Bringing foreign networks in: their tensors from a file, and the original micronet's checkpoints by their shapes.

Only tensors are read (``weights_only``): a pickle that wants to run code is refused.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from micronet.artifact.artifact import Artifact, load_state
from micronet.artifact.history import StageRecord
from micronet.data.dataset import IMAGENET, DataSpec
from micronet.errors import MicronetError
from micronet.models.build import TORCHVISION, build_model, make_spec

_WRAPPERS = ("state_dict", "model_state_dict", "model")
_ORIGINALS = ("nin", "nin_3x3", "nin_gc")


def import_model(name: str, args: dict[str, Any], weights: Path | None) -> Artifact:
    """Return the artifact of a network, filled from a file of weights where one is given.

    Raises MicronetError where the network cannot be built or the tensors do not fit it.
    """
    spec = make_spec(name, args)
    tensors = read_weights(weights) if weights else None
    if tensors is not None and name in _ORIGINALS:
        spec = make_spec(name, {**_widths(name, tensors), **args})
    model = build_model(spec, trusted=True)
    if tensors is not None:
        if name in _ORIGINALS and tensors.keys() != model.state_dict().keys():
            tensors = _by_position(tensors, model.state_dict())
        load_state(model, tensors, str(weights))
    record = StageRecord("import", {"model": name, "weights": str(weights) if weights else None})
    return Artifact(model, spec, [record])


def preprocessing(name: str, mean: str | None, std: str | None) -> DataSpec:
    """Return what a network expects of its input: given, or ImageNet's for torchvision's, or not known yet."""
    if (mean is None) != (std is None):
        raise MicronetError("--mean and --std go together; give both")
    if mean is not None and std is not None:
        means, stds = _numbers(mean, "--mean"), _numbers(std, "--std")
        if len(means) != len(stds) or min(stds) <= 0:
            raise MicronetError("--mean and --std need one number a channel each, and every --std above 0")
        return DataSpec(mean=means, std=stds)
    return DataSpec(**IMAGENET) if name.startswith(TORCHVISION) else DataSpec()  # type: ignore[arg-type]


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict from .safetensors or a PyTorch file, unwrapped, without ``module.`` prefixes."""
    if not path.is_file():
        raise MicronetError(f"--weights {path}: there is no such file")
    try:
        held = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (SafetensorError, OSError) as error:
        raise MicronetError(f"--weights {path} cannot be read: {error}") from error
    except Exception as error:  # torch raises many kinds; each means a damaged file or a pickle with code in it
        raise MicronetError(
            f"--weights {path} is damaged or holds more than tensors (whole pickled models are never loaded); "
            "save it again with torch.save(model.state_dict(), path)"
        ) from error
    for wrapper in _WRAPPERS:
        if isinstance(held, dict) and isinstance(held.get(wrapper), dict):
            held = held[wrapper]
    if not isinstance(held, dict) or not held or not all(isinstance(value, Tensor) for value in held.values()):
        raise MicronetError(f"--weights {path} holds no state dict (names -> tensors)")
    return {str(name).removeprefix("module."): tensor for name, tensor in held.items()}


def _widths(name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return the arguments that a nin's convolutions show: widths, classes, channels, kernel of the fourth."""
    convolutions = [tensor for tensor in tensors.values() if tensor.dim() == 4]
    if len(convolutions) != 9:
        raise MicronetError(f"the weights hold {len(convolutions)} convolutions; {name} has 9")
    *widths, classes = [tensor.shape[0] for tensor in convolutions]
    found = {"widths": widths, "num_classes": classes, "in_channels": convolutions[0].shape[1]}
    return {**found, "conv4_kernel": convolutions[3].shape[-1]} if name == "nin" else found


def _by_position(tensors: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the original's tensors to ours: the n-th convolution is the n-th, the n-th batch norm too.

    Its names changed over the years (tnn_bin_model, quant_model, …); the order of its layers never did.
    """
    ours, theirs = _layers(own), _layers(tensors)
    if [len(group) for group in ours] != [len(group) for group in theirs]:
        raise MicronetError("the weights do not have the layers of the original's network")
    renamed = {}
    for ours_of_kind, theirs_of_kind in zip(ours, theirs, strict=True):
        for mine, foreign in zip(ours_of_kind, theirs_of_kind, strict=True):
            for name in own:
                owner, _, leaf = name.rpartition(".")
                if owner == mine and f"{foreign}.{leaf}" in tensors:
                    renamed[name] = tensors[f"{foreign}.{leaf}"]
                elif owner == mine and leaf == "num_batches_tracked":
                    renamed[name] = own[name]
    return renamed


def _layers(tensors: dict[str, Tensor]) -> tuple[list[str], list[str]]:
    """Return the names of the convolutions and of the batch norms, in the order they are stored."""
    convolutions = [name.rpartition(".")[0] for name, tensor in tensors.items() if tensor.dim() == 4]
    norms = [name.rpartition(".")[0] for name in tensors if name.endswith("running_mean")]
    return convolutions, norms


def _numbers(text: str, name: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise MicronetError(f"{name} is {text!r}; expected numbers such as 0.485,0.456,0.406") from error
