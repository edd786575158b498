"""How much each layer suffers from few bits: one layer quantized at a time, the rest float."""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from micronet.errors import FailedError
from micronet.progress import Progress
from micronet.quantization.config import QuantConfig
from micronet.quantization.ptq import Statistics, collect, set_ranges
from micronet.quantization.quantize import quantize_model

Accuracy = Callable[[nn.Module], float]


class Sensitivity(NamedTuple):
    """A layer quantized alone: the scores' signal-to-noise ratio in decibels, and the accuracy lost, 0..1."""

    layer: str
    sqnr_db: float
    drop: float


def measure_sensitivity(
    model: nn.Module, config: QuantConfig, batches: list[Tensor], accuracy: Accuracy, progress: Progress
) -> list[Sensitivity]:
    """Quantize each layer alone at the config's bits; return the layers, the most sensitive (by SQNR) first.

    Raises what quantizing raises.
    """
    every, record = quantize_model(model, config)
    statistics = collect(every, batches)
    reference = _scores(model, batches)
    base = accuracy(model)
    found = []
    names = list(record.result["inputs"])
    for done, name in enumerate(names, 1):
        alone = _quantized(model, replace(config, include=name, exclude=None), statistics)
        noise = _scores(alone, batches) - reference
        found.append(Sensitivity(name, _decibels(reference, noise), base - accuracy(alone)))
        progress.step("measuring layers", done, len(names))
    return sorted(found, key=lambda item: item.sqnr_db)


def keep_sensitive(
    model: nn.Module,
    config: QuantConfig,
    ranked: list[Sensitivity],
    batches: list[Tensor],
    accuracy: Accuracy,
    target: float,
) -> QuantConfig:
    """Return the config that keeps as few of the most sensitive layers at 8 bits as a drop of ``target`` (0..1) allows.

    The drop is that of the network quantized without training. Raises FailedError where 8 bits everywhere exceed it.
    """
    statistics = collect(quantize_model(model, config)[0], batches)
    base = accuracy(model)

    def kept(count: int) -> QuantConfig:
        names = ",".join(item.layer for item in ranked[:count])
        return replace(config, keep_8bit=names or None)

    def drop(count: int) -> float:
        return base - accuracy(_quantized(model, kept(count), statistics))

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


def _quantized(model: nn.Module, config: QuantConfig, statistics: Statistics) -> nn.Module:
    quantized, _ = quantize_model(model, config)
    set_ranges(quantized, statistics, "mse", 100.0)
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
    return math.inf if power == 0 else 10 * math.log10(float(signal.double().square().sum()) / power)
