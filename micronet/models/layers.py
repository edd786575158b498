"""Small layers that our networks share, each a leaf of the traced graph, so that a stage can attach to its output."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Leaf(nn.Module):
    """A module that graph tracing takes as one node."""

    is_leaf = True


class Add(Leaf):
    """Add two tensors of equal shape (the join of a residual block)."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Return ``left + right``."""
        return left + right


class Tap(Leaf):
    """Return the input unchanged: a named place on a tensor that no module produces."""

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` itself."""
        return x


class ModeCall(Leaf):
    """A function that takes ``training``, called with the mode the network is in now."""

    def __init__(self, function: Callable[..., Tensor], key: str | int) -> None:
        super().__init__()
        self._function = function
        self._key = key

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Call the function with its mode argument replaced by this module's mode."""
        if isinstance(self._key, int):
            args = (*args[: self._key], self.training, *args[self._key + 1 :])
        else:
            kwargs = {**kwargs, self._key: self.training}
        return self._function(*args, **kwargs)


class ChannelShuffle(Leaf):
    """Interleave the channels of ``groups`` groups (Zhang et al. 2017, arXiv:1707.01083, section 3.1)."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """Permute channels: (N, C, H, W) -> (N, C, H, W), channel g * C/groups + i goes to i * groups + g."""
        n, channels, height, width = x.shape
        return x.view(n, self.groups, channels // self.groups, height, width).transpose(1, 2).reshape(x.shape)


class ConvBNReLU(nn.Module):
    """Convolution, batch normalisation, ReLU, in this order."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride=stride, padding=kernel_size // 2, groups=groups
        )
        self.bn = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H', W')."""
        out: Tensor = self.relu(self.bn(self.conv(x)))
        return out


def initialise(model: nn.Module) -> None:
    """Draw the weights as the original networks do: convolutions Xavier uniform, linear N(0, 0.01), biases zero."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.xavier_uniform_(module.weight)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0.0, 0.01)
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            nn.init.zeros_(module.bias)


def scale_width(channels: int, width: float, multiple: int = 1) -> int:
    """Multiply a channel count by ``width`` and round to the nearest multiple (ties up), at least one multiple."""
    return max(multiple, int(channels * width / multiple + 0.5) * multiple)


def flatten(x: Tensor) -> Tensor:
    """(N, ...) -> (N, features)."""
    return torch.flatten(x, 1)
