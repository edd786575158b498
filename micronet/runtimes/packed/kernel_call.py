"""Kernel calls: instructions before their feature maps have addresses, and how they are encoded for the interpreter."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from micronet.packed.program import Operation
from micronet.runtimes.packed import weight_layout
from micronet.runtimes.packed.kernels.activation import NUMBERS
from micronet.runtimes.packed.kernels.cpu import BITS, FLOAT32, ITEM_BYTES, UINT8
from micronet.runtimes.packed.kernels.instructions import CONV, ELEMENTWISE, INSTRUCTION, SCALE, TO_NHWC
from micronet.runtimes.packed.memory import Array, ConstantPool, FeatureMap


class Epilogue(NamedTuple):
    """Operations fused into the one that computes their input: activation, clip, then sign or quantize.

    value: the number of the program's value after them. quantize: the attributes of a quantize operation.
    """

    value: int
    clip_low: float = -math.inf
    clip_high: float = math.inf
    dtype: int = FLOAT32
    quantize: dict[str, Any] = {}  # noqa: RUF012 - never written
    activation: str = ""
    alpha: float = 0.0
    beta: float = 0.0

    @property
    def clips(self) -> bool:
        """Return True if values are clipped."""
        return self.clip_low > -math.inf or self.clip_high < math.inf

    def clipped(self, operation: Operation) -> "Epilogue":
        """Return this epilogue with a relu or clip."""
        low, high = operation.attributes.get("bounds", [0, math.inf])
        return self._replace(clip_low=low, clip_high=high)

    def activated(self, operation: Operation) -> "Epilogue":
        """Return this epilogue with an activation."""
        alpha, beta = (operation.attributes.get(name, 0.0) for name in ("alpha", "beta"))
        return self._replace(activation=operation.kind, alpha=alpha, beta=beta)

    def fields(self) -> dict[str, Any]:
        """Return the bounds and the activation as fields of an instruction."""
        found = {"clip_low": self.clip_low, "clip_high": self.clip_high}
        if self.activation:
            found |= {"activation": NUMBERS[self.activation], "alpha": self.alpha, "beta": self.beta}
        if self.dtype == UINT8:
            low, high = self.quantize["range"]
            zero_point = self.quantize["zero_point"]
            found |= {"level_low": low - zero_point, "level_high": high - zero_point}
        return found


@dataclass
class KernelCall:
    """One instruction to encode. ``fields``: those that do not depend on addresses.

    pads, dilation, weight (outputs, kernel rows, kernel columns, inputs): of a convolution. x_channel, out_channel:
    the first channel that it reads and writes. out_pixel: the first row and column that it writes. places: what a move
    or an interpolation reads, as offsets in its input.
    """

    fields: dict[str, Any]
    x: FeatureMap
    out: FeatureMap
    y: FeatureMap | None = None
    pads: list[int] = field(default_factory=lambda: [0, 0, 0, 0])
    dilation: list[int] = field(default_factory=lambda: [1, 1])
    x_channel: int = 0
    out_channel: int = 0
    out_pixel: tuple[int, int] = (0, 0)
    weight: Array | None = None
    places: Callable[[FeatureMap], list[int]] | None = None

    def encode(self, constants: ConstantPool) -> tuple[Any, ...]:
        """Return a row of the instruction table; the weights are added to the constants."""
        x, out, y = self.x, self.out, self.y
        fields: dict[str, Any] = dict.fromkeys(INSTRUCTION.names or (), 0)
        fields |= {
            "rows": out.rows, "columns": out.columns, "channels": x.channels, "stride_y": 1, "stride_x": 1,
            "limits": -1, "x_zero_point": x.zero_point, "x_scale": x.scale, "out_zero_point": out.zero_point,
            "out_scale": out.scale,
        } | self.fields  # fmt: skip
        for side, each in (("x", x), ("out", out), ("y", y)):
            if each is not None:
                fields |= {
                    side: each.start([0, 0, 0, 0]), f"{side}_buffer": each.buffer, f"{side}_image": each.image_bytes,
                    f"{side}_row": each.row_bytes, f"{side}_pixel": each.pixel_bytes, f"{side}_dtype": each.dtype,
                }  # fmt: skip
        fields["x"] = x.start(self.pads) + x.channel_offset(self.x_channel)
        row, column = self.out_pixel
        fields["out"] += out.channel_offset(self.out_channel) + row * out.row_bytes + column * out.pixel_bytes
        if self.places:
            fields["places"] = constants.add("offsets", self.places(x))
        if y is not None:
            fields |= {"y_zero_point": y.zero_point, "y_scale": y.scale}
            if (y.rows, y.columns) != (x.rows, x.columns):
                fields |= {"y_row": 0, "y_pixel": 0}  # broadcast one pixel
        if self.weight is not None:
            fields |= self._weight_fields(self.weight, constants)
        if fields["opcode"] == CONV and out.columns == 1:
            fields["stride_x"] = 1  # so that a block of pixels does not read beyond the map
        whole_rows = fields["opcode"] == ELEMENTWISE and fields["function"] != SCALE and out.channels == x.channels
        whole_rows = whole_rows and (x.channels % 32 == 0 or BITS not in (x.dtype, out.dtype, y and y.dtype))
        if whole_rows and (y is None or fields["y_row"]):
            fields |= {"channels": x.columns * x.channels, "columns": 1}  # the pixels of a row are contiguous
        fields["scratch"] = max(fields["scratch"], fields["channels"])
        if fields["opcode"] == TO_NHWC:
            fields |= {"x_row": x.channel_offset(x.columns), "scratch": x.columns * x.channels}
        return tuple(fields[name] for name in INSTRUCTION.names or ())

    def _weight_fields(self, weight: Array, constants: ConstantPool) -> dict[str, int]:
        """Pack a convolution's weights; a row of the kernel is one run if its pixels are contiguous."""
        x, arithmetic = self.x, self.fields["arithmetic"]
        _, rows, columns, inputs = weight.shape
        dy, dx = self.dilation
        if self.fields.get("depthwise"):
            taps = [
                row * dy * x.row_bytes + column * dx * x.pixel_bytes for row in range(rows) for column in range(columns)
            ]
            return {
                "weights": constants.add("bytes", weight_layout.pack_depthwise(weight)),
                "runs": constants.add("offsets", taps), "run_count": len(taps), "run_bytes": ITEM_BYTES,
                "vectors": weight_layout.vector_count(arithmetic, len(weight)),
            }  # fmt: skip
        whole_pixels = x.pixel_bytes == x.channel_offset(inputs) and (x.dtype != BITS or inputs % 32 == 0)
        run_columns = 1 if whole_pixels and dx == 1 else columns  # runs per row of the kernel
        offsets = [
            row * dy * x.row_bytes + column * dx * x.pixel_bytes for row in range(rows) for column in range(run_columns)
        ]
        widen_after = weight_layout.widen_interval(weight, arithmetic)
        run_bytes = -(-(weight[0].size // len(offsets)) // weight_layout.ITEM_VALUES[arithmetic]) * ITEM_BYTES
        planes = weight_layout.plane_count(weight, arithmetic)
        parts, length = weight_layout.split_runs(planes * offsets, run_bytes, widen_after)
        return {
            "weights": constants.add("bytes", weight_layout.pack_weights(weight, arithmetic, len(offsets))),
            "runs": constants.add("offsets", parts), "run_count": len(parts), "run_bytes": length,
            "widen_after": widen_after, "vectors": weight_layout.vector_count(arithmetic, len(weight)),
        }  # fmt: skip
