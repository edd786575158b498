"""How close ncnn's layers come to ours, each for the same input: the one that ncnn gave it.

ncnn multiplies a sum of integers by a float, adds a float bias and rounds half away from zero; we round half to even.
So an integer can differ from ours, by one, where our value lies halfway between two integers but for the rounding of
floats, and where ours is -128, which ncnn does not have. ``mismatches`` counts the values that this does not explain.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from micronet.packed.program import Operation, Program
from micronet.runtimes.ncnn.lowering import lower
from micronet.runtimes.ncnn.predictor import NcnnPredictor
from micronet.runtimes.ncnn.values import MAX_INT8, Grid, Step
from micronet.runtimes.packed.numpy_backend import OPERATORS
from micronet.runtimes.packed.numpy_operators import Value

# Of the largest product and bias: 16 roundings to float32, of which each is at most 2^-24.
ROUNDING = 2.0**-20
# Of sums of floats, and of exponentials, which ncnn approximates.
APPROXIMATION = 2.0**-12
# On x86, ncnn divides by the scales of depthwise layers with rcpps, which is exact to 1.5 * 2^-12.
DEPTHWISE = 1.5 * 2.0**-12
EXACT_FUNCTIONS = ("relu", "clip", "quantize")


class LayerAgreement(NamedTuple):
    """A layer of ncnn against ours.

    integers: the largest difference of the integers that it computes; None: it computes floats. relative: of floats,
    the largest difference over the largest value. mismatches: how many values differ by more than rounding explains.
    """

    name: str
    why_float: str | None
    integers: int | None
    relative: float | None
    mismatches: int


def compare_layers(
    program: Program, network: NcnnPredictor, images: Iterable[NDArray[np.float32]]
) -> list[LayerAgreement]:
    """Compare every convolution and linear layer of an ncnn network, and every rounding, with ours.

    Args:
        program: The network that it was written from.
        network: The ncnn network.
        images: (C, H, W) each, normalized as in training.
    """
    found = lower(program, bool(network.file.note["fp16_storage"]))
    computed: list[Any] = [*found.steps, *found.roundings]
    names = sorted({name for each in computed for name in (each.source, each.result)})
    worst: dict[str, LayerAgreement] = {}
    for image in images:
        blobs = dict(zip(names, network.blobs(image, names), strict=True))
        compared = {step.result: _compare_layer(step, blobs) for step in found.steps}
        for name, source, result, grid in found.roundings:
            compared[result] = _compare_rounding(blobs[source], blobs[result], grid, name)
        for name, each in compared.items():
            known = worst.get(name, each)
            worst[name] = each._replace(
                integers=_larger(known.integers, each.integers), relative=_larger(known.relative, each.relative),
                mismatches=max(known.mismatches, each.mismatches),
            )  # fmt: skip
    return list(worst.values())


def _larger(first: Any, second: Any) -> Any:
    return None if second is None else max(first, second)


def _compare_layer(step: Step, blobs: dict[str, NDArray[Any]]) -> LayerAgreement:
    source, result = (_as_ours(blobs[name]) for name in (step.source, step.result))
    x = Value(source, step.reads.scale) if step.reads and step.why_float is None else Value(source)
    operation, *after = step.operations
    real = _real(operation, after, x)
    tolerance = _tolerance(operation, after, x, step)
    if step.writes is None:
        difference = np.abs(real - result)
        largest = float(np.abs(real).max(initial=1e-30))
        mismatches = int((difference > tolerance).sum())
        return LayerAgreement(operation.name, step.why_float, None, float(difference.max()) / largest, mismatches)
    return _compare_rounding(real, result, step.writes, operation.name, tolerance / step.writes.unit)


def _compare_rounding(
    raw: NDArray[Any], integers: NDArray[Any], grid: Grid, name: str, tolerance: float = 0.0
) -> LayerAgreement:
    exact = raw.astype(np.float64) / grid.unit
    ours = np.rint(exact).clip(grid.low, grid.high)
    allowed = 0.5 + tolerance + ROUNDING * MAX_INT8
    mismatches = np.abs(exact.clip(max(grid.low, -MAX_INT8), grid.high) - integers) > allowed
    return LayerAgreement(name, None, int(np.abs(ours - integers).max()), None, int(mismatches.sum()))


def _real(operation: Operation, after: list[Operation], x: Value) -> NDArray[Any]:
    """Return what a layer computes before its rounding: of a threshold, -1/2 or 1/2."""
    value = OPERATORS[operation.kind](operation, x)
    for each in after:
        value = OPERATORS[each.kind](each, value) if each.kind != "quantize" else value
    return value.real() / 2 if operation.kind == "threshold" else value.real()


def _tolerance(operation: Operation, after: list[Operation], x: Value, step: Step) -> float:
    """Return by how much the floats of a layer may differ from ours."""
    depthwise = operation.attributes.get("group", 1) > 1
    if operation.kind == "threshold":  # from -1/2 and 1/2, which are rounded correctly up to an error of 1/4
        sums = np.abs(OPERATORS["conv"](replace(operation, kind="conv", limits=None), Value(x.centred())).data)
        return min(0.24, float(sums.max(initial=0)) * (DEPTHWISE if depthwise else ROUNDING))
    products = np.abs(OPERATORS[operation.kind](replace(operation, bias=None), x).real()).max(initial=0)
    bias = np.zeros(1) if operation.bias is None else operation.bias
    scale = np.ones(1) if operation.scale is None else operation.scale.astype(np.float64)
    biases = np.abs(bias * scale * (x.scale or 1) if bias.dtype.kind == "i" else bias).max()
    exact = step.why_float is None and all(each.kind in EXACT_FUNCTIONS for each in after)
    found = (ROUNDING if exact else APPROXIMATION) * (products + biases)
    if depthwise:
        found += DEPTHWISE * products
    return float(found)


def _as_ours(blob: NDArray[Any]) -> NDArray[Any]:
    """Return a blob (C, H, W) or (N,) as one of a batch, channels last."""
    return blob.transpose(1, 2, 0)[None] if blob.ndim == 3 else blob[None]
