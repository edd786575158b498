"""Small layers shared by the built-in networks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from micronet.core.image_size import ImageSize, sides, spell_size
from micronet.errors import MicronetError


class Leaf(nn.Module):
    """A module that is one node of a traced graph, so that a quantizer can be attached to its output."""

    is_leaf = True


class Add(Leaf):
    """Add two tensors of equal shape (the join of a residual block)."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Return ``left + right``."""
        return left + right


class Tap(Leaf):
    """The identity: gives a name to a tensor that no module produces."""

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``."""
        return x


class ModeCall(Leaf):
    """A call of a function with a ``training`` argument, given by position or name, that becomes this module's mode."""

    def __init__(self, function: Callable[..., Tensor], key: str | int) -> None:
        super().__init__()
        self._function = function
        self._key = key

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Call the function with this module's mode."""
        if isinstance(self._key, int):
            args = (*args[: self._key], self.training, *args[self._key + 1 :])
        else:
            kwargs = {**kwargs, self._key: self.training}
        return self._function(*args, **kwargs)


class ModeValue(Leaf):
    """A number that depends on the mode, such as the share that attention drops."""

    def __init__(self, evaluating: float, training: float) -> None:
        super().__init__()
        self._values = evaluating, training

    def forward(self) -> float:
        """Return the number of this module's mode."""
        return self._values[self.training]


class Chosen(nn.Identity):
    """The result of an operation in eval mode, and what the operation was applied to in training mode."""

    is_leaf = True

    def forward(self, input: Tensor, source: Tensor) -> Tensor:  # type: ignore[override]
        """Return the result of this module's mode."""
        return source if self.training else input


class EvalOnly(nn.Identity):
    """The identity, at the end of a network that was recorded in eval mode and does something else while training."""

    is_leaf = True

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input``; raise MicronetError if the network is being trained."""
        if self.training and torch.is_grad_enabled():
            raise MicronetError(
                "in training mode, this network's forward() does more than apply dropout or noise, which is not "
                "supported in networks with quantizers; train it first and quantize it with --mode ptq, or write "
                "a forward() that computes the same in both modes"
            )
        return input


class Noise(nn.Dropout):
    """What returns its input in eval mode, such as stochastic depth: a module, or part of a forward; a kind of dropout.

    Such a part may read more tensors and sizes.
    """

    is_leaf = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = [module]  # it has no tensors, and its mode is this module's

    def forward(self, input: Tensor, *others: Any) -> Tensor:
        """Return what the module returns in this module's mode."""
        out: Tensor = self._module[0].train()(input, *others) if self.training else input
        return out

    def extra_repr(self) -> str:
        """Name the module."""
        return type(self._module[0]).__name__


class BatchNorm(nn.BatchNorm2d):
    """A batch norm of inputs of any rank from two on."""

    is_leaf = True

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected an input of at least 2 dimensions, not {input.dim()}")


class FrozenBatchNorm(BatchNorm):
    """A batch norm whose statistics, scale and shift never change: all are buffers."""

    def __init__(self, num_features: int, eps: float = 1e-5, device: str | None = None) -> None:
        super().__init__(num_features, eps, device=device)
        for name in ("weight", "bias"):
            tensor = self._parameters.pop(name)
            self.register_buffer(name, None if tensor is None else tensor.detach())

    def forward(self, input: Tensor) -> Tensor:
        """(N, num_features, ...) -> the same shape, by the stored statistics in either mode."""
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


def removed(module: nn.Module) -> nn.Identity:
    """Return what takes the place of a module without effect; it keeps the module's children, which others may call."""
    identity = nn.Identity()
    identity._modules = module._modules.copy()
    return identity


class ChannelShuffle(Leaf):
    """Interleave the channels of groups (Zhang et al. 2017, arXiv:1707.01083, section 3.1)."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W); channel g * C/groups + i moves to i * groups + g."""
        n, channels, height, width = x.shape
        return x.view(n, self.groups, channels // self.groups, height, width).transpose(1, 2).reshape(x.shape)


class ConvBNReLU(nn.Module):
    """A convolution, a batch norm and a ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, *, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, groups=groups)
        self.bn = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H, W)."""
        out: Tensor = self.relu(self.bn(self.conv(x)))
        return out


def initialise(model: nn.Module) -> None:
    """Initialise weights as in the original micronet: convolutions Xavier uniform, linear N(0, 0.01), biases 0."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.xavier_uniform_(module.weight)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0.0, 0.01)
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            nn.init.zeros_(module.bias)


def scale_width(channels: int, width: float, multiple: int = 1) -> int:
    """Return channels * width, rounded to the nearest multiple (ties up) and at least one multiple."""
    return max(multiple, int(channels * width / multiple + 0.5) * multiple)


def check_image_size(size: ImageSize, smallest: int, network: str) -> None:
    """Raise MicronetError if images are too small for a network."""
    if min(sides(size)) < smallest:
        spelled = size if isinstance(size, int) else spell_size(size)
        raise MicronetError(f"image size {spelled} is too small for {network}; use --image-size {smallest} or larger")


def flatten(x: Tensor) -> Tensor:
    """(N, ...) -> (N, features)."""
    return torch.flatten(x, 1)
