"""How much noise each change of a network adds to its outputs, alone: groups cut, layers quantized.

Noise is sum((y' - y)^2) / sum(y^2) of the worst output, the inverse of the signal-to-noise ratio. It is smooth where
accuracy on some hundred images is not, needs no labels, and of small independent changes it adds up.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from micronet.compression.plan import Plan
from micronet.core.progress import Progress
from micronet.models.device import call
from micronet.models.modes import eval_mode
from micronet.pruning.prune import Pruner
from micronet.pruning.sensitivity import SHARES, measure_sensitivity
from micronet.quantization.adaround import BATCH, STEPS
from micronet.quantization.config import CALIBRATION_BATCH, INTEGER_BITS, CalibrationConfig, QuantConfig
from micronet.quantization.sensitivity import Probe
from micronet.quantization.sensitivity import measure_sensitivity as measure_bits
from micronet.tasks.agreement import Similarity
from micronet.tasks.task import outputs_of

TRAINING = 3  # times a forward pass: what a step takes, forward and backward
MOST_NOISE = 100.0  # of one change: what is beyond carries no information


def noise_of(original: nn.Module, batches: Sequence[Any]) -> Callable[[nn.Module], float]:
    """Return a function from a network to the noise in its outputs, relative to those of the original.

    ``batches``: inputs, tensors or ``Inputs``.
    """
    reference = [_outputs(original, batch) for batch in batches]

    def noise(model: nn.Module) -> float:
        similarity = Similarity()
        for batch, outputs in zip(batches, reference, strict=True):
            similarity.update(_outputs(model, batch), outputs)
        return min(float(similarity.compute()["error"]) ** 2, MOST_NOISE)

    return noise


@torch.no_grad()
def _outputs(model: nn.Module, batch: Any) -> Any:
    with eval_mode(model):
        return outputs_of(call(model, batch))


def cut_noise(
    pruner: Pruner, noise: Callable[[nn.Module], float], progress: Progress
) -> dict[str, list[tuple[float, float]]]:
    """Return the noise of cutting shares of each group alone, from none to most; JSON values by the group's number.

    Groups that cannot lose any of the shares alone are missing.
    """
    numbers = {tuple(pruner.channels.groups[group].layers): group for group in pruner.planner.free}
    rows = measure_sensitivity(pruner, lambda model: -noise(model), progress, SHARES)
    return {
        str(numbers[tuple(row.layers)]): [(0.0, 0.0), *sorted(row.drops.items())] for row in rows if row.drops
    }  # JSON turns pairs into lists


def bits_noise(
    model: nn.Module, batches: Sequence[Any], bits: int, quality: Callable[[nn.Module], float], progress: Progress
) -> dict[str, dict[str, float]]:
    """Return, for each layer with few bits alone, the ``noise`` and the ``drop`` of the metric on validation data."""
    probe = Probe(list(batches), CalibrationConfig(mode="ptq"), quality)
    config = QuantConfig(w_bits=bits, first_last="auto" if bits == INTEGER_BITS else "same")
    rows = measure_bits(model, config, probe, progress)
    return {row.layer: {"noise": min(10 ** (-row.sqnr_db / 10), MOST_NOISE), "drop": row.drop} for row in rows}


def rounding_seconds(model: nn.Module, batches: Sequence[Any]) -> float:
    """Return about how many seconds it takes to learn the rounding of all layers, by forward passes."""
    start = time.perf_counter()
    for batch in batches:
        _outputs(model, batch)
    passes = TRAINING * STEPS * BATCH / (CALIBRATION_BATCH * len(batches))
    return passes * (time.perf_counter() - start)


def plan_noise(plan: Plan, groups: Mapping[int, int], cuts: Mapping[str, Sequence[Sequence[float]]]) -> float:
    """Return the noise that a plan's widths add, predicted from those of its groups alone."""
    total = 0.0
    for (group, width), new in zip(groups.items(), plan.widths, strict=bool(plan.widths)):
        if new < width and str(group) in cuts:
            total += _interpolated(cuts[str(group)], 1 - new / width)
    return total


def _interpolated(points: Sequence[Sequence[float]], share: float) -> float:
    """Return the noise at a share between measured ones, on straight lines; beyond the last, on the last line."""
    above = next((index for index, (x, _) in enumerate(points) if x >= share), len(points) - 1)
    (left, low), (right, high) = points[max(0, above - 1)], points[above]
    return low if right == left else low + (high - low) * (share - left) / (right - left)
