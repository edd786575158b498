"""The base of all quantizers: modules that round a tensor to a grid of few levels and can return its integers."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from micronet import registry
from micronet.errors import MicronetError
from micronet.models.uncompiled import uncompiled
from micronet.quantization.config import NUMBERS
from micronet.quantization.functional import QParams, fake_quantize, to_integers

MOST_BITS = NUMBERS[-1] + 1  # the odd integers of DoReFa's 16 bits take 17


class Quantizer(nn.Module):
    """Base of the quantizers of all schemes.

    A subclass defines ``scheme`` and ``qparams``, and has an attribute for each argument of its constructor. The law of
    every quantizer: (integers(x) - zero_point) * scale == forward(x).
    """

    scheme: str
    symmetric = True  # whether the zero point is always 0
    ranged = False  # whether it has a range, observed or trained

    def __init__(self, bits: int, axis: int | None, channels: int | None) -> None:
        super().__init__()
        if not 1 <= bits <= MOST_BITS:
            raise ValueError(f"a quantizer has {bits} bits; expected 1 to {MOST_BITS}")
        self.bits = bits
        self.axis = axis
        self.channels = channels
        self.unit_levels = False  # whether every value on the grid is -1, 0 or 1 times the scale
        self.observing = False
        self.recorder: Callable[[Tensor], None] | None = None  # receives each input, which forward then returns as is
        self._calibrated = False  # read from the tensors once, not at every step

    def qparams(self, x: Tensor) -> QParams:
        """Return the grid for ``x``."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """Return the JSON object from which ``rebuild`` makes an equal quantizer."""
        return {
            "scheme": self.scheme,
            **{name: getattr(self, name) for name in inspect.signature(type(self)).parameters},
        }

    def observe(self, x: Tensor, *, rectified: bool = False) -> None:
        """Update the range, if there is one, from ``x``; ``rectified``: from relu(x)."""

    def set_range(self, low: float, high: float) -> None:
        """Set the range, if there is one, to [low, high]."""

    def freeze(self) -> None:
        """Fix the grid: nothing observed later changes it."""

    @property
    def frozen(self) -> bool:
        """Whether the range is fixed. True for quantizers without a range."""
        return True

    @property
    def empty(self) -> bool:
        """Whether no data has been observed yet."""
        return False

    def check_calibrated(self) -> None:
        """Raise MicronetError if no range is known yet."""
        if not self._calibrated:
            if self.empty:
                raise MicronetError(
                    "a quantizer has no range yet; call micronet.calibrate(model, batches), or train inside "
                    "micronet.observing(model)"
                )
            self._calibrated = True

    @uncompiled  # its branches depend on tensor values
    def forward(self, x: Tensor, *, rectified: bool = False) -> Tensor:
        """Return ``x`` rounded to the grid, with the same shape and dtype; observe it first if ``observing``.

        Args:
            x: Any shape.
            rectified: Round relu(x). A grid that begins at 0 clamps anyway, so this saves the ReLU's two passes.

        Raises:
            MicronetError: No range is known yet.
        """
        if rectified:
            grid = self.qparams(x)
            if self.recorder is not None or grid.qmin != 0 or bool(grid.zero_point):
                x, rectified = F.relu(x), False
        if self.recorder is not None:
            self.recorder(x)
            return x
        if self.observing:
            self.observe(x, rectified=rectified)
        self.check_calibrated()
        return self.project(x, rectified=rectified)

    def project(self, x: Tensor, *, rectified: bool = False) -> Tensor:
        """Return ``x``, or relu(x) if the grid begins at 0, rounded to the grid, with the scheme's gradient."""
        return fake_quantize(x, self.qparams(x), rectified=rectified)

    def integers(self, x: Tensor) -> Tensor:
        """Return the integers of ``x``, stored as floats."""
        self.check_calibrated()
        return to_integers(x, self.qparams(x))

    @torch.no_grad()
    def scaled(self, factor: Tensor, x: Tensor, axis: int) -> "Quantizer":
        """Return the frozen quantizer of the weight ``factor * x``, which has the integers of ``x``.

        ``factor``: (channels,), on ``axis``. A negative one negates the integers; 0 gives the scale 1 and integers 0.
        """
        grid = self.qparams(x)
        described = {"scheme": "iao", "bits": grid.qmax.bit_length() + 1, "symmetric": self.symmetric, "signed": True}
        described |= {"narrow": True, "observer": "minmax", "axis": axis, "channels": len(factor)}
        other: Any = rebuild(described, grid.scale)
        other.scale.copy_(torch.where(factor == 0, 1.0, grid.scale * factor.abs()))
        other.zero_point.copy_(grid.zero_point * factor.sign())
        other.observer.low.copy_((other.qmin - other.zero_point) * other.scale)
        other.observer.high.copy_((other.qmax - other.zero_point) * other.scale)
        other.freeze()
        return other  # type: ignore[no-any-return]


def rebuild(described: dict[str, Any], like: Tensor) -> Quantizer:
    """Return the uncalibrated quantizer that ``describe`` described.

    It goes to the device of ``like``, and takes its dtype if that is wider than float32.
    """
    arguments = dict(described)
    build = registry.resolve(registry.QUANTIZERS, arguments.pop("scheme"), "quantizer")
    quantizer: Quantizer = build(**arguments)
    return quantizer.to(like.device, torch.promote_types(like.dtype, torch.float32))
