"""Convolutions, linear layers and thresholds as ncnn layers: int8 if their weights and inputs are, float otherwise.

A threshold, the sign of a sum of integers minus a limit, is a convolution too: the sum minus the limit plus one half,
clipped to -1/2 and 1/2 and multiplied by 2. This is exact for sums below 2^23, and refused beyond.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from micronet.packed.program import Operation
from micronet.runtimes.ncnn.layer import Parameter
from micronet.runtimes.ncnn.shapes import INT8_OUT, NO_WINOGRAD
from micronet.runtimes.ncnn.values import (
    MAX_INT8,
    QUANTIZE,
    Grid,
    NetworkBuilder,
    Step,
    Unsupported,
    Value,
    without_rounding,
)

ACTIVATIONS = "ncnn's activations are signed integers from -127 to 127 without a zero point, but not those read by"
WEIGHTS = "ncnn's weights are integers from -127 to 127, but not those of"
EXACT_HALVES = 1 << 23  # float32 has the halves below


@dataclass
class Activation:
    """An activation function that a layer computes itself: the numbers of ncnn's parameters 9 and 10."""

    kind: int = 0
    values: tuple[float, ...] = ()

    @property
    def parameters(self) -> dict[int, Parameter]:
        """The layer's parameters."""
        values: dict[int, Parameter] = {10: list(self.values)} if self.values else {}
        return {9: self.kind, **values} if self.kind else values


class Weights(NamedTuple):
    """The numbers of a layer as ncnn stores them."""

    weight: NDArray[Any]
    bias: NDArray[np.float32] | None
    scales: list[NDArray[np.float32]]  # of the weights and of the input, as factors from floats to integers

    @property
    def tensors(self) -> list[NDArray[Any]]:
        """The tensors in ncnn's order."""
        return [self.weight, *([] if self.bias is None else [self.bias]), *self.scales]


class Fused(NamedTuple):
    """The operations after a layer that ncnn computes with it."""

    operations: list[Operation]
    activation: Activation
    rounded: Grid | None  # the integers that the layer is to compute; None: floats


def lower_layer(builder: NetworkBuilder, operation: Operation, x: Value, fused: Fused, fp16_storage: bool) -> Value:
    """Add a convolution or linear layer.

    Args:
        builder: The network.
        operation: The layer.
        x: Its input.
        fused: What follows it.
        fp16_storage: Store float weights as float16.

    Returns:
        Its output; if it cannot compute integers itself, the floats before the rounding.

    Raises:
        Unsupported: ncnn's int8 cannot represent the weights or the inputs.
    """
    assert operation.weight is not None
    groups, (outputs, inputs) = operation.attributes.get("group", 1), operation.weight.shape[:2]
    integer = (why := why_float(operation, x)) is None
    if integer and groups > 1 and not inputs == outputs // groups == 1:
        return _lower_groups(builder, operation, x, fused)
    name, is_conv = operation.name, operation.kind != "linear"
    numbers = _int8(operation, x.grid) if integer else _float(operation, fp16_storage)
    source = builder.integers_of(x, name) if integer else builder.real_of(x, name)
    if not is_conv and len(builder.blobs[source].shape) > 1:
        source = builder.add("Flatten", f"{name}.flatten", source)
    parameters = _window(operation, numbers) if is_conv else _linear(numbers)
    tensors, rounded = numbers.tensors, fused.rounded if integer and is_conv else None
    if rounded is not None:
        parameters[8] = INT8_OUT
        tensors.append(np.array([1 / rounded.unit], np.float32))
    kind = ("ConvolutionDepthWise" if groups > 1 else "Convolution") if is_conv else "InnerProduct"
    blob = builder.add(kind, name, source, parameters=parameters | fused.activation.parameters, tensors=tensors)
    if not integer:  # as it is stored: dequantized, perhaps rounded to float16
        operation = replace(operation, weight=numbers.weight.astype(np.float32), scale=None, bias=numbers.bias)
    after = [each for each in fused.operations if rounded is not None or each.kind != "quantize"]
    builder.steps.append(Step([operation, *after], source, blob, x.grid, rounded, why))
    return Value(blob) if rounded is None else Value(None, rounded, blob)


def _lower_groups(builder: NetworkBuilder, operation: Operation, x: Value, fused: Fused) -> Value:
    """Add a grouped convolution as several ones.

    ncnn has one weight scale per group, and on x86 its grouped int8 convolutions that compute floats return
    uninitialized memory if a group has a multiple of 8 outputs (ConvolutionDepthWise_x86::forward_int8_x86).
    """
    assert operation.weight is not None
    groups, (outputs, inputs) = operation.attributes["group"], operation.weight.shape[:2]
    each = outputs // groups
    fused = fused._replace(rounded=None)
    if inputs == 1:  # the first outputs of all groups, then the second ones, and so on
        parts = [lower_layer(builder, _part(operation, slice(j, None, each), groups), x, fused, False)
                 for j in range(each)]  # fmt: skip
    else:
        raw = builder.raw_of(x)
        sliced = builder.add_slices(f"{operation.name}.slice", raw, groups)
        parts = [
            lower_layer(
                builder, _part(operation, slice(index * each, (index + 1) * each), 1), without_rounding(x, blob), fused,
                False,
            )
            for index, blob in enumerate(sliced)
        ]  # fmt: skip
    blobs = [part.raw or "" for part in parts]
    found = builder.add("Concat", f"{operation.name}.concat", *blobs, parameters={0: 0})
    if inputs == 1:
        found = builder.add("ShuffleChannel", f"{operation.name}.shuffle", found, parameters={0: each})
    return Value(found)


def _part(operation: Operation, outputs: slice, groups: int) -> Operation:
    """Return a layer that computes some of the outputs."""
    weight, scale = operation.weight, operation.scale
    assert weight is not None
    attributes = {key: value for key, value in operation.attributes.items() if key != "group"}
    return replace(
        operation, attributes=attributes | ({"group": groups} if groups > 1 else {}), weight=weight[outputs],
        scale=scale if scale is None or scale.size == 1 else scale[outputs],
        bias=None if operation.bias is None else operation.bias[outputs],
        limits=None if operation.limits is None else operation.limits[outputs],
    )  # fmt: skip


def why_float(operation: Operation, x: Value) -> str | None:
    """Return why ncnn computes a layer in float, or None if it computes it in int8."""
    assert operation.weight is not None
    if operation.weight.dtype.kind != "i":
        return "its weights are float"
    return "its input is not quantized" if x.grid is None else None


def _int8(operation: Operation, grid: Grid | None) -> Weights:
    assert operation.weight is not None and grid is not None
    weight, factor = operation.weight, 1
    if np.abs(weight).max(initial=0) > MAX_INT8 and operation.limits is None:  # multiples, as of few bits, may fit
        factor = max(1, int(np.gcd.reduce(np.abs(weight), axis=None)))
        weight = weight // factor
    if np.abs(weight).max(initial=0) > MAX_INT8:
        raise Unsupported(WEIGHTS, QUANTIZE)
    if not grid.fits:
        raise Unsupported(ACTIVATIONS, QUANTIZE)
    outputs = len(weight)
    if operation.limits is not None:
        scale, input_scale = np.ones(outputs, np.float32), 1.0
        bias: NDArray[np.float32] | None = _half_minus(operation.limits, _largest_sum(weight, grid))
    else:
        given = np.ones(1, np.float32) if operation.scale is None else operation.scale
        scale, input_scale = np.broadcast_to(given * np.float32(factor), outputs), grid.scale
        bias = _float_bias(operation, given.astype(np.float64) * input_scale)
    weight = np.where((scale == 0).reshape(-1, *[1] * (weight.ndim - 1)), 0, weight).astype(np.int8)
    scale = np.where(scale == 0, np.float32(1), scale)
    with np.errstate(all="ignore"):
        scales = [(1 / each.astype(np.float64)).astype(np.float32) for each in (scale, np.array([input_scale]))]
        product = scales[0] * scales[1]
        usable = np.isfinite(product).all() and np.isfinite(1 / product).all() and product.all()
    if not usable:
        raise Unsupported("its scales are too small or too large for ncnn")
    return Weights(weight, bias, scales)


def _largest_sum(weight: NDArray[Any], grid: Grid) -> int:
    """Return a bound on the sums of a threshold. Raises Unsupported if float32 does not tell all of them apart."""
    sums = np.abs(weight.astype(np.int64)).reshape(len(weight), -1).sum(1)
    largest = int(sums.max(initial=0)) * min(MAX_INT8, max(-grid.low, grid.high))
    if largest >= EXACT_HALVES:
        raise Unsupported(f"the sums that it takes the sign of can reach {largest:,}; ncnn's are exact below 2^23")
    return largest


def _half_minus(limits: NDArray[Any], largest: int) -> NDArray[np.float32]:
    """Return 1/2 minus each limit, exactly: limits beyond all sums are moved next to them."""
    return np.asarray(0.5 - limits.astype(np.float64).clip(-largest, largest + 1), np.float32)


def _float(operation: Operation, fp16_storage: bool) -> Weights:
    assert operation.weight is not None
    weight = operation.weight.astype(np.float32)
    if operation.scale is not None:
        weight = weight * operation.scale.reshape(-1, *[1] * (weight.ndim - 1))
    bias = _float_bias(operation, np.ones(len(weight)) if operation.scale is None else operation.scale)
    if operation.limits is not None:
        raise Unsupported("a sign of sums of integers needs quantized inputs")
    if fp16_storage:
        with np.errstate(over="ignore"):
            weight = weight.astype(np.float16)
        if not np.isfinite(weight).all():
            raise Unsupported("its weights are too large for float16", "do not store weights as float16")
    return Weights(weight, bias, [])


def _float_bias(operation: Operation, scale: NDArray[Any]) -> NDArray[np.float32] | None:
    if operation.bias is None:
        return None
    if operation.bias.dtype == np.int32:
        return np.asarray(operation.bias.astype(np.float64) * scale, np.float32)
    return operation.bias.astype(np.float32)


def _window(operation: Operation, numbers: Weights) -> dict[int, Parameter]:
    weight, attributes = numbers.weight, operation.attributes
    top, left, bottom, right = attributes.get("pads", [0, 0, 0, 0])
    (sy, sx), (dy, dx) = attributes.get("stride", [1, 1]), attributes.get("dilation", [1, 1])
    groups = attributes.get("group", 1)
    parameters: dict[int, Parameter] = {
        0: len(weight), 1: weight.shape[3], 11: weight.shape[2], 2: dx, 12: dy, 3: sx, 13: sy,
        4: left, 15: right, 14: top, 16: bottom, 5: int(numbers.bias is not None), 6: weight.size,
        **({7: groups} if groups > 1 else {}), **({8: 1} if numbers.scales else {}),
    }  # fmt: skip
    if numbers.scales and weight.shape[2:] == (3, 3):
        # Winograd's F(4, 3) computes 576 times a sum in 32 bits, which can overflow, and divides it as a float.
        parameters[31] = NO_WINOGRAD
    return parameters


def _linear(numbers: Weights) -> dict[int, Parameter]:
    has_bias = int(numbers.bias is not None)
    return {0: len(numbers.weight), 1: has_bias, 2: numbers.weight.size, **({8: 1} if numbers.scales else {})}
