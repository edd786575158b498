"""Integer-arithmetic-only quantization: uniform grids over observed ranges.

Jacob et al. 2017, arXiv:1712.05877 (grids, zero point, moving-average ranges); Krishnamoorthi 2018, arXiv:1806.08342
(one scale per output channel). Deviations from micronet 1: ranges always contain 0, so zero is exact; weight ranges
follow the current weights and can shrink; symmetric activations after a ReLU use the whole unsigned grid instead of
half of a signed one (``a_sign="signed"`` restores that, for TensorRT).
"""

from typing import Any, Literal

import torch
from torch import Tensor

from micronet.quantization.config import QuantConfig
from micronet.quantization.functional import QParams, affine_qparams, integer_range, symmetric_qparams
from micronet.quantization.observers import OBSERVERS
from micronet.quantization.quantizer import Quantizer, RangedQuantizer


class AffineQuantizer(RangedQuantizer):
    """A uniform grid of 2^bits levels (2^bits - 1 if narrow), symmetric or with a zero point."""

    scheme = "iao"
    arguments = ("bits", "symmetric", "signed", "narrow", "observer", "axis", "channels")

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
        self.observer = OBSERVERS[observer](channels, axis)
        self.qmin, self.qmax = integer_range(bits, signed=signed, narrow=narrow)
        self.unit_levels = symmetric and self.qmax == 1

    def qparams(self, x: Tensor) -> QParams:
        """Return the grid, which does not depend on ``x``."""
        return QParams(self.scale, self.zero_point, self.qmin, self.qmax, self.axis)

    def refresh(self) -> None:
        """Compute scale and zero point from the observed range."""
        low, high = self.observer.range()
        if self.symmetric:
            scale, zero_point = symmetric_qparams(low, high, self.qmax)
        else:
            scale, zero_point = affine_qparams(low, high, self.qmin, self.qmax)
        self.scale, self.zero_point = scale, zero_point  # not in place: backward may still need the old tensors

    def describe(self) -> dict[str, Any]:
        """Return the JSON object from which ``rebuild`` makes an equal quantizer."""
        return {**super().describe(), "observer": self.observer_name}

    @torch.no_grad()
    def scaled(self, factor: Tensor, x: Tensor, axis: int) -> "AffineQuantizer":
        """Return the quantizer of ``factor * x``: scale times \\|factor\\|, zero point negated if it is negative.

        A factor of 0 gives the scale 1 and the integer 0.
        """
        described = {**self.describe(), "axis": axis, "channels": len(factor)}
        described.pop("scheme")
        other = AffineQuantizer(**described).to(self.scale)
        other.scale.copy_(torch.where(factor == 0, 1.0, self.scale * factor.abs()))
        other.zero_point.copy_(self.zero_point * factor.sign())
        ends = torch.stack([self.observer.low * factor, self.observer.high * factor])
        other.observer.low.copy_(ends.amin(0))
        other.observer.high.copy_(ends.amax(0))
        other.freeze()
        return other


@torch.no_grad()
def frozen_grid(bits: int, scale: Tensor, factor: Tensor, axis: int) -> AffineQuantizer:
    """Return the frozen symmetric grid of weights times ``factor`` (channels,), with one scale per output channel.

    ``scale``: the scale of the weights, () or (channels,). A factor of 0 gives the scale 1.
    """
    grid = AffineQuantizer(bits, True, True, True, "minmax", axis, len(factor)).to(scale)
    grid.scale.copy_(torch.where(factor == 0, 1.0, scale * factor.abs()))
    grid.observer.high.copy_(grid.scale * grid.qmax)
    grid.observer.low.copy_(-grid.observer.high)
    grid.freeze()
    return grid


class IAO:
    """The scheme."""

    @staticmethod
    def check(config: QuantConfig) -> None:
        """Accept every config."""

    @staticmethod
    def weight_quantizer(config: QuantConfig, bits: int, axis: int, channels: int) -> Quantizer:
        """Make the quantizer of a weight with ``channels`` output channels on ``axis``."""
        per_channel = config.q_level == "channel"
        return AffineQuantizer(
            bits,
            symmetric=config.q_type == "sym",
            signed=True,
            narrow=True,
            observer=config.weight_observer,
            axis=axis if per_channel else None,
            channels=channels if per_channel else None,
        )

    @staticmethod
    def activation_quantizer(config: QuantConfig, bits: int, *, non_negative: bool) -> Quantizer:
        """Make the quantizer of an activation, with one scale for the whole tensor."""
        symmetric = config.q_type == "sym"
        signed = symmetric and not (non_negative and config.a_sign == "auto")
        return AffineQuantizer(bits, symmetric, signed=signed, narrow=False, observer="moving-average")
