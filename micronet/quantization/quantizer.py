"""What every quantizer is: a module that puts a tensor on a grid of few levels and can name the integers."""

from typing import Any

import torch
from torch import Tensor, nn

from micronet import registry
from micronet.errors import MicronetError
from micronet.quantization.functional import QParams, fake_quantize, quantize
from micronet.quantization.observers import Observer


class Quantizer(nn.Module):
    """Base of all schemes' quantizers.

    A subclass gives ``qparams`` and ``scheme``; where its grid is not uniform and affine it also overrides ``forward``
    and ``integers``. The law: (integers(x) - zero_point) * scale == forward(x).
    """

    scheme: str
    observer: Observer
    scale: Tensor
    zero_point: Tensor

    def __init__(self, bits: int, axis: int | None, channels: int | None) -> None:
        super().__init__()
        shape = () if channels is None else (channels,)
        self.bits = bits
        self.axis = axis
        self.channels = channels
        self.observing = False
        self._calibrated = False
        self.register_buffer("scale", torch.full(shape, torch.nan))
        self.register_buffer("zero_point", torch.zeros(shape))

    def qparams(self, x: Tensor) -> QParams:
        """Return the grid for ``x``."""
        raise NotImplementedError

    def refresh(self) -> None:
        """Compute scale and zero point from the observed range."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """Return what ``rebuild`` needs to make an equal quantizer, JSON values only."""
        raise NotImplementedError

    def scaled(self, factor: Tensor) -> "Quantizer":
        """Return the frozen per-channel quantizer of ``factor * w`` (factor: (channels,)) that keeps w's integers."""
        raise NotImplementedError

    def observe(self, x: Tensor) -> None:
        """Let the observer see ``x`` and follow its range; a frozen range stays."""
        if not self.observer.frozen:
            self.observer(x)
            self.refresh()
            self._calibrated = True

    def freeze(self) -> None:
        """Keep the present grid whatever is observed from now on."""
        self.observer.frozen.fill_(True)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` on the grid: same shape and dtype. Raises MicronetError before any range is known."""
        if self.observing:
            self.observe(x)
        self.check_calibrated()
        return fake_quantize(x, self.qparams(x))

    def integers(self, x: Tensor) -> Tensor:
        """Return the integers of ``x``, as float32."""
        self.check_calibrated()
        return quantize(x, self.qparams(x))

    def check_calibrated(self) -> None:
        """Raise MicronetError where the quantizer has no range yet."""
        if not self._calibrated:  # asked of the tensor once, not at every step
            if not bool((self.scale > 0).all()):
                raise MicronetError(
                    "a quantizer is not calibrated: run micronet.calibrate(model, batches) first, "
                    "or train inside micronet.observing(model)"
                )
            self._calibrated = True


def rebuild(described: dict[str, Any]) -> Quantizer:
    """Make the quantizer that ``describe`` described, uncalibrated."""
    arguments = dict(described)
    scheme = registry.resolve(registry.SCHEMES, arguments.pop("scheme"), "method")
    quantizer: Quantizer = scheme.rebuild(**arguments)
    return quantizer
