"""Which device a network runs on, and how its tensors lie in memory there."""

import torch
from torch import nn

from micronet.errors import MicronetError

_ONEDNN_BLOCK = 16  # channels that it computes at once, with AVX-512


def pick_device(name: str | None) -> torch.device:
    """Return the device called ``cpu``, ``cuda`` or ``cuda:N``; without a name the best one present."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()) or (kind == "cpu" and index):
        raise MicronetError(f"unknown device {name!r}; allowed: cpu, cuda, cuda:0, cuda:1, …")
    if kind == "cuda":
        count = torch.cuda.device_count()
        if int(index or 0) >= count:
            raise MicronetError(f"--device {name}: torch sees {count} CUDA devices; use --device cpu")
    return torch.device(name)


def memory_format(model: nn.Module) -> torch.memory_format:
    """Return how maps should lie in memory for a model's training step to be right and, on this device, fast.

    Channels last, but where convolutions have groups of several channels: oneDNN runs those in 0.8 of the time if not.
    Nor where one skips pixels and reads few channels: there oneDNN writes past its memory in the backward pass, and the
    gradient is wrong or the process dies (its issue 6035; 3.12 does).
    """
    convolutions = [module for module in model.modules() if isinstance(module, nn.modules.conv._ConvNd)]
    grouped = any(1 < layer.groups < layer.in_channels for layer in convolutions)
    unsafe = any(
        set(layer.kernel_size) == {1} and max(layer.stride) > 1 and layer.in_channels < _ONEDNN_BLOCK
        for layer in convolutions
    )
    return torch.contiguous_format if grouped or unsafe else torch.channels_last
