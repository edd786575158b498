"""Post-training quantization: ranges from the float network's activations, nothing trained.

Statistics are of the network in eval mode with every quantizer but signs out of the way, so they serve any bits.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from micronet.artifact.artifact import write_tensors
from micronet.errors import MicronetError
from micronet.quantization.calibrate import check_calibrated, each_quantizer, refresh_weights
from micronet.quantization.histogram import BINS, GridSpec, Histogram, find_range
from micronet.quantization.layers import effective_weight
from micronet.quantization.quantizer import Quantizer
from micronet.quantization.schemes.wbwtab import SignQuantizer

_KEY = "micronet-calibration"
Statistics = dict[str, Histogram]


@torch.no_grad()
def collect(model: nn.Module, batches: Iterable[Tensor]) -> Statistics:
    """Return a histogram for each activation quantizer (``module.slot``), of a float run over the batches.

    Weights, batch norms and quantizers are untouched. Raises MicronetError where there was no batch.
    """
    statistics: Statistics = {}
    was_training = model.training
    model.eval()
    seen = 0
    try:
        with _recording(model, statistics):
            for batch in batches:
                model(batch)
                seen += 1
    finally:
        model.train(was_training)
    if not seen:
        raise MicronetError("there was no batch to calibrate on; give at least one image")
    return statistics


@torch.no_grad()
def set_ranges(model: nn.Module, statistics: Statistics, calibrator: Any, percentile: float) -> None:
    """Give every activation quantizer the range that its statistics tell, and every weight quantizer its weight's.

    Raises MicronetError where a quantizer saw no data, or saw NaN or infinity.
    """
    for name, slot, quantizer in each_quantizer(model):
        if slot == "weight_quantizer":
            quantizer.observe(effective_weight(model.get_submodule(name)))
        elif not quantizer.frozen:
            histogram = statistics.get(f"{name}.{slot}")
            if histogram is None:
                raise MicronetError(
                    f"there are no statistics of {name}.{slot}: they were taken with other layers chosen"
                )
            if not histogram.empty:
                grid = quantizer.qparams(torch.empty(0))
                wanted = GridSpec(grid.qmin, grid.qmax, getattr(quantizer, "symmetric", True))
                quantizer.set_range(*find_range(histogram, wanted, calibrator, percentile))
    refresh_weights(model)
    check_calibrated(model)


def save_statistics(statistics: Statistics, path: Path, network: str) -> None:
    """Write statistics for reuse; ``network``: the hash of the artifact that they are of."""
    tensors = {name: histogram.counts for name, histogram in statistics.items()}
    ends = {name: [item.limit, item.low, item.high] for name, item in statistics.items()}
    write_tensors(path, tensors, _KEY, {"network": network, "ends": ends})


def load_statistics(path: Path, network: str) -> Statistics:
    """Read statistics. Raises MicronetError where the file is none, or of another network."""
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {})[_KEY])
            counts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
        found = {name: Histogram(counts[name], *map(float, ends)) for name, ends in header["ends"].items()}
        sound = all(item.counts.shape == (BINS,) for item in found.values())
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise MicronetError(f"{path} holds no calibration statistics ({error}); remove it or name another") from error
    if not sound or header.get("network") != network:
        raise MicronetError(
            f"{path} holds the statistics of another artifact, or of other images; remove it or name another"
        )
    return found


@contextmanager
def _recording(model: nn.Module, statistics: Statistics) -> Iterator[None]:
    """Put every quantizer out of the way; those of activations count what passes."""
    quantizers: list[Quantizer] = []
    for name, slot, quantizer in each_quantizer(model):
        if isinstance(quantizer, SignQuantizer):
            continue  # a network without its signs is not the one whose ranges are wanted
        quantizers.append(quantizer)
        if slot == "weight_quantizer":
            quantizer.recorder = _ignore
        else:
            quantizer.recorder = statistics.setdefault(f"{name}.{slot}", Histogram()).add
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.recorder = None


def _ignore(x: Tensor) -> None:
    """Count nothing: a weight needs no statistics."""
