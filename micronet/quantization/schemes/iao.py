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
from micronet.quantization.quantizer import Quantizer


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
        self.observer = OBSERVERS[observer](channels, axis)
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

    def set_range(self, low: float, high: float) -> None:
        """Set the range to [low, high]."""
        self.observer.low.fill_(low)
        self.observer.high.fill_(high)
        self._refresh()

    def _refresh(self) -> None:
        """Compute scale and zero point from the range; not in place, since backward may still need the old tensors."""
        low, high = self.observer.low, self.observer.high
        if self.symmetric:
            self.scale, self.zero_point = symmetric_qparams(low, high, self.qmax)
        else:
            self.scale, self.zero_point = affine_qparams(low, high, self.qmin, self.qmax)
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
    return AffineQuantizer(bits, config.q_type == "sym", True, True, config.weight_observer, axis, channels)


def activation_quantizer(config: QuantConfig, bits: int, *, signed: bool) -> Quantizer:
    """Make the quantizer of an activation, with one scale for the whole tensor."""
    symmetric = config.q_type == "sym"
    return AffineQuantizer(bits, symmetric, signed and symmetric, narrow=False, observer="moving-average")
