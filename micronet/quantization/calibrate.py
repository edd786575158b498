"""Procedures over the quantizers of a model: observe, calibrate, freeze. They work around any training loop."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from micronet.errors import MicronetError
from micronet.quantization.layers import SLOTS, Quantized, effective_weight
from micronet.quantization.observers import MinMax
from micronet.quantization.quantizer import Quantizer, RangedQuantizer


@contextmanager
def observing(model: nn.Module) -> Iterator[None]:
    """Let every quantizer that is not frozen follow the data that passes inside this context.

    On the way out the weight quantizers look once more, so that their grids fit the weights as the last step left them.
    Raises MicronetError for a DataParallel, whose replicas forget what they observe, and at the end where NaN or
    infinity reached a quantizer.
    """
    if isinstance(model, nn.DataParallel):
        raise MicronetError(
            "nn.DataParallel trains copies, and what their quantizers observe is lost; pass the network that it wraps, "
            "and train on one device"
        )
    quantizers = [quantizer for _, _, quantizer in each_quantizer(model)]
    for quantizer in quantizers:
        quantizer.observing = True
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.observing = False
        refresh_weights(model)
    _check_finite(model)


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Tensor | tuple[Any, ...]], count: int | None = None) -> None:
    """Run ``count`` batches (None: all) through the model in eval mode and set the ranges from them.

    Weights and batch-norm statistics are untouched. A batch is a tensor or a tuple that begins with one.
    Raises MicronetError where there was no batch, or where a quantizer saw none of the data.
    """
    was_training = model.training
    model.eval()
    seen = 0
    try:
        with observing(model):
            for batch in islice(batches, count):
                images = batch[0] if isinstance(batch, (tuple, list)) else batch
                if not isinstance(images, Tensor):
                    raise MicronetError(
                        f"a batch is a tensor or a tuple that begins with one, not a {type(images).__name__}"
                    )
                model(images)
                seen += 1
    finally:
        model.train(was_training)
    if not seen:
        raise MicronetError("there was no batch to calibrate on; give at least one")
    check_calibrated(model)


def check_calibrated(model: nn.Module) -> None:
    """Raise MicronetError that names the quantizers which have seen no data."""
    blind = [f"{name}.{slot}" for name, slot, quantizer in each_quantizer(model) if quantizer.empty]
    if blind:
        raise MicronetError(
            f"{len(blind)} quantizers saw no data, so their layers are not called as modules: {', '.join(blind[:5])}"
        )
    _check_finite(model)


def _check_finite(model: nn.Module) -> None:
    broken = [
        f"{name}.{slot}"
        for name, slot, quantizer in each_quantizer(model)
        if not quantizer.empty and _broken(model, name, slot, quantizer)
    ]
    if broken:
        raise MicronetError(f"NaN or infinity reached {len(broken)} quantizers: {', '.join(broken[:5])}")


def freeze(model: nn.Module) -> None:
    """Keep every range as it is from now on."""
    for _, _, quantizer in each_quantizer(model):
        quantizer.freeze()


def freeze_activations(model: nn.Module) -> None:
    """Keep the ranges of activations as they are from now on; weights' follow the weights."""
    for _, slot, quantizer in each_quantizer(model):
        if slot != "weight_quantizer":
            quantizer.freeze()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Train with every range and every batch norm's statistics as they are (QAFT), inside this context."""
    freeze(model)
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    modes = [norm.training for norm in norms]
    for norm in norms:
        norm.eval()
    try:
        yield
    finally:
        for norm, mode in zip(norms, modes, strict=True):
            norm.train(mode)


def is_frozen(model: nn.Module) -> bool:
    """Tell whether a model is quantized and none of its ranges follows data any more."""
    ranged = [quantizer.frozen for _, _, quantizer in each_quantizer(model) if quantizer.ranged]
    return bool(ranged) and all(ranged)


@torch.no_grad()
def refresh_weights(model: nn.Module) -> None:
    """Bring the grids of weights up to date with the weights (a range that is an average is left alone)."""
    for name, slot, quantizer in each_quantizer(model):
        follows = isinstance(quantizer, RangedQuantizer) and isinstance(quantizer.observer, MinMax)
        if slot == "weight_quantizer" and follows:
            quantizer.observe(_weight(model, name))


def each_quantizer(model: nn.Module) -> Iterator[tuple[str, str, Quantizer]]:
    """Yield (module name, slot, quantizer) for every quantizer of a model."""
    for name, module in model.named_modules():
        if isinstance(module, Quantized):
            for slot in SLOTS:
                if (quantizer := getattr(module, slot)) is not None:
                    yield name, slot, quantizer


def _broken(model: nn.Module, name: str, slot: str, quantizer: Quantizer) -> bool:
    """Tell whether a scale is not a number; of a weight's quantizer, for that weight."""
    x = _weight(model, name) if slot == "weight_quantizer" else torch.empty(0)
    return not bool(quantizer.qparams(x).scale.isfinite().all())


def _weight(model: nn.Module, name: str) -> Tensor:
    return effective_weight(model.get_submodule(name))
