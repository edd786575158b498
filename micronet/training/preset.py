"""Fitting a training's settings to the network, the data and the machine before it begins.

What the user chose must have an effect, or is refused with the reason. What a preset chose is left out instead.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from micronet.artifact.artifact import Artifact
from micronet.core.machine import has_bf16
from micronet.data.batches import batch_sizes, eval_batches, mirrors
from micronet.data.dataset import Dataset, images_of
from micronet.errors import MicronetError
from micronet.graph import ops
from micronet.models.device import memory_format, place_inputs
from micronet.models.modes import copy_model
from micronet.tasks.task import CLASSIFICATION
from micronet.training import distributed
from micronet.training.checkpoint import Checkpoint
from micronet.training.config import DEFAULT_LR, DEFAULT_PRESET, PRESETS, UNUSED, RunContext, TrainConfig
from micronet.training.fits import check_model_fits, prepare_training
from micronet.training.step import OPTIMIZERS, TrainStep
from micronet.training.whitening import whitened_layer

STEPS_PER_EPOCH = 100  # of the preset fast, if its batches are neither smaller nor larger than allowed
SMALLEST_BATCH, LARGEST_BATCH = 32, 128
SHORT_TRAINING = 2000  # steps up to which Muon's best peak learning rate is DEFAULT_LR
TIMED_IMAGES, TIMED_STEPS = 32, 5


def settle(
    config: TrainConfig,
    artifact: Artifact,
    data: Dataset,
    context: RunContext,
    recorded: Mapping[str, Any] | None = None,
) -> TrainConfig:
    """Return a config whose every setting is chosen and has an effect.

    What the preset chooses depends on the network, the data set and the features of the processor, never on a
    measurement, so that a training can be repeated.

    Args:
        config: The user's settings.
        artifact: The network, as it is before the training.
        data: The data set.
        context: Where the training runs; a training that began as plain, once the default, is resumed as such.
        recorded: The settings of the training to continue, if not those of its checkpoint.

    Raises:
        MicronetError: A setting that the user chose has no effect on this network or data, or is slower here.
    """
    if not config.epochs:
        _fit(replace(config, preset=config.preset or DEFAULT_PRESET), artifact, data, context)  # raises
        return config
    if recorded is None:
        recorded = distributed.from_rank_zero(Checkpoint.beside(context.output, {}).recorded) if context.resume else {}
    if config.preset is None and context.resume:
        plain = _fit(replace(config, preset="plain"), artifact, data, context)
        if recorded and all(recorded.get(name, UNUSED.get(name)) == plain.chosen(name) for name in PRESETS["plain"]):
            return plain
    fitted = _fit(replace(config, preset=config.preset or DEFAULT_PRESET), artifact, data, context)
    if fitted.lr is not None or fitted.optimizer != "muon":
        return fitted
    if recorded.get("lr") == DEFAULT_LR:  # by an earlier version, or a short training
        return replace(fitted, lr=DEFAULT_LR)
    return replace(fitted, lr=muon_lr(fitted, len(data.train)))


def muon_lr(config: TrainConfig, images: int) -> float:
    """Return the peak learning rate of a training with Muon, which falls with the square root of its steps.

    Steps are relative to each weight's norm, so that at one rate the loss of a long training rises after the warmup.
    The rate that suits a linear decay is inversely proportional to the square root of the number of steps (Defazio et
    al. 2023, arXiv:2310.07831).
    """
    batches = len(batch_sizes(images, config.chosen("batch_size")))
    steps = config.epochs * math.ceil(batches / config.accumulate)
    return float(f"{DEFAULT_LR * min(1.0, math.sqrt(SHORT_TRAINING / steps)):.2g}")


def _fit(config: TrainConfig, artifact: Artifact, data: Dataset, context: RunContext) -> TrainConfig:
    """Return a config that contains what its preset chooses for this network and data."""
    settled = {name: config.chosen(name) for name in PRESETS["plain"]}
    if config.batch_size is None and config.preset == "fast":
        settled["batch_size"] = batch_size(len(data.train))
    checks = {
        "flip": _check_flip, "whiten": _check_whiten, "cutout": _check_cutout,
        "label_smoothing": _check_label_smoothing, "amp": _check_amp,
    }  # fmt: skip
    for name, check in checks.items():
        plain = PRESETS["plain"][name]
        try:
            if settled[name] != plain:
                check(config, artifact, data, context)
        except MicronetError:
            if getattr(config, name) is not None:
                raise
            settled[name] = plain
    _check_start_size(settled["start_size"], artifact.model, data)
    return replace(config, **settled)


def batch_size(images: int) -> int:
    """Return the images per batch of the preset fast: a power of two, for about ``STEPS_PER_EPOCH`` steps."""
    size = SMALLEST_BATCH
    while size < LARGEST_BATCH and images >= 1.5 * size * STEPS_PER_EPOCH:
        size *= 2
    return size


def _check_flip(config: TrainConfig, artifact: Artifact, data: Dataset, context: RunContext) -> None:
    if not mirrors(data.spec):
        raise MicronetError(
            "--flip alternating has no effect, because images of this data set are never flipped; drop it"
        )


def _check_whiten(config: TrainConfig, artifact: Artifact, data: Dataset, context: RunContext) -> None:
    if not data.image_height:
        raise MicronetError("--whiten on needs images; drop it")
    if artifact.history:
        raise MicronetError("--whiten on only applies to new networks, but this network is already trained; drop it")
    kernel, size = whitened_layer(artifact.model).kernel_size, images_of(data.train).image_shape[1:]
    if any(length > pixels for length, pixels in zip(kernel, size, strict=True)):
        raise MicronetError("--whiten on needs images as large as the first layer's kernel; drop it")


def _check_cutout(config: TrainConfig, artifact: Artifact, data: Dataset, context: RunContext) -> None:
    if not data.image_height:
        raise MicronetError(f"--cutout has no effect on the inputs of the task {data.task.name}; drop it")


def _check_label_smoothing(config: TrainConfig, artifact: Artifact, data: Dataset, context: RunContext) -> None:
    if data.task.label_smoothing is None:
        raise MicronetError(f"--label-smoothing has no effect on the loss of the task {data.task.name}; drop it")


def _check_start_size(size: int, model: nn.Module, data: Dataset) -> None:
    if size and data.task.name != CLASSIFICATION:
        raise MicronetError(f"--start-size only applies to classification, not to {data.task.name}; drop it")
    full = data.image_height
    if size and size >= full:
        raise MicronetError(
            f"--start-size is {size}, but the images are only {full} pixels high; use a smaller size, or drop it"
        )
    if size:
        try:
            check_model_fits(model, data, size)
        except MicronetError as error:
            raise MicronetError(f"--start-size {size}: {error}; use a larger size, or drop it") from error


def _check_amp(config: TrainConfig, artifact: Artifact, data: Dataset, context: RunContext) -> None:
    if config.amp is None:
        if not distributed.from_rank_zero(lambda: _gains_from_bf16(artifact.model, context.device)):
            raise MicronetError("bf16 would not make this network faster here")
    elif config.amp == "bf16" and context.device.type == "cpu" and not context.resume:
        # A training that began in bf16 continues in it, even on a busy machine.
        distributed.from_rank_zero(lambda: _check_bf16(config, artifact.model, data))


def _gains_from_bf16(model: nn.Module, device: torch.device) -> bool:
    """Return True if bfloat16 is known to make a network's training steps faster on a device."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and has_bf16() and suits_bf16(model)


def suits_bf16(model: nn.Module) -> bool:
    """Return True if bfloat16 is known to make a network's training steps faster on a CPU that computes in it.

    It is if at least half of the layers are convolutions, and none is depthwise: torch's bf16 kernels for those are
    slow, and linear layers and attention gain only if they are wide (BENCHMARKS.md, "Mixed precision").
    """
    layers = [module for module in model.modules() if isinstance(module, (*ops.CONVOLUTIONS, nn.Linear))]
    convolutions = [layer for layer in layers if not isinstance(layer, nn.Linear)]
    depthwise = any(layer.groups == layer.in_channels > 1 for layer in convolutions)
    return 2 * len(convolutions) >= len(layers) > 0 and not depthwise


def _check_bf16(config: TrainConfig, model: nn.Module, data: Dataset) -> None:
    """Raise MicronetError if bfloat16 does not make this network's steps faster on this CPU."""
    if not has_bf16():
        raise MicronetError(
            "--amp bf16: this processor has neither AVX-512 BF16 nor AMX, so bf16 would be emulated; drop --amp bf16"
        )
    off, bf16 = step_seconds(config, model, data)
    if bf16 >= off:
        raise MicronetError(
            f"--amp bf16 is not faster here: a step of {TIMED_IMAGES} images takes {1000 * bf16:.1f} ms, compared "
            f"with {1000 * off:.1f} ms without it; drop it"
        )


def step_seconds(config: TrainConfig, model: nn.Module, data: Dataset) -> tuple[float, float]:
    """Return the CPU times, forward and backward, of a training step of a copy of a network, without and with bf16.

    Each is the least of several, taken in turns, so that other processes hardly change their order.
    """
    trial = copy_model(model)
    prepare_training(trial, data, torch.device("cpu"))
    trial.train()
    optimizer = OPTIMIZERS["sgd"](trial.parameters())  # it takes no step
    steps = [
        TrainStep(trial, optimizer, replace(config, amp=amp, ema=0.0), torch.device("cpu"), task=data.task)
        for amp in ("off", "bf16")
    ]
    given, targets = next(iter(data.referenced(eval_batches(data.validation, data.spec, TIMED_IMAGES))))
    inputs = place_inputs(given, torch.device("cpu"), memory_format(trial))
    least = [math.inf, math.inf]
    with torch.random.fork_rng():
        for turn in range(1 + TIMED_STEPS):
            for which, step in enumerate(steps):
                start = time.process_time()
                step._backward(inputs, targets, share=1.0, more_follow=True)
                if turn:
                    least[which] = min(least[which], time.process_time() - start)
    return least[0], least[1]
