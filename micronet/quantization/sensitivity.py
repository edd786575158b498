"""How much each layer suffers from few bits: one layer quantized at a time, the rest float."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from micronet.core.progress import Progress
from micronet.errors import FailedError
from micronet.evaluation import plot
from micronet.quantization.calibrate import each_quantizer
from micronet.quantization.calibration_config import CalibrationConfig
from micronet.quantization.config import QuantConfig
from micronet.quantization.ptq import Statistics, collect, set_ranges
from micronet.quantization.quantize import quantize_model

Accuracy = Callable[[nn.Module], float]


class LayerSensitivity(NamedTuple):
    """A layer quantized alone: the scores' signal-to-noise ratio in decibels, and the accuracy lost, 0..1."""

    layer: str
    sqnr_db: float
    drop: float


@dataclass(frozen=True)
class Probe:
    """What networks are judged by: images to calibrate on, how, and what their accuracy is."""

    batches: list[Tensor]
    calibration: CalibrationConfig
    accuracy: Accuracy


def measure_sensitivity(
    model: nn.Module, config: QuantConfig, probe: Probe, progress: Progress
) -> list[LayerSensitivity]:
    """Quantize each layer alone at the config's bits; return the layers, the most sensitive (by SQNR) first.

    Raises what quantizing raises.
    """
    batches, accuracy = probe.batches, probe.accuracy
    every, record = quantize_model(model, config)
    statistics = collect(every, batches)
    reference = _scores(model, batches)
    base = accuracy(model)
    found = []
    names = list(record.result["inputs"])
    for done, name in enumerate(names, 1):
        alone = _quantized(model, replace(config, include=_exactly(name), exclude=None), statistics, probe)
        noise = _scores(alone, batches) - reference
        found.append(LayerSensitivity(name, _decibels(reference, noise), base - accuracy(alone)))
        progress.step("measuring layers", done, len(names))
    return sorted(found, key=lambda item: item.sqnr_db)


def keep_sensitive(
    model: nn.Module, config: QuantConfig, ranked: list[LayerSensitivity], probe: Probe, target: float
) -> QuantConfig:
    """Return the config that keeps the most sensitive layers at 8 bits, so many that the drop is at most ``target``.

    The target is a share, 0..1. How many is found by halving, so one fewer exceeds the target, but a much smaller
    number might not.
    The drop is that of the network quantized without training. Raises FailedError where 8 bits everywhere exceed it.
    """
    accuracy = probe.accuracy
    statistics = collect(quantize_model(model, config)[0], probe.batches)
    base = accuracy(model)

    def kept(count: int) -> QuantConfig:
        names = [config.keep_8bit or "", *(item.layer for item in ranked[:count])]
        return replace(config, keep_8bit=",".join(filter(None, names)) or None)

    def drop(count: int) -> float:
        return base - accuracy(_quantized(model, kept(count), statistics, probe))

    low, high = 0, len(ranked)
    if (whole := drop(high)) > target:
        raise FailedError(
            f"with every layer at 8 bits the drop is {100 * whole:.2f} points, --target-drop allows {100 * target:g}; "
            "raise it, or train without it"
        )
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if drop(middle) <= target else (middle + 1, high)
    return kept(low)


def _exactly(name: str) -> str:
    """Return the glob that means one name."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _quantized(model: nn.Module, config: QuantConfig, statistics: Statistics, probe: Probe) -> nn.Module:
    quantized, _ = quantize_model(model, config)
    places = {f"{name}.{slot}" for name, slot, q in each_quantizer(quantized) if slot != "weight_quantizer"}
    if not places <= statistics.keys():  # layers at 8 bits beside binary activations have places of their own
        statistics = {**statistics, **collect(quantized, probe.batches)}
    calibration = probe.calibration
    set_ranges(quantized, statistics, calibration.calibrator, calibration.percentile)
    return quantized


@torch.no_grad()
def _scores(model: nn.Module, batches: Iterable[Tensor]) -> Tensor:
    training = model.training
    model.eval()
    try:
        return torch.cat([model(batch) for batch in batches])
    finally:
        model.train(training)


def _decibels(signal: Tensor, noise: Tensor) -> float:
    power = float(noise.double().square().sum())
    total = float(signal.double().square().sum())
    if power == 0 or total == 0:
        return math.inf if power == 0 else -math.inf
    return 10 * math.log10(total / power)


def draw(rows: Sequence[LayerSensitivity], path: Path) -> None:
    """Draw one bar per layer, its signal-to-noise ratio, into a .png or .svg file."""

    def fill(axes: Any) -> None:
        axes.barh([row.layer for row in rows][::-1], [row.sqnr_db for row in rows][::-1])
        axes.set_xlabel("signal to quantization noise of the scores, dB (longer is better)")

    plot.draw(path, (8, 0.3 * len(rows) + 1.2), fill)
