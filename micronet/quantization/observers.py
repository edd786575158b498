"""Ranges of tensors as they pass by.

An observer looks only while a procedure has switched it on; it never reads ``training``. Its range and whether it is
frozen are buffers, so that a reloaded one goes on exactly. An empty range is (+inf, -inf).
"""

import math

import torch
from torch import Tensor, nn

from micronet.training import distributed

MOMENTUM = 0.1  # share of a new batch in a moving average, as batch normalisation's


class Observer(nn.Module):
    """Base: holds a range of shape () or (channels,), and says how a new one changes it."""

    low: Tensor
    high: Tensor
    frozen: Tensor

    def __init__(self, channels: int | None, axis: int | None) -> None:
        super().__init__()
        shape = () if channels is None else (channels,)
        self.axis = axis
        self.register_buffer("low", torch.full(shape, math.inf))
        self.register_buffer("high", torch.full(shape, -math.inf))
        self.register_buffer("frozen", torch.tensor(False))

    @torch.no_grad()
    def forward(self, x: Tensor, *, rectified: bool = False) -> None:
        """Widen or move the range by the values of ``x``; ``rectified``: by 0 and those above it."""
        if x.numel() == 0:
            return
        if rectified:
            high = x.amax().clamp(min=0)
            low = torch.zeros_like(high)
        elif self.axis is None:
            low, high = x.amin(), x.amax()  # a sixth of the time of torch.aminmax on a CPU
        else:
            low, high = torch.aminmax(x.transpose(0, self.axis).flatten(1), dim=1)
        self.update(low.to(self.low.dtype), high.to(self.high.dtype))  # autocast's may be half as wide

    def update(self, low: Tensor, high: Tensor) -> None:
        """Take in the range of one more batch."""
        raise NotImplementedError

    def range(self) -> tuple[Tensor, Tensor]:
        """Return (low, high), of shape () or (channels,)."""
        return self.low, self.high

    @property
    def empty(self) -> bool:
        """Whether nothing was observed yet."""
        return bool((self.low > self.high).any())  # NaN is not empty: data were seen


class MinMax(Observer):
    """The range of the tensor as it is now: for weights, which are all there at every step."""

    def update(self, low: Tensor, high: Tensor) -> None:
        """Take the newest range."""
        self.low.copy_(low)
        self.high.copy_(high)


class MovingAverage(Observer):
    """An exponential moving average of each batch's range (Jacob et al. 2017, section 3.1); the first is copied.

    Where several processes train, a batch is all their parts of it.
    """

    def update(self, low: Tensor, high: Tensor) -> None:
        """Move a tenth of the way to the newest range."""
        low, high = distributed.range_over_ranks(low, high)
        fresh = self.low > self.high
        self.low.copy_(torch.where(fresh, low, torch.lerp(self.low, low, MOMENTUM)))
        self.high.copy_(torch.where(fresh, high, torch.lerp(self.high, high, MOMENTUM)))


OBSERVERS: dict[str, type[Observer]] = {"minmax": MinMax, "moving-average": MovingAverage}
