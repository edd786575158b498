"""The device a network runs on, its inputs there, the memory format of its tensors, and the machine around it."""

import re
from typing import Any

import torch
from torch import Tensor, nn

from micronet.core.machine import has_vnni, processor_name, usable_cores
from micronet.errors import MicronetError

Example = Tensor | tuple[Any, ...]  # an example input: one tensor, or a tuple of positional arguments
_LARGE = 2**18  # numbers in a sample: an image of 3x296x296
_NEEDS_CONTIGUOUS = "_needs_contiguous_tensors"  # an attribute of modules
_ABOUT_FORMAT = re.compile(r"\b(view|stride|contiguous)\b")
_ONEDNN_BLOCK = 16  # channels that oneDNN computes at a time with AVX-512


def pick_device(name: str | None) -> torch.device:
    """Return a device by name; without a name, CUDA if available, else the CPU.

    Raises MicronetError if this machine has no device of that name: ``cpu``, ``cuda:N``, ``mps`` and so on.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise MicronetError(f"unknown device {name!r}; use cpu, cuda, or cuda:N for GPU number N") from None
    module: Any = getattr(torch, device.type, None)  # torch.cuda, torch.mps, or what another backend registered
    count = module.device_count() if hasattr(module, "device_count") and module.is_available() else 0
    if (device.index or 0) >= count:
        raise MicronetError(
            f"--device {name} is not available (number of such devices found by torch: {count}); use --device cpu"
        )
    return device


def memory_format(model: nn.Module) -> torch.memory_format:
    """Return the memory format in which a model's training steps are correct and, on a CPU, fastest.

    Channels last, with three exceptions:
    - Grouped convolutions of several channels per group: oneDNN needs 0.8 of the time with contiguous tensors.
    - Strided 1x1 convolutions with few input channels: oneDNN overruns its buffer in backward, so the gradient is
      wrong or the process crashes (oneDNN issue 6035; version 3.12 has it).
    - Weights of five dimensions, which have no such format.
    """
    convolutions = [module for module in model.modules() if isinstance(module, nn.modules.conv._ConvNd)]
    grouped = any(1 < layer.groups < layer.in_channels for layer in convolutions)
    unsafe = any(
        set(layer.kernel_size) == {1} and max(layer.stride) > 1 and layer.in_channels < _ONEDNN_BLOCK
        for layer in convolutions
    )
    return torch.contiguous_format if grouped or unsafe else inference_format(model)


def inference_format(model: nn.Module) -> torch.memory_format:
    """Return the memory format for a model that only runs forward: channels last if the network can have it."""
    five = any(tensor.dim() == 5 for tensor in (*model.parameters(), *model.buffers()))
    needs_contiguous = any(_NEEDS_CONTIGUOUS in vars(module) for module in model.modules())
    return torch.contiguous_format if five or needs_contiguous else torch.channels_last


def use_contiguous(model: nn.Module) -> None:
    """Keep a model's tensors contiguous, as a forward such as ``fc(conv(x).view(len(x), -1))`` needs.

    It remembers that in an attribute of every module, so that its copies and parts know it, too.
    """
    model.to(memory_format=torch.contiguous_format)
    for module in model.modules():
        vars(module)[_NEEDS_CONTIGUOUS] = True


def is_about_format(error: Exception) -> bool:
    """Return whether an error may come from tensors that are not contiguous."""
    return _ABOUT_FORMAT.search(str(error)) is not None


def place_input(x: Tensor, device: torch.device, layout: torch.memory_format) -> Tensor:
    """Return an input of any rank on a device; one of four dimensions gets the memory format."""
    return x.to(device, non_blocking=True, memory_format=layout if x.dim() == 4 else torch.contiguous_format)


def place_inputs(
    inputs: Tensor | tuple[Tensor, ...], device: torch.device, layout: torch.memory_format
) -> tuple[Tensor, ...]:
    """Return a network's inputs, as positional arguments, on a device; see ``place_input``."""
    return tuple(place_input(x, device, layout) for x in (inputs if isinstance(inputs, tuple) else (inputs,)))


class Inputs(tuple[Tensor, ...]):
    """A batch for a network with several inputs: a tensor for each, in the order of the forward's arguments."""

    __slots__ = ()


def call(model: nn.Module, batch: Any) -> Any:
    """Return what a network returns for a batch: a tensor, or ``Inputs``."""
    return model(*batch) if isinstance(batch, Inputs) else model(batch)


def to_device(batch: Any, device: torch.device | None) -> Any:
    """Return a batch, a tensor or ``Inputs``, on a device."""
    return Inputs(x.to(device) for x in batch) if isinstance(batch, Inputs) else batch.to(device)


def contiguous(batch: Any) -> Any:
    """Return a batch, a tensor or ``Inputs``, in contiguous memory, which every network takes."""
    return Inputs(x.contiguous() for x in batch) if isinstance(batch, Inputs) else batch.contiguous()


def head(batch: Any, count: int) -> Any:
    """Return the first samples of a batch: of a tensor, or of each of several inputs."""
    return Inputs(x[:count] for x in batch) if isinstance(batch, tuple) else batch[:count]


def first_of_large(example: Example) -> Example | None:
    """Return the first sample of an example with large inputs, which is enough to compare networks; otherwise None."""
    inputs = example if isinstance(example, tuple) else (example,)
    lengths = {len(x) if isinstance(x, Tensor) and x.dim() else 0 for x in inputs}
    if len(lengths) != 1 or 0 in lengths or max(x[0].numel() for x in inputs) < _LARGE:
        return None
    first: Example = head(example, 1)
    return first


def copied(inputs: tuple[Any, ...]) -> list[Any]:
    """Return copies of inputs, for a network that may change them in place."""
    return [x.clone() if isinstance(x, Tensor) else x for x in inputs]


def as_arrays(batch: Any) -> Any:
    """Return a batch as an array, or as a tuple of arrays if it holds several inputs."""
    return tuple(x.numpy() for x in batch) if isinstance(batch, tuple) else batch.numpy()


def batch_length(batch: Any) -> int:
    """Return the number of samples in a batch."""
    return len(batch[0]) if isinstance(batch, tuple) else len(batch)


def as_inputs(model: nn.Module, example: Example) -> tuple[Any, ...]:
    """Return an example as positional arguments on the network's device, floats in the network's dtype."""
    own = next(model.parameters(), torch.empty(0))
    dtype = next((each.dtype for each in model.parameters() if not each.is_complex()), torch.get_default_dtype())
    return tuple(
        x.to(own.device, dtype if x.is_floating_point() else None) if isinstance(x, Tensor) else x
        for x in (example if isinstance(example, tuple) else (example,))
    )


def describe_machine() -> dict[str, str | int]:
    """Return the processor, cores, torch's threads and the GPU, if any, to print beside measurements."""
    threads = torch.get_num_threads()
    found: dict[str, str | int]
    found = {"processor": processor_name(), "cores": usable_cores(), "threads": threads, "vnni": has_vnni()}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found
