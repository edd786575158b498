"""Observers: they record the range of the tensors that pass.

An observer updates only while a procedure has switched its quantizer's ``observing`` on; it never reads ``training``.
The range and ``frozen`` are buffers, so a reloaded observer continues exactly. An empty range is (+inf, -inf).
"""

import math

import torch
from torch import Tensor, nn

from micronet.training import distributed

MOMENTUM = 0.1  # weight of the new batch in a moving average, as in batch normalization


class MinMax(nn.Module):
    """The range of the newest tensor, () or (channels,): for weights, which are complete at every step."""

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
        """Update the range from the values of ``x``; ``rectified``: from those of relu(x)."""
        if x.numel() == 0:
            return
        if rectified:
            high = x.amax().clamp(min=0)
            low = torch.zeros_like(high)
        elif self.axis is None:
            low, high = x.amin(), x.amax()  # takes a sixth of the time of torch.aminmax on a CPU
        else:
            low, high = torch.aminmax(x.transpose(0, self.axis).flatten(1), dim=1)
        self.update(low.to(self.low.dtype), high.to(self.high.dtype))  # under autocast, x may be in half precision

    def update(self, low: Tensor, high: Tensor) -> None:
        """Replace the range."""
        self.low.copy_(low)
        self.high.copy_(high)

    @property
    def empty(self) -> bool:
        """Whether no data has been observed yet."""
        return bool((self.low > self.high).any())  # a range of NaN is not empty


class MovingAverage(MinMax):
    """An exponential moving average of the batches' ranges (Jacob et al. 2017, section 3.1); the first is copied.

    In distributed training, a batch's range covers all ranks' parts of it.
    """

    def update(self, low: Tensor, high: Tensor) -> None:
        """Move a tenth of the way to the new range."""
        low, high = distributed.range_over_ranks(low, high)
        fresh = self.low > self.high
        super().update(
            torch.where(fresh, low, torch.lerp(self.low, low, MOMENTUM)),
            torch.where(fresh, high, torch.lerp(self.high, high, MOMENTUM)),
        )


OBSERVERS: dict[str, type[MinMax]] = {"minmax": MinMax, "moving-average": MovingAverage}
