"""Procedures over the quantizers of a model: observe, calibrate, freeze. They work with any training loop.

Post-training quantization calls ``collect`` and ``set_ranges``: statistics of the float activations, valid for any bit
width, and ranges chosen from them.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn

from micronet.errors import MicronetError, count
from micronet.graph import ops
from micronet.models.device import call
from micronet.models.inputs import Batch, inputs_in
from micronet.models.modes import eval_mode
from micronet.quantization.config import Calibrator
from micronet.quantization.histogram import GridSpec, Histogram, Statistics, find_range
from micronet.quantization.layers import SLOTS, Quantized, effective_weight
from micronet.quantization.quantizer import Quantizer
from micronet.quantization.schemes.iao import AffineQuantizer
from micronet.quantization.schemes.wbwtab import SignQuantizer

Recorder = Callable[[Tensor], None]


def each_quantizer(model: nn.Module) -> Iterator[tuple[str, str, Quantizer]]:
    """Yield (module name, slot, quantizer) for each quantizer of a model."""
    if not isinstance(model, nn.Module):
        raise MicronetError(
            f"expected a torch.nn.Module, got {type(model).__name__}; for an Artifact, pass artifact.model"
        )
    for name, module in model.named_modules():
        if isinstance(module, Quantized):
            for slot in SLOTS:
                if (quantizer := getattr(module, slot)) is not None:
                    yield name, slot, quantizer


@contextmanager
def observing(model: nn.Module) -> Iterator[None]:
    """Inside this context, every quantizer that is not frozen updates its range from the data it sees.

    On exit the ranges of weights are updated once more, to match the weights after the last step.

    Raises:
        MicronetError: The model is a DataParallel, whose replicas lose what they observe; or, on exit, NaN or infinity
            reached a quantizer.
    """
    if isinstance(model, nn.DataParallel):
        raise MicronetError(
            "nn.DataParallel is not supported, because it loses the ranges observed by its replicas; pass "
            "model.module and train on one device or with torchrun"
        )
    quantizers = [quantizer for _, _, quantizer in each_quantizer(model)]
    for quantizer in quantizers:
        quantizer.observing = True
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.observing = False
        _refresh_weights(model)
    _check_finite(model)


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Batch], count: int | None = None) -> None:
    """Run batches through the model in eval mode and set the quantizers' ranges from them.

    Weights and batch-norm statistics do not change.

    Args:
        model: A quantized network.
        batches: As a DataLoader yields them: tensors; tuples or lists that begin with the inputs, one for each argument
            that forward() requires; or dicts of inputs keyed by the names of these arguments.
        count: How many batches to use (None: all).

    Raises:
        MicronetError: There was no batch, or a quantizer saw no data.
    """
    with observing(model), _refusing_infinity(model):
        _run(model, islice(batches, count))
    check_calibrated(model)


@contextmanager
def _refusing_infinity(model: nn.Module) -> Iterator[None]:
    """Raise MicronetError on exit if infinity reached a quantizer: not every scheme's range shows it."""
    reached: set[str] = set()

    def look(place: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if bool(inputs[0].isinf().any()):
            reached.add(place)

    places, quantizers = recorded_places(model), {f"{name}.{slot}": each for name, slot, each in each_quantizer(model)}
    hooks = [quantizers[place].register_forward_pre_hook(partial(look, place)) for place in places]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    _refuse([place for place in places if place in reached])


@torch.no_grad()
def collect(model: nn.Module, batches: Iterable[Tensor], also: Mapping[str, Recorder] | None = None) -> Statistics:
    """Return a histogram of the float activations for each activation quantizer (``module.slot``).

    The model does not change. Every quantizer except signs is disabled: without its signs, the network would compute
    something else. ``also``: what else receives the activations of some quantizers. Raises MicronetError if ``batches``
    is empty.
    """
    statistics: Statistics = {place: Histogram() for place in recorded_places(model)}
    recorders: dict[str, Recorder] = {place: histogram.add for place, histogram in statistics.items()}
    for place, recorder in (also or {}).items():
        recorders[place] = partial(_both, recorders[place], recorder)
    record_activations(model, batches, recorders)
    return statistics


def _both(first: Recorder, second: Recorder, x: Tensor) -> None:
    first(x)
    second(x)


def recorded_places(model: nn.Module) -> list[str]:
    """Return the place of each activation quantizer except signs (``module.slot``), in order."""
    return [
        f"{name}.{slot}"
        for name, slot, quantizer in each_quantizer(model)
        if slot != "weight_quantizer" and not isinstance(quantizer, SignQuantizer)
    ]


@torch.no_grad()
def record_activations(model: nn.Module, batches: Iterable[Batch], recorders: Mapping[str, Recorder]) -> None:
    """Run a quantized network in float, apart from signs, and pass what reaches some quantizers to their recorders.

    ``recorders``: by the quantizer's place, ``module.slot``. Raises MicronetError if ``batches`` is empty.
    """
    quantizers = [item for item in each_quantizer(model) if not isinstance(item[2], SignQuantizer)]
    for name, slot, quantizer in quantizers:
        quantizer.recorder = recorders.get(f"{name}.{slot}", _ignore)
    try:
        _run(model, batches)
    finally:
        for _, _, quantizer in quantizers:
            quantizer.recorder = None


def _ignore(x: Tensor) -> None:
    """Record nothing; a quantizer with a recorder returns its input as it is."""


@torch.no_grad()
def set_ranges(model: nn.Module, statistics: Statistics, calibrator: Calibrator, percentile: float) -> None:
    """Set the range of every activation quantizer from its statistics, and of every weight quantizer from its weight.

    Args:
        model: A quantized network.
        statistics: What ``collect`` returned for this network.
        calibrator: How to choose a range from a histogram; see ``find_range``.
        percentile: In percent, for the percentile calibrator.

    Raises:
        MicronetError: A quantizer saw no data, or saw NaN or infinity.
    """
    _refuse([place for place in recorded_places(model) if place in statistics and math.isnan(statistics[place].low)])
    for name, slot, quantizer in each_quantizer(model):
        if slot == "weight_quantizer":
            quantizer.observe(effective_weight(model.get_submodule(name)))
        elif not quantizer.frozen:
            histogram = statistics.get(f"{name}.{slot}")
            if histogram is None:
                raise MicronetError(
                    f"the calibration statistics do not include {name}.{slot}; delete the --calib-cache file, or "
                    "choose another"
                )
            if not histogram.empty:
                grid = quantizer.qparams(torch.empty(0))
                spec = GridSpec(grid.qmin, grid.qmax, quantizer.symmetric)
                quantizer.set_range(*find_range(histogram, spec, calibrator, percentile))
    check_calibrated(model)


def _run(model: nn.Module, batches: Iterable[Batch]) -> None:
    """Run batches through a model in eval mode; raise MicronetError if there is none."""
    seen = False
    with eval_mode(model):
        for batch in batches:
            call(model, inputs_in(model, batch))
            seen = True
    if not seen:
        raise MicronetError("no calibration data; pass at least one batch")


def check_calibrated(model: nn.Module) -> None:
    """Raise MicronetError if quantizers saw no data, or saw NaN or infinity; the message names them."""
    blind = [f"{name}.{slot}" for name, slot, quantizer in each_quantizer(model) if quantizer.empty]
    if blind:
        raise MicronetError(
            f"{count(len(blind), 'quantizer')} saw no data: the forward pass never reaches "
            f"{', '.join(blind[:5])}; exclude these layers with --exclude"
        )
    _check_finite(model)


def _check_finite(model: nn.Module) -> None:
    broken = []
    for name, slot, quantizer in each_quantizer(model):
        x = effective_weight(model.get_submodule(name)) if slot == "weight_quantizer" else torch.empty(0)
        if not quantizer.empty and not bool(quantizer.qparams(x).scale.isfinite().all()):
            broken.append(f"{name}.{slot}")
    _refuse(broken)


def _refuse(broken: list[str]) -> None:
    """Raise MicronetError that names the quantizers that NaN or infinity reached, if there are any."""
    if broken:
        raise MicronetError(
            f"NaN or infinity reached {count(len(broken), 'quantizer')}: {', '.join(broken[:5])}; "
            "check the weights and the input data"
        )


def freeze(model: nn.Module) -> None:
    """Fix every range: later data does not change it."""
    for _, _, quantizer in each_quantizer(model):
        quantizer.freeze()


def freeze_activations(model: nn.Module) -> None:
    """Fix the ranges of activations; the ranges of weights still follow the weights."""
    for _, slot, quantizer in each_quantizer(model):
        if slot != "weight_quantizer":
            quantizer.freeze()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Freeze every range for good, and all batch-norm statistics inside this context (QAFT)."""
    freeze(model)
    with eval_mode(*(module for module in model.modules() if isinstance(module, ops.BATCH_NORMS))):
        yield


def is_frozen(model: nn.Module) -> bool:
    """Return True if the model has ranges and all of them are frozen."""
    ranged = [quantizer.frozen for _, _, quantizer in each_quantizer(model) if quantizer.ranged]
    return bool(ranged) and all(ranged)


@torch.no_grad()
def _refresh_weights(model: nn.Module) -> None:
    """Update the ranges of weights from the weights; moving averages are left alone."""
    for name, slot, quantizer in each_quantizer(model):
        if slot == "weight_quantizer" and isinstance(quantizer, AffineQuantizer) and not quantizer.observer.averaging:
            quantizer.observe(effective_weight(model.get_submodule(name)))
