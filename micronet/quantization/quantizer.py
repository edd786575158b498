"""The base of all quantizers: modules that round a tensor to a grid of few levels and can return its integers."""

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
    "a quantizer has no range yet; run micronet.calibrate(model, batches), or train inside micronet.observing(model)"
)


class Quantizer(nn.Module):
    """Base of the quantizers of all schemes.

    A subclass defines ``scheme``, ``arguments`` and ``qparams``. The law of every quantizer:
    (integers(x) - zero_point) * scale == forward(x).
    """

    scheme: str
    arguments: tuple[str, ...]  # of the constructor; each is an attribute too
    ranged = False  # whether it has a range, observed or trained

    def __init__(self, bits: int, axis: int | None, channels: int | None) -> None:
        super().__init__()
        self.bits = bits
        self.axis = axis
        self.channels = channels
        self.unit_levels = False  # whether every value on the grid is -1, 0 or 1 times the scale
        self.observing = False
        self.recorder: Callable[[Tensor], None] | None = (
            None  # if set, it receives each input, and forward changes nothing
        )

    def qparams(self, x: Tensor) -> QParams:
        """Return the grid for ``x``."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """Return the JSON object from which ``rebuild`` makes an equal quantizer."""
        return {"scheme": self.scheme, **{name: getattr(self, name) for name in self.arguments}}

    def scaled(self, factor: Tensor, x: Tensor, axis: int) -> "Quantizer":
        """Return the frozen quantizer of ``factor * x``, with the integers of ``x``; factor: (channels,)."""
        raise NotImplementedError

    def observe(self, x: Tensor, *, rectified: bool = False) -> None:
        """Update the range, if there is one, from ``x``; ``rectified``: from relu(x)."""

    def set_range(self, low: float, high: float) -> None:
        """Set the range, if there is one, to [low, high]."""

    def freeze(self) -> None:
        """Fix the grid: nothing observed later changes it."""

    @property
    def frozen(self) -> bool:
        """Whether the grid is fixed."""
        return False

    @property
    def empty(self) -> bool:
        """Whether no data has been observed yet."""
        return False

    @uncompiled  # its branches depend on tensor values
    def forward(self, x: Tensor, *, rectified: bool = False) -> Tensor:
        """Return ``x`` rounded to the grid, with the same shape and dtype; observe it first if ``observing``.

        Args:
            x: Any shape.
            rectified: Round relu(x). A grid that begins at 0 clamps anyway, so this saves the ReLU's two passes.

        Raises:
            MicronetError: No range is known yet.
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
        """Return ``project(relu(x))``; the grid must begin at 0."""
        return fake_quantize(x, self.qparams(x), rectified=True)

    def project(self, x: Tensor) -> Tensor:
        """Return ``x`` rounded to the grid, with the scheme's gradient."""
        return fake_quantize(x, self.qparams(x))

    def integers(self, x: Tensor) -> Tensor:
        """Return the integers of ``x``, stored as floats."""
        self.check_calibrated()
        return to_integers(x, self.qparams(x))

    def check_calibrated(self) -> None:
        """Raise MicronetError if no range is known yet."""


class RangedQuantizer(Quantizer):
    """A quantizer whose scale and zero point are buffers, computed from an observed range."""

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
        """Set the range to [low, high]."""
        self.observer.low.fill_(low)
        self.observer.high.fill_(high)
        self.refresh()
        self._calibrated = True

    def observe(self, x: Tensor, *, rectified: bool = False) -> None:
        """Update the range from ``x`` unless it is frozen."""
        if not self.observer.frozen:
            self.observer(x, rectified=rectified)
            self.refresh()
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

    def check_calibrated(self) -> None:
        """Raise MicronetError if no range is known yet."""
        if not self._calibrated:  # read from the tensor once, not at every step
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
