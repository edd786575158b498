"""What every quantizer is: a module that puts a tensor on a grid of few levels and can name the integers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from micronet import registry
from micronet.errors import MicronetError
from micronet.models.uncompiled import uncompiled
from micronet.quantization.functional import QParams, fake_quantize, to_integers
from micronet.quantization.observers import Observer

NOT_CALIBRATED = (
    "a quantizer is not calibrated: run micronet.calibrate(model, batches) first, "
    "or train inside micronet.observing(model)"
)


class Quantizer(nn.Module):
    """Base of all schemes' quantizers.

    A subclass gives ``scheme``, ``qparams`` and ``describe``. The law: (integers(x) - zero_point) * scale ==
    forward(x).
    """

    scheme: str
    ranged = False  # whether it has a range that follows data or is trained

    def __init__(self, bits: int, axis: int | None, channels: int | None) -> None:
        super().__init__()
        self.bits = bits
        self.axis = axis
        self.channels = channels
        self.observing = False
        self.recorder: Callable[[Tensor], None] | None = None  # hears of what passes, which then passes unchanged

    def qparams(self, x: Tensor) -> QParams:
        """Return the grid for ``x``."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """Return what ``rebuild`` needs to make an equal quantizer, JSON values only."""
        raise NotImplementedError

    def scaled(self, factor: Tensor, x: Tensor, axis: int) -> "Quantizer":
        """Return the frozen quantizer of ``factor * x`` that keeps x's integers; factor: (channels,), on ``axis``."""
        raise NotImplementedError

    def observe(self, x: Tensor, *, rectified: bool = False) -> None:
        """Let the quantizer's range, where it has one, follow ``x``; ``rectified``: what is above 0 of it."""

    def set_range(self, low: float, high: float) -> None:
        """Cover [low, high] from now on, where the quantizer has a range."""

    def freeze(self) -> None:
        """Keep the present grid whatever is observed from now on."""

    @property
    def unit_levels(self) -> bool:
        """Whether every value on the grid is -1, 0 or 1 times the scale."""
        return False

    @property
    def frozen(self) -> bool:
        """Whether the grid stays as it is."""
        return False

    @property
    def empty(self) -> bool:
        """Whether the grid awaits data."""
        return False

    @uncompiled  # its branches depend on tensor values
    def forward(self, x: Tensor, *, rectified: bool = False) -> Tensor:
        """Return ``x`` on the grid: same shape and dtype. Raises MicronetError before any range is known.

        ``rectified``: relu(x) on the grid. One that begins at 0 clamps as the ReLU does, and saves its two passes.
        """
        if rectified and (self.recorder is not None or not self._begins_at_zero(x)):
            x, rectified = F.relu(x), False
        if self.recorder is not None:
            self.recorder(x)
            return x
        if self.observing:
            self.observe(x, rectified=rectified)
        self.check_calibrated()
        return self.project_rectified(x) if rectified else self.project(x)

    def _begins_at_zero(self, x: Tensor) -> bool:
        grid = self.qparams(x)
        return grid.qmin == 0 and not bool(grid.zero_point)

    def project_rectified(self, x: Tensor) -> Tensor:
        """Return ``project(relu(x))`` on a grid that begins at 0."""
        return fake_quantize(x, self.qparams(x), rectified=True)

    def project(self, x: Tensor) -> Tensor:
        """Return ``x`` on the grid, with the scheme's gradient."""
        return fake_quantize(x, self.qparams(x))

    def integers(self, x: Tensor) -> Tensor:
        """Return the integers of ``x``, as float32."""
        self.check_calibrated()
        return to_integers(x, self.qparams(x))

    def check_calibrated(self) -> None:
        """Raise MicronetError where the quantizer has no range yet."""


class RangedQuantizer(Quantizer):
    """A quantizer whose scale and zero point are buffers that follow an observed range."""

    ranged = True
    observer: Observer
    scale: Tensor
    zero_point: Tensor

    def __init__(self, bits: int, axis: int | None, channels: int | None) -> None:
        super().__init__(bits, axis, channels)
        shape = () if channels is None else (channels,)
        self._calibrated = False
        self.register_buffer("scale", torch.full(shape, torch.nan))
        self.register_buffer("zero_point", torch.zeros(shape))

    def refresh(self) -> None:
        """Compute scale and zero point from the observed range."""
        raise NotImplementedError

    def set_range(self, low: float, high: float) -> None:
        """Cover [low, high] from now on."""
        self.observer.low.fill_(low)
        self.observer.high.fill_(high)
        self.refresh()
        self._calibrated = True

    def observe(self, x: Tensor, *, rectified: bool = False) -> None:
        """Let the observer see ``x`` and follow its range; a frozen range stays."""
        if not self.observer.frozen:
            self.observer(x, rectified=rectified)
            self.refresh()
            self._calibrated = True

    def freeze(self) -> None:
        """Keep the present grid whatever is observed from now on."""
        self.observer.frozen.fill_(True)

    @property
    def frozen(self) -> bool:
        """Whether the grid stays as it is."""
        return bool(self.observer.frozen)

    @property
    def empty(self) -> bool:
        """Whether nothing was observed yet."""
        return self.observer.empty

    def check_calibrated(self) -> None:
        """Raise MicronetError where the quantizer has no range yet."""
        if not self._calibrated:  # asked of the tensor once, not at every step
            if not bool((self.scale > 0).all()):
                raise MicronetError(NOT_CALIBRATED)
            self._calibrated = True


def rebuild(described: dict[str, Any], like: Tensor) -> Quantizer:
    """Return the uncalibrated quantizer that ``describe`` described.

    Args:
        described: The constructor's arguments and the scheme's name.
        like: A tensor whose device the quantizer goes to, and whose dtype it takes if that is wider than float32.
    """
    arguments = dict(described)
    build = registry.resolve(registry.QUANTIZERS, arguments.pop("scheme"), "quantizer")
    quantizer: Quantizer = build(**arguments)
    return quantizer.to(like.device, torch.promote_types(like.dtype, torch.float32))
