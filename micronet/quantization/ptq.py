"""Post-training quantization: ranges from the activations of the float network, without training.

Statistics are collected in eval mode with every quantizer except signs disabled, so they are valid for any bit width.
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
from micronet.models.modes import eval_mode
from micronet.quantization.calibrate import check_calibrated, each_quantizer, refresh_weights
from micronet.quantization.histogram import BINS, GridSpec, Histogram, find_range
from micronet.quantization.layers import effective_weight
from micronet.quantization.quantizer import Quantizer
from micronet.quantization.schemes.wbwtab import SignQuantizer

_KEY = "micronet-calibration"
Statistics = dict[str, Histogram]


@torch.no_grad()
def collect(model: nn.Module, batches: Iterable[Tensor]) -> Statistics:
    """Return a histogram of the float activations for each activation quantizer (``module.slot``).

    The model does not change. Raises MicronetError if there is no batch.
    """
    statistics: Statistics = {}
    seen = 0
    with eval_mode(model), _recording(model, statistics):
        for batch in batches:
            model(batch)
            seen += 1
    if not seen:
        raise MicronetError("there is no data to calibrate on; pass at least one batch")
    return statistics


@torch.no_grad()
def set_ranges(model: nn.Module, statistics: Statistics, calibrator: Any, percentile: float) -> None:
    """Set the range of every activation quantizer from its statistics, and of every weight quantizer from its weight.

    Args:
        model: A quantized network.
        statistics: What ``collect`` returned for this network.
        calibrator: How to choose a range from a histogram; see ``find_range``.
        percentile: In percent, for the percentile calibrator.

    Raises:
        MicronetError: A quantizer saw no data, or saw NaN or infinity.
    """
    for name, slot, quantizer in each_quantizer(model):
        if slot == "weight_quantizer":
            quantizer.observe(effective_weight(model.get_submodule(name)))
        elif not quantizer.frozen:
            histogram = statistics.get(f"{name}.{slot}")
            if histogram is None:
                raise MicronetError(
                    f"the calibration statistics, collected with other layers quantized, lack {name}.{slot}; "
                    "remove the cache (--calib-cache), or name another file"
                )
            if not histogram.empty:
                grid = quantizer.qparams(torch.empty(0))
                spec = GridSpec(grid.qmin, grid.qmax, getattr(quantizer, "symmetric", True))
                quantizer.set_range(*find_range(histogram, spec, calibrator, percentile))
    refresh_weights(model)
    check_calibrated(model)


def save_statistics(statistics: Statistics, path: Path, network: str) -> None:
    """Write statistics to a file; ``network``: a hash of the network and images that they come from."""
    tensors = {name: histogram.counts for name, histogram in statistics.items()}
    ends = {name: [item.limit, item.low, item.high] for name, item in statistics.items()}
    write_tensors(path, tensors, _KEY, {"network": network, "ends": ends})


def load_statistics(path: Path, network: str) -> Statistics:
    """Read statistics. Raises MicronetError if the file is damaged, or its network differs from ``network``."""
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {})[_KEY])
            counts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
        found = {name: Histogram(counts[name], *map(float, ends)) for name, ends in header["ends"].items()}
        sound = all(item.counts.shape == (BINS,) for item in found.values())
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise MicronetError(
            f"{path} is not a file of calibration statistics ({error}); remove it or name another"
        ) from error
    if not sound or header.get("network") != network:
        raise MicronetError(
            f"{path} holds calibration statistics of another artifact or of other images; remove it or name another"
        )
    return found


@contextmanager
def _recording(model: nn.Module, statistics: Statistics) -> Iterator[None]:
    """Disable every quantizer inside this context; those of activations count their inputs."""
    quantizers: list[Quantizer] = []
    for name, slot, quantizer in each_quantizer(model):
        if isinstance(quantizer, SignQuantizer):
            continue  # without its signs, the network would compute something else
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
    """Count nothing: the range of a weight comes from the weight."""
