"""Integer-arithmetic-only quantization: uniform grids over observed ranges.

Jacob et al. 2017, arXiv:1712.05877 (grids, zero point, moving-average ranges); Krishnamoorthi 2018, arXiv:1806.08342
(one scale per output channel). Deviations from micronet 1: ranges always contain 0, so zero is exact; weight ranges
follow the current weights and can shrink; symmetric activations after a ReLU use the whole unsigned grid instead of
half of a signed one (``a_sign="signed"`` restores that, for TensorRT).
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from micronet.quantization.config import INTEGER_BITS, QuantConfig
from micronet.quantization.functional import QParams, integer_range, range_qparams
from micronet.quantization.quantizer import Quantizer
from micronet.training import distributed

MOMENTUM = 0.1  # weight of the new batch in a moving average, as in batch normalization


class Observer(nn.Module):
    """The range of the newest tensor, () or (channels,): for weights, which are complete at every step.

    ``averaging``: an exponential moving average of the batches' ranges instead (Jacob et al. 2017, section 3.1), of
    which the first is copied. In distributed training, a batch's range covers all ranks' parts of it. The range and
    ``frozen`` are buffers, so a reloaded observer continues exactly. An empty range is (+inf, -inf).
    """

    low: Tensor
    high: Tensor
    frozen: Tensor

    def __init__(self, channels: int | None, axis: int | None, *, averaging: bool) -> None:
        super().__init__()
        shape = () if channels is None else (channels,)
        self.axis = axis
        self.averaging = averaging
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
        low, high = low.to(self.low.dtype), high.to(self.high.dtype)  # under autocast, x may be in half precision
        if self.averaging:
            low, high = distributed.range_over_ranks(low, high)
            fresh = self.low > self.high
            low = torch.where(fresh, low, torch.lerp(self.low, low, MOMENTUM))
            high = torch.where(fresh, high, torch.lerp(self.high, high, MOMENTUM))
        self.low.copy_(low)
        self.high.copy_(high)

    @property
    def empty(self) -> bool:
        """Whether no data has been observed yet."""
        return bool((self.low > self.high).any())  # a range of NaN is not empty


class AffineQuantizer(Quantizer):
    """A uniform grid of 2^bits levels (2^bits - 1 if narrow) over an observed range."""

    scheme = "iao"
    ranged = True
    scale: Tensor
    zero_point: Tensor

    def __init__(
        self,
        bits: int,
        symmetric: bool,
        signed: bool,
        narrow: bool,
        observer: Literal["minmax", "moving-average"],
        axis: int | None = None,
        channels: int | None = None,
    ) -> None:
        super().__init__(bits, axis, channels)
        self.symmetric = symmetric
        self.signed = signed
        self.narrow = narrow
        self.observer_name = observer
        self.observer = Observer(channels, axis, averaging=observer == "moving-average")
        self.qmin, self.qmax = integer_range(bits, signed=signed, narrow=narrow)
        self.unit_levels = symmetric and self.qmax == 1
        self.register_buffer("scale", torch.full_like(self.observer.low, torch.nan))
        self.register_buffer("zero_point", torch.zeros_like(self.observer.low))

    def qparams(self, x: Tensor) -> QParams:
        """Return the grid, which does not depend on ``x``."""
        return QParams(self.scale, self.zero_point, self.qmin, self.qmax, self.axis)

    def describe(self) -> dict[str, Any]:
        """Return the JSON object from which ``rebuild`` makes an equal quantizer."""
        return {**super().describe(), "observer": self.observer_name}

    def observe(self, x: Tensor, *, rectified: bool = False) -> None:
        """Update the range from ``x`` unless it is frozen."""
        if not self.frozen:
            self.observer(x, rectified=rectified)
            self._refresh()

    def set_range(self, low: float | Tensor, high: float | Tensor) -> None:
        """Set the range to [low, high], one for all channels or tensors of one per channel."""
        self.observer.low[...] = low
        self.observer.high[...] = high
        self._refresh()

    def _refresh(self) -> None:
        """Compute scale and zero point from the range; not in place, since backward may still need the old tensors."""
        ends = self.observer.low, self.observer.high
        self.scale, self.zero_point = range_qparams(*ends, self.qmin, self.qmax, symmetric=self.symmetric)
        self._calibrated = True

    def freeze(self) -> None:
        """Fix the grid: nothing observed later changes it."""
        self.observer.frozen.fill_(True)

    @property
    def frozen(self) -> bool:
        """Whether the grid is fixed."""
        return bool(self.observer.frozen)

    @property
    def empty(self) -> bool:
        """Whether no data has been observed yet."""
        return self.observer.empty


def weight_quantizer(config: QuantConfig, bits: int, axis: int | None, channels: int | None) -> Quantizer:
    """Make the quantizer of a weight with ``channels`` scales on ``axis``, or with one scale (None)."""
    return AffineQuantizer(bits, config.q_type != "asym", True, True, config.weight_observer, axis, channels)


def activation_quantizer(config: QuantConfig, bits: int, *, signed: bool) -> Quantizer:
    """Make the quantizer of an activation, with one scale for the whole tensor."""
    shifted = config.q_type == "auto" and config.a_sign == "auto" and bits == INTEGER_BITS and signed
    symmetric = config.q_type != "asym" and not shifted  # runtimes take any zero point of 8 bits at no cost
    return AffineQuantizer(bits, symmetric, signed and symmetric, narrow=False, observer="moving-average")
