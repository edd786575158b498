"""Instructions before their feature maps have addresses, and the operations fused into them."""

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from micronet.runtimes.packed.feature_maps import Array, FeatureMap
from micronet.runtimes.packed.kernels.cpu import FLOAT32, UINT8


class Epilogue(NamedTuple):
    """Operations fused into the one that computes their input: clip, then sign or quantize.

    value: the number of the program's value after them. quantize: the attributes of a quantize operation.
    """

    value: int
    clip_low: float = -math.inf
    clip_high: float = math.inf
    dtype: int = FLOAT32
    quantize: dict[str, Any] = {}  # noqa: RUF012 - never written

    @property
    def clips(self) -> bool:
        """Return True if values are clipped."""
        return self.clip_low > -math.inf or self.clip_high < math.inf

    def fields(self) -> dict[str, float]:
        """Return the bounds as fields of an instruction."""
        found = {"clip_low": self.clip_low, "clip_high": self.clip_high}
        if self.dtype == UINT8:
            low, high = self.quantize["range"]
            zero_point = self.quantize["zero_point"]
            found |= {"level_low": low - zero_point, "level_high": high - zero_point}
        return found


@dataclass
class KernelCall:
    """One instruction to encode. ``fields``: those that do not depend on addresses.

    pads, dilation, weight (outputs, kernel rows, kernel columns, inputs): of a convolution. x_channel, out_channel:
    the first channel that it reads and writes.
    """

    fields: dict[str, Any]
    x: FeatureMap
    out: FeatureMap
    y: FeatureMap | None = None
    pads: list[int] = field(default_factory=lambda: [0, 0, 0, 0])
    dilation: list[int] = field(default_factory=lambda: [1, 1])
    x_channel: int = 0
    out_channel: int = 0
    weight: Array | None = None
