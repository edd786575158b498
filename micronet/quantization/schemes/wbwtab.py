"""Binary and ternary weights, binary activations (the scheme that micronet has always called wbwtab).

Binary weights: alpha * sign(w), with alpha the mean magnitude of an output channel (Rastegari et al. 2016,
arXiv:1603.05279, equation 6). As an option, and in micronet 1, w loses its mean over the inputs first.
Ternary weights: alpha * t, with t = sign(w) if |w| > 0.7 mean|w|, else 0, and alpha the mean magnitude of the weights
where t is not 0 (Li et al. 2016, arXiv:1605.04711, equation 7). Activations: sign (Hubara et al. 2016,
arXiv:1602.02830). sign(0) is +1.

Not here, because they would change nothing: a learned threshold of the sign (RSign) and a learned slope and shift
before it (RPReLU; Liu et al. 2020, arXiv:2003.03488, equations 3 and 4). The bias of the batch norm before the sign is
that threshold already, and a rising function only moves it. Behind the add of a residual block it is not the norm's
bias, which moves the shortcut too; the threshold there is 0. Not here, because no threshold per channel can hold them:
centers of binary weights other than 0 (AdaBin; Tu et al. 2022, arXiv:2208.08084), which add sums that differ from pixel
to pixel.

Deviations from micronet 1: a forward pass neither changes nor clamps the trained weights, which are not centered by
default; layers with one input channel are never centered, which would make them zero, nor are transposed convolutions,
whose groups share that axis; a weight exactly at the threshold becomes 0; a filter of zeros stays zero.
"""

import torch
from torch import Tensor

from micronet.quantization.config import QuantConfig
from micronet.quantization.functional import SMALLEST_SCALE, QParams, Ste, broadcast, sign, straight_through
from micronet.quantization.quantizer import Quantizer

TERNARY_THRESHOLD = 0.7  # times the mean magnitude: Li et al. 2016, equation 6


class LevelQuantizer(Quantizer):
    """Weights of levels {-1, +1} or {-1, 0, +1}, times one alpha per output channel; zero point 0."""

    def __init__(self, axis: int, channels: int, alpha: bool, ste: Ste) -> None:
        super().__init__({"binary": 1, "ternary": 2}[self.scheme], axis, channels)
        self.alpha = alpha
        self.unit_levels = alpha
        self.ste: Ste = ste

    def _decompose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the levels of ``x``, with a straight-through gradient, and alpha, (channels,)."""
        raise NotImplementedError

    def _levels_and_scale(self, x: Tensor) -> tuple[Tensor, Tensor]:
        levels, alpha = self._decompose(x)
        return levels, alpha.clamp(min=SMALLEST_SCALE) if self.alpha else torch.ones_like(alpha)

    @torch.no_grad()
    def qparams(self, x: Tensor) -> QParams:
        """Return the grid of the weight ``x``."""
        _, scale = self._levels_and_scale(x)
        return QParams(scale, torch.zeros_like(scale), -1, 1, self.axis)

    def project(self, x: Tensor, *, rectified: bool = False) -> Tensor:
        """Return alpha times the levels of ``x``; the gradient flows through both."""
        levels, scale = self._levels_and_scale(x)
        return levels * broadcast(scale, x, self.axis)

    @torch.no_grad()
    def integers(self, x: Tensor) -> Tensor:
        """Return the levels of ``x``, stored as floats."""
        return self._levels_and_scale(x)[0]

    def _by_channel(self, x: Tensor) -> Tensor:
        """Return a view of shape (channels, weights per channel)."""
        return x.transpose(0, self.axis or 0).flatten(1)


class BinaryQuantizer(LevelQuantizer):
    """Levels -1 and +1: the signs of the weight; alpha is its mean magnitude.

    ``centered``: subtract the mean over the inputs first. Files that do not record it are from when this was the rule.
    """

    scheme = "binary"

    def __init__(self, axis: int, channels: int, alpha: bool, ste: Ste, centered: bool = True) -> None:
        super().__init__(axis, channels, alpha, ste)
        self.centered = centered

    def _decompose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return sign(self._centered(x), self.ste), self._by_channel(self._centered(x)).abs().mean(1)

    def _centered(self, x: Tensor) -> Tensor:
        if not self.centered or self.axis or x.shape[1] == 1:
            return x
        return x - x.mean(1, keepdim=True)


class TernaryQuantizer(LevelQuantizer):
    """Levels -1, 0 and +1: the signs of the weights beyond the threshold; alpha is their mean magnitude."""

    scheme = "ternary"

    def _decompose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        size = x.detach().abs()
        beyond = size > broadcast(TERNARY_THRESHOLD * self._by_channel(size).mean(1), x, self.axis)
        levels = straight_through(x if self.ste == "ste" else sign(x, self.ste), x.detach().sign() * beyond)
        used = self._by_channel(beyond)
        return levels, (self._by_channel(x.abs()) * used).sum(1) / used.sum(1).clamp(min=1)


class SignQuantizer(Quantizer):
    """Activations as -1 or +1; scale 1, zero point 0."""

    scheme = "sign"

    def __init__(self, ste: Ste) -> None:
        super().__init__(1, None, None)
        self.ste: Ste = ste

    def qparams(self, x: Tensor) -> QParams:
        """Return the grid, which is constant."""
        one = torch.ones((), device=x.device)
        return QParams(one, torch.zeros_like(one), -1, 1, None)

    def project(self, x: Tensor, *, rectified: bool = False) -> Tensor:
        """Return the signs."""
        return sign(x, self.ste)

    def integers(self, x: Tensor) -> Tensor:
        """Return the signs, stored as floats."""
        return sign(x.detach(), self.ste)


def weight_quantizer(config: QuantConfig, bits: str, axis: int, channels: int) -> Quantizer:
    """Make the quantizer of a weight with ``channels`` scales on ``axis``."""
    if bits == "binary":
        return BinaryQuantizer(axis, channels, not config.no_alpha, config.w_ste, config.w_center)
    return TernaryQuantizer(axis, channels, not config.no_alpha, config.w_ste)


def activation_quantizer(config: QuantConfig, bits: str, *, signed: bool) -> Quantizer:
    """Make the quantizer of an activation."""
    return SignQuantizer(config.a_ste)
