"""Binary and ternary weights, binary activations (the scheme that micronet has always called wbwtab).

Binary weights: alpha * sign(w - mean of w over the inputs), with alpha the mean magnitude of an output channel
(Rastegari et al. 2016, arXiv:1603.05279, equation 6). Ternary weights: alpha * t, with t = sign(w) if
|w| > 0.7 mean|w|, else 0, and alpha the mean magnitude of the weights where t is not 0 (Li et al. 2016,
arXiv:1605.04711, equation 7). Activations: sign (Hubara et al. 2016, arXiv:1602.02830). sign(0) is +1.

Deviations from micronet 1: a forward pass neither changes nor clamps the trained weights; layers with one input channel
are not centered, which would make them zero, nor are transposed convolutions, whose groups share that axis; a weight
exactly at the threshold becomes 0; a filter of zeros stays zero.
"""

import torch
from torch import Tensor

from micronet.quantization.config import QuantConfig
from micronet.quantization.functional import SMALLEST_SCALE, QParams, Ste, broadcast, sign, straight_through
from micronet.quantization.quantizer import Quantizer
from micronet.quantization.schemes.iao import AffineQuantizer, frozen_grid

TERNARY_THRESHOLD = 0.7  # times the mean magnitude: Li et al. 2016, equation 6


class LevelQuantizer(Quantizer):
    """Weights of levels {-1, +1} or {-1, 0, +1}, times one alpha per output channel; zero point 0."""

    arguments = ("axis", "channels", "alpha", "ste")

    def __init__(self, axis: int, channels: int, alpha: bool, ste: Ste) -> None:
        super().__init__({"binary": 1, "ternary": 2}[self.scheme], axis, channels)
        self.alpha = alpha
        self.unit_levels = alpha
        self.ste: Ste = ste

    def levels(self, x: Tensor) -> Tensor:
        """Return the levels of ``x``, with a straight-through gradient."""
        raise NotImplementedError

    def magnitude(self, x: Tensor, levels: Tensor) -> Tensor:
        """Return alpha, (channels,)."""
        raise NotImplementedError

    def _scale(self, x: Tensor, levels: Tensor) -> Tensor:
        if not self.alpha:
            return torch.ones(self.channels or 1, device=x.device, dtype=x.dtype)
        return self.magnitude(x, levels).clamp(min=SMALLEST_SCALE)

    @torch.no_grad()
    def qparams(self, x: Tensor) -> QParams:
        """Return the grid of the weight ``x``."""
        scale = self._scale(x, self.levels(x))
        return QParams(scale, torch.zeros_like(scale), -1, 1, self.axis)

    def project(self, x: Tensor) -> Tensor:
        """Return alpha times the levels of ``x``; the gradient flows through both."""
        levels = self.levels(x)
        return levels * broadcast(self._scale(x, levels.detach()), x, self.axis)

    @torch.no_grad()
    def integers(self, x: Tensor) -> Tensor:
        """Return the levels of ``x``, stored as floats."""
        return self.levels(x)

    @torch.no_grad()
    def scaled(self, factor: Tensor, x: Tensor, axis: int) -> AffineQuantizer:
        """Return the frozen grid of ``factor * x``: three levels, of which binary weights use two."""
        return frozen_grid(2, self.qparams(x).scale, factor, axis)

    def _by_channel(self, x: Tensor) -> Tensor:
        """Return a view of shape (channels, weights per channel)."""
        return x.transpose(0, self.axis or 0).flatten(1)


class BinaryQuantizer(LevelQuantizer):
    """Levels -1 and +1."""

    scheme = "binary"

    def levels(self, x: Tensor) -> Tensor:
        """Return the signs of the centered weight."""
        return sign(self._centered(x), self.ste)

    def magnitude(self, x: Tensor, levels: Tensor) -> Tensor:
        """Return the mean magnitude of each output channel of the centered weight."""
        return self._by_channel(self._centered(x)).abs().mean(1)

    def _centered(self, x: Tensor) -> Tensor:
        if self.axis or x.shape[1] == 1:
            return x
        return x - x.mean(1, keepdim=True)


class TernaryQuantizer(LevelQuantizer):
    """Levels -1, 0 and +1."""

    scheme = "ternary"

    def levels(self, x: Tensor) -> Tensor:
        """Return the signs of the weights beyond the threshold, and 0 for the rest."""
        threshold = TERNARY_THRESHOLD * self._by_channel(x.detach()).abs().mean(1)
        t = x.detach().sign() * (x.detach().abs() > broadcast(threshold, x, self.axis))
        return straight_through(x if self.ste == "ste" else sign(x, self.ste), t)

    def magnitude(self, x: Tensor, levels: Tensor) -> Tensor:
        """Return the mean magnitude of each output channel's weights beyond the threshold."""
        used = self._by_channel(levels != 0)
        return (self._by_channel(x.abs()) * used).sum(1) / used.sum(1).clamp(min=1)


class SignQuantizer(Quantizer):
    """Activations as -1 or +1; scale 1, zero point 0."""

    scheme = "sign"
    arguments = ("ste",)

    def __init__(self, ste: Ste) -> None:
        super().__init__(1, None, None)
        self.ste: Ste = ste

    def qparams(self, x: Tensor) -> QParams:
        """Return the grid, which is constant."""
        one = torch.ones((), device=x.device)
        return QParams(one, torch.zeros_like(one), -1, 1, None)

    @property
    def frozen(self) -> bool:
        """Always True: there is no range."""
        return True

    def project(self, x: Tensor) -> Tensor:
        """Return the signs."""
        return sign(x, self.ste)

    def integers(self, x: Tensor) -> Tensor:
        """Return the signs, stored as floats."""
        return sign(x.detach(), self.ste)


class WbWtAb:
    """The scheme of the bit widths ``binary`` and ``ternary``."""

    @staticmethod
    def check(config: QuantConfig) -> None:
        """Accept every config."""

    @staticmethod
    def weight_quantizer(config: QuantConfig, bits: str, axis: int, channels: int) -> Quantizer:
        """Make the quantizer of a weight with ``channels`` output channels on ``axis``."""
        kind = BinaryQuantizer if bits == "binary" else TernaryQuantizer
        return kind(axis, channels, not config.no_alpha, config.w_ste)

    @staticmethod
    def activation_quantizer(config: QuantConfig, bits: str, *, non_negative: bool) -> Quantizer:
        """Make the quantizer of an activation."""
        return SignQuantizer(config.a_ste)
