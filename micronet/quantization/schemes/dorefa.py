"""DoReFa (Zhou et al. 2016, arXiv:1606.06160): fixed ranges instead of observed ones.

Weights (equation 9): t = tanh(w), 2^k levels from -max|t| to max|t|. The integers are odd, so zero is not a level (a
zero weight becomes half a step). Activations (equation 11): clipped to 0..1 and rounded to 2^k levels.

Deviations from the paper: weights keep the magnitude max|t| instead of being stretched to 1, so a network trained in
float starts close to its float outputs and needs no batch norm after each layer; ``a_gain`` widens the clip to
1 / a_gain (micronet 1 multiplied its activations by 0.1 and never divided again); activations that can be negative are
clipped symmetrically.
"""

import torch
from torch import Tensor

from micronet.quantization.config import QuantConfig
from micronet.quantization.functional import SMALLEST_SCALE, QParams, broadcast, integer_range, straight_through
from micronet.quantization.quantizer import Quantizer


class TanhQuantizer(Quantizer):
    """Weights: odd integers q in -(2^k - 1) .. 2^k - 1, scale max|tanh w| / (2^k - 1), zero point 0."""

    scheme = "dorefa-weight"

    def __init__(self, bits: int, axis: int | None = None, channels: int | None = None) -> None:
        super().__init__(bits, axis, channels)
        self.qmax = 2**bits - 1

    def qparams(self, x: Tensor) -> QParams:
        """Return the grid of the weight ``x``."""
        size = x.detach().tanh().abs()
        largest = size.amax() if self.axis is None else size.transpose(0, self.axis).flatten(1).amax(1)
        scale = (largest / self.qmax).clamp(min=SMALLEST_SCALE)
        return QParams(scale, torch.zeros_like(scale), -self.qmax, self.qmax, self.axis)

    def project(self, x: Tensor, *, rectified: bool = False) -> Tensor:
        """Return ``x`` rounded to its grid; the gradient is that of tanh, straight through the rounding."""
        t, grid = x.tanh(), self.qparams(x)
        on_grid = self._odd(t.detach(), grid).mul_(broadcast(grid.scale, x, grid.axis))
        return straight_through(t, on_grid)

    def integers(self, x: Tensor) -> Tensor:
        """Return the odd integers of ``x``, stored as floats."""
        return self._odd(x.detach().tanh(), self.qparams(x))

    def _odd(self, t: Tensor, grid: QParams) -> Tensor:
        levels = (t / broadcast(grid.scale, t, grid.axis)).add_(self.qmax).div_(2).round_()
        return levels.mul_(2).sub_(self.qmax).clamp_(-self.qmax, self.qmax)


class ClippedQuantizer(Quantizer):
    """Activations: equal steps over 0 .. limit, or -limit .. limit; zero point 0."""

    scheme = "dorefa-activation"

    def __init__(self, bits: int, signed: bool, limit: float) -> None:
        super().__init__(bits, None, None)
        self.signed = signed
        self.limit = limit
        self.qmin, self.qmax = integer_range(bits, signed=signed, narrow=signed)

    def qparams(self, x: Tensor) -> QParams:
        """Return the grid, which is constant."""
        scale = torch.tensor(self.limit / self.qmax, device=x.device)
        return QParams(scale, torch.zeros_like(scale), self.qmin, self.qmax, None)


def weight_quantizer(config: QuantConfig, bits: int, axis: int | None, channels: int | None) -> Quantizer:
    """Make the quantizer of a weight with ``channels`` scales on ``axis``, or with one scale (None)."""
    return TanhQuantizer(bits, axis, channels)


def activation_quantizer(config: QuantConfig, bits: int, *, signed: bool) -> Quantizer:
    """Make the quantizer of an activation."""
    return ClippedQuantizer(bits, signed, 1 / config.a_gain)
