"""Learned step size quantization (Esser et al. 2020, arXiv:1902.08153): the scale is a parameter, trained too.

The scale starts at 2 mean|x| / sqrt(qmax) of the first batch (section 2.1), or at max|x| / qmax if that is less, as
it is from about 5 bits on: otherwise half of the levels would lie beyond all values. Its gradient is multiplied by
1 / sqrt(N qmax), where N weights, or N features of an image, share the scale (section 2.2).

Deviations from the paper: weights have one scale per output channel unless ``q_level`` is ``layer``; the trained
parameter is the logarithm of the scale, so that a step of Adam changes small and large scales by the same fraction
(Jain et al. 2019, arXiv:1903.08066, section 3.3), and its learning rate is higher than that of other parameters.
"""

import math

import torch
from torch import Tensor, nn

from micronet.errors import MicronetError
from micronet.quantization.config import QuantConfig
from micronet.quantization.functional import SMALLEST_SCALE, QParams, fake_quantize, integer_range, learned_step
from micronet.quantization.quantizer import Quantizer
from micronet.training import distributed

ZERO_CHANNEL = 1e-6  # mean magnitude, as a fraction of the largest channel's, up to which a channel counts as zero


class LearnedQuantizer(Quantizer):
    """A symmetric grid with a learned scale, zero point 0."""

    scheme = "lsq"
    ranged = True
    learned_scales = ("log_scale",)
    fixed: Tensor

    def __init__(
        self, bits: int, signed: bool, weight: bool, axis: int | None = None, channels: int | None = None
    ) -> None:
        super().__init__(bits, axis, channels)
        self.signed = signed
        self.weight = weight
        self.qmin, self.qmax = integer_range(bits, signed=signed, narrow=weight)
        self.unit_levels = self.qmax == 1
        self.log_scale = nn.Parameter(torch.full(() if channels is None else (channels,), torch.nan))
        self.register_buffer("fixed", torch.tensor(False))

    def qparams(self, x: Tensor) -> QParams:
        """Return the grid, which does not depend on ``x``."""
        scale = self.log_scale.exp()
        return QParams(scale, torch.zeros_like(scale), self.qmin, self.qmax, self.axis)

    @torch.no_grad()
    def observe(self, x: Tensor, *, rectified: bool = False) -> None:
        """Initialize the scale from the first data seen; training changes it afterwards."""
        if not self._calibrated and self.empty and x.numel():
            size = x.clamp(min=0) if rectified else x.abs()
            rows = size.reshape(1, -1) if self.axis is None else size.transpose(0, self.axis).flatten(1)
            mean, largest = rows.mean(1).view_as(self.log_scale), rows.amax(1).view_as(self.log_scale)
            mean = distributed.sum_over_ranks(mean) / distributed.world_size()
            _, largest = distributed.range_over_ranks(largest, largest)
            if not bool(mean.isfinite().all()):
                raise MicronetError("NaN or infinity reached a quantizer; check the weights and the input data")
            used = mean > ZERO_CHANNEL * mean.max()
            scale = torch.minimum(2 * mean / math.sqrt(self.qmax), largest / self.qmax)
            average = scale[used].mean() if bool(used.any()) else scale.new_tensor(2 / math.sqrt(self.qmax))
            # A channel of zeros gets the average scale, so that it can grow.
            self.log_scale.copy_(torch.where(used, scale, average).log())

    @torch.no_grad()
    def set_range(self, low: float, high: float) -> None:
        """Put the outermost level on the end of larger magnitude."""
        self.log_scale.fill_(math.log(max(abs(low), abs(high), SMALLEST_SCALE) / self.qmax))

    def project(self, x: Tensor, *, rectified: bool = False) -> Tensor:
        """Return ``x`` rounded to the grid; unless frozen, with a gradient for the scale."""
        grid = self.qparams(x)
        if self.frozen:
            return fake_quantize(x, grid._replace(scale=grid.scale.detach()), rectified=rectified)
        sharing = (x if self.weight else x[0]).numel() // (self.channels or 1)
        return learned_step(x, grid, 1 / math.sqrt(max(1, sharing) * self.qmax), rectified=rectified)

    def freeze(self) -> None:
        """Stop training the scale."""
        self.fixed.fill_(True)
        self.log_scale.requires_grad_(False)

    @property
    def frozen(self) -> bool:
        """Whether the scale is no longer trained."""
        return bool(self.fixed)

    @property
    def empty(self) -> bool:
        """Whether no data has been observed yet."""
        return bool(self.log_scale.isnan().any())


def weight_quantizer(config: QuantConfig, bits: int, axis: int | None, channels: int | None) -> Quantizer:
    """Make the quantizer of a weight with ``channels`` scales on ``axis``, or with one scale (None)."""
    return LearnedQuantizer(bits, signed=True, weight=True, axis=axis, channels=channels)


def activation_quantizer(config: QuantConfig, bits: int, *, signed: bool) -> Quantizer:
    """Make the quantizer of an activation."""
    return LearnedQuantizer(bits, signed, weight=False)
