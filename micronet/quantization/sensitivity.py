"""Sensitivity of each layer to few bits: one layer is quantized at a time, the rest stays float."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from glob import escape
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from micronet.core.progress import Progress
from micronet.errors import FailedError
from micronet.evaluation import plot
from micronet.models.device import call, head
from micronet.models.modes import eval_mode
from micronet.quantization.calibrate import collect, each_quantizer, set_ranges
from micronet.quantization.config import CALIBRATOR, CalibrationConfig, QuantConfig
from micronet.quantization.histogram import Statistics
from micronet.quantization.quantize import quantize_model
from micronet.tasks.task import outputs_of


class LayerSensitivity(NamedTuple):
    """The effect of quantizing one layer: signal-to-noise ratio of the scores in dB, and drop in accuracy (0..1).

    Of several outputs the ratio is that of the worst; of other tasks the drop is that of the main metric.
    """

    layer: str
    sqnr_db: float
    drop: float


@dataclass(frozen=True)
class Probe:
    """How networks are calibrated and judged: calibration inputs and settings, and the accuracy (0..1) of a network."""

    batches: list[Tensor]
    calibration: CalibrationConfig
    accuracy: Callable[[nn.Module], float]

    @property
    def example(self) -> Tensor | None:
        """Two of the inputs, for tracing; None if there are none."""
        return head(self.batches[0], 2) if self.batches else None


def measure_sensitivity(
    model: nn.Module, config: QuantConfig, probe: Probe, progress: Progress
) -> list[LayerSensitivity]:
    """Quantize each layer alone as the config says, and return the layers, the most sensitive (lowest SQNR) first."""
    every, record = quantize_model(model, config, probe.example, batches=probe.batches)
    statistics = collect(every, probe.batches)
    reference, base = _outputs(model, probe.batches), probe.accuracy(model)
    found = []
    names = list(record.result["inputs"])
    for done, name in enumerate(names, 1):
        alone = _quantized(model, replace(config, include=escape(name), exclude=None), statistics, probe)
        pairs = zip(reference, _outputs(alone, probe.batches), strict=True)
        worst = min(_decibels(signal, output - signal) for signal, output in pairs)
        found.append(LayerSensitivity(name, worst, base - probe.accuracy(alone)))
        progress.step("measuring layers", done, len(names))
    return sorted(found, key=lambda item: item.sqnr_db)


def keep_sensitive(
    model: nn.Module, config: QuantConfig, ranked: list[LayerSensitivity], probe: Probe, target: float
) -> QuantConfig:
    """Return the config that keeps just enough of the most sensitive layers at 8 bits to limit the drop in accuracy.

    The number of layers is found by bisection: with one layer fewer, the drop exceeds the target.

    Args:
        model: The float network.
        config: How to quantize.
        ranked: The layers, the most sensitive first.
        probe: How to measure accuracy.
        target: The largest drop in accuracy, 0..1, of the network quantized without training.

    Raises:
        FailedError: The drop exceeds the target even with all layers at 8 bits.
    """
    statistics = collect(quantize_model(model, config, probe.example, batches=probe.batches)[0], probe.batches)
    base = probe.accuracy(model)

    def with_8bit(count: int) -> QuantConfig:
        names = [config.keep_8bit or "", *(item.layer for item in ranked[:count])]
        return replace(config, keep_8bit=",".join(filter(None, names)) or None)

    def drop(count: int) -> float:
        return base - probe.accuracy(_quantized(model, with_8bit(count), statistics, probe))

    low, high = 0, len(ranked)
    if (whole := drop(high)) > target:
        raise FailedError(
            f"with every layer at 8 bits, accuracy drops by {100 * whole:.2f} points, but --target-drop allows "
            f"{100 * target:g}; raise --target-drop, or drop it and use --mode qat"
        )
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if drop(middle) <= target else (middle + 1, high)
    return with_8bit(low)


def _quantized(model: nn.Module, config: QuantConfig, statistics: Statistics, probe: Probe) -> nn.Module:
    quantized, _ = quantize_model(model, config, probe.example, batches=probe.batches)
    places = {f"{name}.{slot}" for name, slot, q in each_quantizer(quantized) if slot != "weight_quantizer"}
    if not places <= statistics.keys():  # next to binary activations, 8-bit layers have quantizers in other places
        statistics = {**statistics, **collect(quantized, probe.batches)}
    calibration = probe.calibration
    set_ranges(quantized, statistics, calibration.calibrator or CALIBRATOR, calibration.percentile)
    return quantized


@torch.no_grad()
def _outputs(model: nn.Module, batches: Iterable[Tensor]) -> list[Tensor]:
    """Return each of the network's outputs for all batches."""
    with eval_mode(model):
        rows = [outputs_of(call(model, batch)) for batch in batches]
    return [torch.cat(each) for each in zip(*([row] if isinstance(row, Tensor) else row for row in rows), strict=True)]


def _decibels(signal: Tensor, noise: Tensor) -> float:
    power, total = noise.double().square().sum(), signal.double().square().sum()
    return math.inf if power == 0 else float(10 * (total / power).log10())


def draw(rows: Sequence[LayerSensitivity], path: Path) -> None:
    """Draw one bar per layer, its signal-to-noise ratio, into a .png or .svg file."""

    def fill(axes: Any) -> None:
        axes.barh([row.layer for row in rows][::-1], [row.sqnr_db for row in rows][::-1])
        axes.set_xlabel("signal-to-quantization-noise ratio of the scores, dB (higher is better)")

    plot.draw(path, (8, 0.3 * len(rows) + 1.2), fill)
