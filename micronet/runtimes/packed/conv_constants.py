"""The arithmetic of convolutions and linear layers, and their limits, scales and biases as the kernels read them."""

from typing import Any, NamedTuple

import numpy as np

from micronet.packed.program import Operation
from micronet.runtimes.packed import weight_layout
from micronet.runtimes.packed.kernel_call import Epilogue
from micronet.runtimes.packed.kernels.cpu import BIT_VECTOR_MULTIPLE, BITS, FLOAT32, LANES, UINT8
from micronet.runtimes.packed.memory import Array, ConstantPool, FeatureMap, UnsupportedProgram
from micronet.runtimes.packed.numpy_layers import EXACT_FLOAT32

UNREACHABLE = {BITS: -1, UINT8: 2**31 - 1, FLOAT32: 0x7F800000}  # limits that no sum passes; the last one is infinity


class ConvGroup(NamedTuple):
    """One channel group of a convolution or linear layer.

    outputs: its slice of the operation's output channels. out_size: output rows and columns.
    weight: (outputs, kernel rows, kernel columns, inputs), divided by their greatest common divisor ``factor``.
    """

    operation: Operation
    outputs: slice
    weight: Array
    factor: int
    arithmetic: int
    x: FeatureMap
    pads: list[int]
    stride: list[int]
    dilation: list[int]
    out_size: tuple[int, int]

    def constant_fields(self, constants: ConstantPool, epilogue: Epilogue) -> dict[str, Any]:
        """Add limits to compare sums with, or scales and biases, to the constants; return the fields that name them."""
        weight, arithmetic, operation = self.weight, self.arithmetic, self.operation
        planes = weight_layout.plane_count(weight, arithmetic)
        rows, row_masks = self._border_classes(0)
        columns, column_masks = self._border_classes(1)
        base = np.zeros((1, 1, len(weight)), np.int64)
        if arithmetic == BITS:  # sum = products - (2 / planes) * differing bits + correction for padding, read as -1
            inside = np.einsum("ohw,rh,cw->rco", weight.sum(3).astype(np.int64), row_masks, column_masks)
            base = weight[0].size + weight.sum((1, 2, 3)) - inside
        else:
            rows, columns, column_masks = np.zeros_like(rows), np.zeros_like(columns), column_masks[:1]
        if arithmetic == UINT8:  # padding holds the zero point, so it contributes nothing
            base = base - self.x.zero_point * weight.sum((1, 2, 3)).astype(np.int64)
        size = weight_layout.limit_bytes(weight, arithmetic) if operation.limits is not None else 4
        class_bytes = weight_layout.vector_count(arithmetic, len(weight)) * LANES * size
        fields: dict[str, Any] = {
            "row_class": constants.add("ints", rows * len(column_masks) * class_bytes),
            "column_class": constants.add("ints", columns * class_bytes),
            "factor": self.factor * (-2 // planes if arithmetic == BITS else 1),
        }
        floats_to_signs = (
            arithmetic == FLOAT32 and epilogue.dtype == BITS and not (epilogue.clips or epilogue.activation)
        )
        if operation.limits is not None:
            limits = self._limits(operation.limits[self.outputs].astype(np.int64), base, planes)
        elif floats_to_signs and operation.scale is None:  # sum + bias >= 0 is sum >= -bias
            limits = (-self._bias().astype(np.float32)).view(np.int32)[None, None]
        else:
            return fields | self._scales(base * self.factor, constants)
        limits = self._padded(limits, UNREACHABLE[arithmetic])
        fields["limits"] = constants.add("ints", weight_layout.strict_limits(limits, size) if size < 4 else limits)
        return fields

    def _limits(self, limits: Array, base: Array, planes: int) -> Array:
        """Return what each sum is compared with to give +1: (row classes, column classes, outputs)."""
        if self.arithmetic == FLOAT32:
            return limits[None, None].astype(np.float32).view(np.int32)
        limits = -(-limits // self.factor)  # for sums of weights without their factor
        if self.arithmetic == UINT8:
            return (limits - base).clip(-(2**31) + 1, 2**31 - 1)
        return ((base - limits) // (2 // planes)).clip(-1, 2**31 - 1)

    def _bias(self) -> Array:
        bias = self.operation.bias
        return np.zeros(len(self.weight), np.float32) if bias is None else bias[self.outputs]

    def _scales(self, base: Array, constants: ConstantPool) -> dict[str, int]:
        operation, bias = self.operation, self._bias()
        assert operation.weight is not None
        scale = np.full(len(self.weight), self.x.scale if self.arithmetic == UINT8 else 1, np.float32)
        if operation.scale is not None:
            scale = np.broadcast_to(operation.scale, operation.weight.shape[0])[self.outputs] * scale
        if bias.dtype == np.int32 and self.arithmetic == FLOAT32:
            bias = bias.astype(np.float32) * scale
        elif bias.dtype == np.int32:
            base, bias = base + bias, np.zeros(len(bias))
        largest = np.abs(self.weight.astype(np.float64)).sum((1, 2, 3)) * (256 if self.arithmetic == UINT8 else 1)
        if self.arithmetic != FLOAT32 and (np.abs(base) + largest).max() >= 2**31:
            raise UnsupportedProgram("sums of more than 32 bits")
        return {
            "base": constants.add("ints", self._padded(base)),
            "scale": constants.add("floats", self._padded(scale[None, None])),
            "bias": constants.add("floats", self._padded(bias[None, None])),
        }

    def _padded(self, values: Array, fill: int = 0) -> Array:
        """Pad (row classes, column classes, outputs) to whole vectors of outputs."""
        lanes = weight_layout.vector_count(self.arithmetic, len(self.weight)) * LANES
        return np.pad(values, ((0, 0), (0, 0), (0, lanes - values.shape[-1])), constant_values=fill)

    def _border_classes(self, axis: int) -> tuple[Array, Array]:
        """Return each output position's class, and per class a mask of the kernel positions that lie inside the map."""
        starts = np.arange(self.out_size[axis]) * self.stride[axis] - self.pads[axis]
        places = starts[:, None] + np.arange(self.weight.shape[1 + axis]) * self.dilation[axis]
        inside = (places >= 0) & (places < (self.x.rows, self.x.columns)[axis])
        masks, classes = np.unique(inside, axis=0, return_inverse=True)
        return classes.reshape(-1), masks.astype(np.int64)


def split_factor(weight: Array, arithmetic: int) -> tuple[Array, int]:
    """Return weights divided by their greatest common divisor, and that divisor; 1 for float arithmetic."""
    if arithmetic == FLOAT32:
        return weight, 1
    factor = max(1, int(np.gcd.reduce(np.abs(weight), axis=None)))
    return weight // factor, factor


def choose_arithmetic(weight: Array, x: FeatureMap) -> int:
    """Return BITS, UINT8 or FLOAT32. Raises UnsupportedProgram if none is exact."""
    if weight.dtype.kind != "i" or x.dtype == FLOAT32:
        return FLOAT32
    magnitudes = np.abs(weight.astype(np.int64))
    if x.dtype == BITS:
        largest = max(1, int(magnitudes.max()))
        return BITS if np.isin(weight, (-largest, 0, largest)).all() else float_arithmetic(weight)
    if magnitudes.max() > 255 or magnitudes.reshape(len(weight), -1).sum(1).max() * 255 > 2**31 - 1:
        raise UnsupportedProgram("weights of more than 8 bits")
    return UINT8


def float_arithmetic(weight: Array) -> int:
    """Return FLOAT32 if it is exact for signs. Raises UnsupportedProgram if it is not."""
    if np.abs(weight.astype(np.int64)).reshape(len(weight), -1).sum(1).max() >= EXACT_FLOAT32:
        raise UnsupportedProgram("sums of signs multiplied by large weights")
    return FLOAT32


def merge_groups(weight: Array, groups: int, arithmetic: int, out_dtype: int) -> tuple[Array, int]:
    """Merge channel groups that are too small or not whole bytes, with zero weights between them.

    weight: (outputs, kernel rows, kernel columns, inputs per group). Returns the weights and the number of groups.
    """
    outputs, rows, columns, inputs = weight.shape
    each = outputs // groups
    for together in (size for size in range(1, groups + 1) if groups % size == 0):
        whole = not (together * inputs % 8 and arithmetic == BITS) and not (
            together * each % (LANES * BIT_VECTOR_MULTIPLE) and out_dtype == BITS
        )
        if together == groups or (whole and together * each >= LANES):
            break
    if together == 1:
        return weight, groups
    merged = np.zeros((outputs, rows, columns, inputs * together), weight.dtype)
    for channel in range(outputs):
        first = channel // each % together * inputs
        merged[channel, ..., first : first + inputs] = weight[channel]
    return merged, groups // together
