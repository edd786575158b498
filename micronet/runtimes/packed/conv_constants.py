"""The numbers of a layer, as the compiled steps read them."""

from typing import Any, NamedTuple

import numpy as np

from micronet.packed.program import Operation
from micronet.runtimes.packed.feature_maps import LINE, Array, Finish, Map, Unfit, zeros
from micronet.runtimes.packed.kernels.cpu import BITS, FEWEST, FLOATS, INTEGERS, LANES
from micronet.runtimes.packed.numpy_backend import EXACT_FLOAT32
from micronet.runtimes.packed.weight_layout import (
    below,
    border_classes,
    border_sums,
    limit_bytes,
    planes_of,
    vectors_of,
)

NEVER = {BITS: -1, INTEGERS: 2**31 - 1, FLOATS: 0x7F800000}  # limits that no sum passes; infinity


class Constants:
    """The numbers of all steps, by kind."""

    def __init__(self) -> None:
        self._parts: dict[str, list[Array]] = {"bytes": [], "ints": [], "offsets": [], "floats": []}
        self._sizes = dict.fromkeys(self._parts, 0)

    def _keep(self, name: str, values: Array) -> int:
        at = self._sizes[name]
        self._parts[name].append(values.ravel())
        self._sizes[name] += values.size
        return at

    def bytes(self, values: Array) -> int:
        """Keep bytes, from a cache line on, and return where they begin."""
        room = np.zeros(-(-values.size // LINE) * LINE, np.uint8)
        room[: values.size] = values
        return self._keep("bytes", room)

    def ints(self, values: Array) -> int:
        """Keep int32 and return where they begin. Raises Unfit where they are wider."""
        if values.size and not -(2**31) <= values.min() <= values.max() < 2**31:
            raise Unfit("sums of more than 32 bits")
        return self._keep("ints", values.astype(np.int32))

    def offsets(self, values: list[int]) -> int:
        """Keep int64 and return where they begin."""
        return self._keep("offsets", np.array(values, np.int64))

    def floats(self, values: Array) -> int:
        """Keep float32 and return where they begin."""
        return self._keep("floats", values.astype(np.float32))

    def arrays(self) -> tuple[Array, ...]:
        """Return all that was kept: uint8, int32, int64 and float32."""
        kinds = {"bytes": np.uint8, "ints": np.int32, "offsets": np.int64, "floats": np.float32}
        found = tuple(zeros(self._sizes[name], kind) for name, kind in kinds.items())
        for values, parts in zip(found, self._parts.values(), strict=True):
            np.concatenate([values[:0], *parts], out=values)
        return found


class Layer(NamedTuple):
    """A group of a layer: which outputs, their weights (outputs, rows, columns, inputs), and where they are taken."""

    operation: Operation
    part: slice
    weight: Array
    product: int
    x: Map
    pads: list[int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    sides: tuple[int, int]

    def units(self) -> tuple[Array, int]:
        """Return weights without the factor that all of them have, and that factor."""
        if self.product == FLOATS:
            return self.weight, 1
        factor = max(1, int(np.gcd.reduce(np.abs(self.weight), axis=None)))
        return self.weight // factor, factor

    def constants(self, constants: Constants, finish: Finish) -> dict[str, Any]:
        """Return the fields that hold a layer's numbers: limits to compare its sums with, or scales and biases."""
        weight, magnitude = self.units()
        operation, bits = self.operation, self.product == BITS
        planes = len(planes_of(weight, self.product))
        rows, row_masks = self._classes(0)
        columns, column_masks = self._classes(1)
        base = np.zeros((1, 1, len(weight)), np.int64)
        if bits:  # sum = products - (2 / planes) * differing + (what the padding, taken for -1, is off by)
            base = weight[0].size + weight.sum((1, 2, 3)) - border_sums(weight, row_masks, column_masks)
        else:
            rows, columns, column_masks = np.zeros_like(rows), np.zeros_like(columns), column_masks[:1]
        if self.product == INTEGERS:  # the padding is zero as stored, so that it weighs nothing
            base = base - self.x.zero * weight.sum((1, 2, 3)).astype(np.int64)
        size = limit_bytes(weight, self.product) if operation.limits is not None else 4
        across = vectors_of(self.product, len(weight)) * LANES * size  # bytes of a class
        found: dict[str, Any] = {
            "row_class": constants.ints(rows * len(column_masks) * across),
            "column_class": constants.ints(columns * across),
            "factor": magnitude * (-2 // planes if bits else 1),
        }  # fmt: skip
        if operation.limits is not None:
            limits = self._padded(self._limits(base, magnitude, planes), NEVER[self.product])
            found["limits"] = constants.ints(below(limits, size) if size < 4 else limits)
        elif self.product == FLOATS and finish.kind == BITS and not finish.clips and operation.scale is None:
            bias = np.zeros(len(weight)) if operation.bias is None else operation.bias[self.part]
            found["limits"] = constants.ints(
                self._padded((-bias.astype(np.float32)).view(np.int32)[None, None], NEVER[FLOATS])
            )
        else:
            found |= self._scales(base * magnitude, constants)
        return found

    def _limits(self, base: Array, magnitude: int, planes: int) -> Array:
        assert self.operation.limits is not None
        limits = self.operation.limits[self.part].astype(np.int64)
        if self.product == FLOATS:
            return np.broadcast_to(limits, (1, 1, len(limits))).astype(np.float32).view(np.int32)
        limits = -(-limits // magnitude)  # what the sum of weights without their factor is to be at least
        if self.product == INTEGERS:
            return (limits - base).clip(-(2**31) + 1, 2**31 - 1)
        return ((base - limits) // (2 // planes)).clip(-1, 2**31 - 1)

    def _scales(self, base: Array, constants: Constants) -> dict[str, int]:
        operation = self.operation
        unit = np.full(len(self.weight), self.x.scale if self.product == INTEGERS else 1, np.float32)
        if operation.scale is not None:
            own = np.broadcast_to(operation.scale, self.operation.weight.shape[0])[self.part]  # type: ignore[union-attr]
            unit = own * unit
        bias = np.zeros(len(self.weight), np.float32)
        if operation.bias is not None:
            if operation.bias.dtype == np.int32 and self.product != FLOATS:
                base = base + operation.bias[self.part]
            elif operation.bias.dtype == np.int32:
                bias = operation.bias[self.part].astype(np.float32) * unit
            else:
                bias = operation.bias[self.part]
        largest = np.abs(self.weight.astype(np.float64)).sum((1, 2, 3)) * (256 if self.product == INTEGERS else 1)
        if self.product != FLOATS and (np.abs(base) + largest).max() >= 2**31:
            raise Unfit("sums of more than 32 bits")
        return {
            "base": constants.ints(self._padded(base)), "unit": constants.floats(self._padded(unit[None, None])),
            "bias": constants.floats(self._padded(bias[None, None])),
        }  # fmt: skip

    def _padded(self, values: Array, fill: int = 0) -> Array:
        """(row classes, column classes, outputs) -> whole vectors of outputs."""
        lanes = vectors_of(self.product, len(self.weight)) * LANES
        return np.pad(values, ((0, 0), (0, 0), (0, lanes - values.shape[-1])), constant_values=fill)

    def _classes(self, axis: int) -> tuple[Array, Array]:
        size = (self.x.rows, self.x.columns)[axis]
        return border_classes(
            self.sides[axis], self.stride[axis], self.dilation[axis], self.weight.shape[1 + axis], self.pads[axis], size
        )


def product_of(weight: Array, x: Map) -> int:
    """Return which products a layer's sums are made of. Raises Unfit where none is exact."""
    if weight.dtype.kind != "i" or x.kind == FLOATS:
        return FLOATS
    largest = np.abs(weight.astype(np.int64))
    if x.kind == BITS:
        unit = max(1, int(largest.max()))
        return BITS if np.isin(weight, (-unit, 0, unit)).all() else as_reals(weight)
    if largest.max() > 255 or largest.reshape(len(weight), -1).sum(1).max() * 255 > 2**31 - 1:
        raise Unfit("weights of more than 8 bits")
    return INTEGERS


def as_reals(weight: Array) -> int:
    """Return the product of floats where it is exact for signs. Raises Unfit where it is not."""
    if np.abs(weight.astype(np.int64)).reshape(len(weight), -1).sum(1).max() >= EXACT_FLOAT32:
        raise Unfit("sums of signs and wide weights")
    return FLOATS


def merged(weight: Array, groups: int, product: int, out: int) -> tuple[Array, int]:
    """Join groups that are too small, or of no whole bytes: the weights between them are 0.

    weight: (outputs, rows, columns, inputs of a group).
    """
    outs, high, wide, inner = weight.shape
    each = outs // groups
    for together in (size for size in range(1, groups + 1) if groups % size == 0):
        whole = not (together * inner % 8 and product == BITS) and not (
            together * each % (LANES * FEWEST) and out == BITS
        )
        if together == groups or (whole and together * each >= LANES):
            break
    if together == 1:
        return weight, groups
    joined = np.zeros((outs, high, wide, inner * together), weight.dtype)
    for channel in range(outs):
        at = channel // each % together * inner
        joined[channel, ..., at : at + inner] = weight[channel]
    return joined, groups // together
