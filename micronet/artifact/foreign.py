"""Importing networks: weights from a file, including checkpoints of the original micronet.

Only tensors are read, as ``artifact.pickles`` says; no code of a file runs.
"""

import warnings
import zipfile
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from micronet.artifact.artifact import Artifact, load_state
from micronet.artifact.file_kinds import what_it_is
from micronet.artifact.header import StageRecord
from micronet.artifact.pickles import CheckpointError, Unread, read_checkpoint
from micronet.core.machine import available_memory
from micronet.data.dataset import IMAGENET, DataSpec
from micronet.errors import MicronetError, count
from micronet.models.build import TORCHVISION, build_model, make_spec
from micronet.models.finite import check_finite

SAVE_AGAIN = "save it again with torch.save(model.state_dict(), path)"
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_KINDS = {  # of tensors that are not read, by what makes them
    "torch._utils._rebuild_sparse_tensor": "sparse",
    "torch._utils._rebuild_qtensor": "quantized",
    "torch._utils._rebuild_nested_tensor": "nested",
    "torch._utils._rebuild_meta_tensor_no_storage": "without values (on the meta device)",
}
_ORIGINALS = ("nin", "nin_3x3", "nin_gc")


def import_model(name: str, args: dict[str, Any], weights: Path | None, seed: int = 1) -> Artifact:
    """Build a network and return it as an artifact.

    Args:
        weights: A file of tensors to load, or None to keep the initial weights.
        seed: Determines the initial weights.

    Raises:
        MicronetError: The network cannot be built, or the tensors do not fit it.
    """
    spec = make_spec(name, args)
    tensors, most_bytes = read_weights(weights) if weights else None, None
    if tensors is not None and name in _ORIGINALS:
        spec = make_spec(name, {**_widths(name, tensors), **args})
        most_bytes = None if args else _most_bytes(tensors)
    torch.manual_seed(seed)
    model = build_model(spec, trusted=True, most_bytes=most_bytes)
    if tensors is not None:
        own = model.state_dict()
        tensors = _of_network(tensors, own, weights)
        if name in _ORIGINALS and tensors.keys() != own.keys():
            tensors = _by_position(tensors, own)
        load_state(model, tensors, str(weights))
        check_finite(model, f"--weights {weights}")
    record = StageRecord("import", {"model": name, "weights": weights.name if weights else None})  # no folder
    return Artifact(model, spec, [record])


def preprocessing(name: str, mean: str | None, std: str | None) -> DataSpec:
    """Return the preprocessing that a network expects: the given one, ImageNet's for torchvision, or unknown."""
    if (mean is None) != (std is None):
        raise MicronetError("--mean and --std must be used together; pass both")
    if mean is None or std is None:
        return DataSpec(**IMAGENET) if name.startswith(TORCHVISION) else DataSpec()  # type: ignore[arg-type]
    means, stds = _numbers(mean, "--mean"), _numbers(std, "--std")
    if len(means) != len(stds) or min(stds) <= 0:
        raise MicronetError("--mean and --std take one number per channel, and every value of --std must be positive")
    return DataSpec(mean=means, std=stds)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict from a .safetensors or PyTorch file, without wrapping dicts and ``module.`` prefixes."""
    if not path.is_file():
        missing = "is a folder; pass a file in it" if path.is_dir() else "does not exist; check the path"
        raise MicronetError(f"--weights {path} {missing}")
    if (other := what_it_is(path)) is not None:
        raise MicronetError(f"--weights {path} {other}")
    try:
        with warnings.catch_warnings(action="ignore"):
            loaded = load_file(path) if path.suffix == ".safetensors" else _load_pickle(path)
    except MicronetError:
        raise
    except (SafetensorError, OSError) as error:
        raise MicronetError(f"--weights {path} cannot be read: {error}") from error
    except Exception as error:  # torch raises many types; all mean a damaged file or a pickle with code
        raise MicronetError(
            f"--weights {path} is corrupted or contains objects other than tensors (pickled models are not supported); "
            + SAVE_AGAIN
        ) from error
    for wrapper in _WRAPPERS:
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    if not isinstance(loaded, dict) or not loaded or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise MicronetError(f"--weights {path}{_why_no_state(loaded)}")
    for name, tensor in loaded.items():
        kind = "sparse" if tensor.layout != torch.strided else "quantized" if tensor.is_quantized else None
        kind = "complex" if tensor.is_complex() else kind
        if kind is not None:
            raise MicronetError(f"--weights {path}: {name} is {kind}; convert it to a dense real tensor")
        if tensor.nbytes > tensor.untyped_storage().nbytes():  # a view that repeats what is stored
            raise MicronetError(f"--weights {path}: {name} has more values than the file holds; save a contiguous one")
    for prefix in ("_orig_mod.", "module.", "_orig_mod."):  # of torch.compile and DataParallel, in either order
        loaded = {str(name).removeprefix(prefix): tensor for name, tensor in loaded.items()}
    return loaded


def _why_no_state(loaded: Any) -> str:
    """Return why something that a file holds is not a state dict, to follow the file's name."""
    named = {"it": loaded, **(loaded if isinstance(loaded, dict) else {})}
    for name, unread in named.items():
        if isinstance(unread, Unread) and unread.name in _KINDS:
            return f": {name} is {_KINDS[unread.name]}; convert it to a dense real tensor"
        if isinstance(unread, Unread):
            return f" holds an object of the class {unread.name} in the place of weights; {SAVE_AGAIN}"
    return " is not a state dict; create one with torch.save(model.state_dict(), path)"


def _load_pickle(path: Path) -> Any:
    """Load a PyTorch file; raise MicronetError if it would take more memory than its own size, or than is free.

    torch stores tensors as they are, so a compressed member is a bomb.
    """
    size, free = path.stat().st_size, available_memory()
    if size > free:
        raise MicronetError(
            f"--weights {path} has {size >> 20:,} MiB, but {free >> 20:,} MiB of memory are free; end other programs "
            "or import it on a machine with more memory"
        )
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
        refused = None
        if any(each.compress_type != zipfile.ZIP_STORED for each in members):
            refused = "has compressed members"
        elif sum(each.file_size for each in members) > size:
            refused = "has members that are larger than the file"
        if refused:
            raise MicronetError(
                f"--weights {path} {refused}, as no file of torch.save(model.state_dict(), path) does; {SAVE_AGAIN}"
            )
    try:
        return read_checkpoint(path)
    except CheckpointError as error:
        raise MicronetError(f"--weights {path} cannot be read: {error}; {SAVE_AGAIN}") from error


def _widths(name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return a nin's arguments, found from the shapes of its convolutions."""
    convolutions = [tensor for tensor in tensors.values() if tensor.dim() == 4]
    if len(convolutions) != 9:
        raise MicronetError(
            f"the weights have {count(len(convolutions), 'convolution')}, but {name} has 9; choose another --model"
        )
    *widths, classes = [tensor.shape[0] for tensor in convolutions]
    found = {"widths": widths, "num_classes": classes, "in_channels": convolutions[0].shape[1]}
    return {**found, "conv4_kernel": convolutions[3].shape[-1]} if name == "nin" else found


def _most_bytes(tensors: dict[str, Tensor]) -> int:
    """Return how much memory the network of these tensors takes at most: float64 for int8, and numbers of batches.

    Their shapes do not tell: tensors can share their values.
    """
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors.values()}
    return 8 * sum(held.values()) + 1000


def _of_network(tensors: dict[str, Tensor], own: dict[str, Tensor], path: Path | None) -> dict[str, Tensor]:
    """Return a network's tensors out of those of a larger module, such as Lightning's, that has it as an attribute.

    ``own``: the network's names. Raises MicronetError if the module has it several times.
    """
    first = next(iter(own), "")
    prefixes = [name.removesuffix(first) for name in tensors if name.endswith(f".{first}")]
    prefixes = [prefix for prefix in prefixes if all(prefix + name in tensors for name in own)]
    if not prefixes or tensors.keys() >= own.keys():
        return tensors
    if len(prefixes) > 1:
        raise MicronetError(
            f"--weights {path} has the network several times ({', '.join(prefixes)}); save one of them with "
            "torch.save(module.state_dict(), path)"
        )
    return {name: tensors[prefixes[0] + name] for name in own}


def _by_position(tensors: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the original's tensors to ours by position: n-th convolution, n-th batch norm.

    Its names changed over the years (tnn_bin_model, quant_model, …), but the order of its layers did not.
    """
    ours, theirs = _layers(own), _layers(tensors)
    if [len(group) for group in ours] != [len(group) for group in theirs]:
        raise MicronetError(
            "the weights do not match the layers of the original micronet's network; choose another --model"
        )
    foreign = dict(zip(chain(*ours), chain(*theirs), strict=True))
    renamed = {}
    for name, tensor in own.items():
        owner, _, leaf = name.rpartition(".")
        if f"{foreign[owner]}.{leaf}" in tensors:
            renamed[name] = tensors[f"{foreign[owner]}.{leaf}"]
        elif leaf == "num_batches_tracked":
            renamed[name] = tensor
    return renamed


def _layers(tensors: dict[str, Tensor]) -> tuple[list[str], list[str]]:
    """Return the names of the convolutions and of the batch norms, in stored order."""
    convolutions = [name.rpartition(".")[0] for name, tensor in tensors.items() if tensor.dim() == 4]
    norms = [name.rpartition(".")[0] for name in tensors if name.endswith("running_mean")]
    return convolutions, norms


def _numbers(text: str, name: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise MicronetError(f"{name} is {text!r}; expected numbers such as 0.485,0.456,0.406") from error
