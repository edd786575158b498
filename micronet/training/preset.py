"""Fitting a training's settings to the network, the data and the machine before it begins.

What the user chose must have an effect, or is refused with the reason. What a preset chose is left out instead.
"""

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from micronet.artifact.artifact import Artifact
from micronet.core.machine import has_bf16
from micronet.data.batches import eval_batches, mirrors
from micronet.data.dataset import Dataset
from micronet.errors import MicronetError
from micronet.models.device import memory_format
from micronet.models.modes import copy_model
from micronet.training import distributed
from micronet.training.checkpoint import Checkpoint
from micronet.training.config import PRESETS, RunContext, TrainConfig
from micronet.training.loop import check_model_fits
from micronet.training.step import TrainStep
from micronet.training.whitening import whitened_layer

STEPS_PER_EPOCH = 100  # of the preset fast, if its batches are neither smaller nor larger than allowed
SMALLEST_BATCH, LARGEST_BATCH = 32, 128
TIMED_IMAGES, TIMED_STEPS = 32, 3


def settle(
    config: TrainConfig,
    artifact: Artifact,
    data: Dataset,
    context: RunContext,
    recorded: Mapping[str, Any] | None = None,
) -> TrainConfig:
    """Return a config whose every setting is chosen and has an effect.

    Args:
        config: The user's settings.
        artifact: The network, as it is before the training.
        data: The data set.
        context: Where the training runs; a checkpoint there is resumed in its precision.
        recorded: The settings of a finished training, whose precision is taken, in place of the checkpoint's.

    Raises:
        MicronetError: A setting that the user chose has no effect on this network or data, or is slower here.
    """
    if not config.epochs:
        return config
    if recorded is None:
        recorded = distributed.from_rank_zero(Checkpoint.beside(context.output, {}).recorded) if context.resume else {}
    settled = {name: config.chosen(name) for name in PRESETS["plain"]}
    if config.batch_size is None and config.preset == "fast":
        settled["batch_size"] = batch_size(len(data.train))
    if recorded and config.amp is None:
        settled["amp"] = recorded.get("amp", "off")
    for name, check in (("flip", _check_flip), ("whiten", _check_whiten), ("amp", _check_amp)):
        plain = PRESETS["plain"][name]
        try:
            if settled[name] != plain and not (name == "amp" and recorded):
                check(replace(config, **settled), artifact, data, context)
        except MicronetError:
            if getattr(config, name) is not None:
                raise
            settled[name] = plain
    _check_start_size(settled["start_size"], artifact.model, data)
    fitting = replace(config, **settled)
    if config.preset == "fast":
        context.progress.line(f"{config.preset}: {_describe(fitting)}")
    return fitting


def batch_size(images: int) -> int:
    """Return the images per batch of the preset fast: a power of two, for about ``STEPS_PER_EPOCH`` steps."""
    size = SMALLEST_BATCH
    while size < LARGEST_BATCH and images >= 1.5 * size * STEPS_PER_EPOCH:
        size *= 2
    return size


def _describe(config: TrainConfig) -> str:
    values = {name: config.chosen(name) for name in PRESETS["plain"]}
    return ", ".join(f"{name} {value}" for name, value in values.items() if value != PRESETS["plain"][name])


def _check_flip(config: TrainConfig, artifact: Artifact, data: Dataset, context: RunContext) -> None:
    if not mirrors(data.spec):
        raise MicronetError(
            "--flip alternating has no effect, because images of this data set are never flipped; drop it"
        )


def _check_whiten(config: TrainConfig, artifact: Artifact, data: Dataset, context: RunContext) -> None:
    if artifact.history:
        raise MicronetError("--whiten on only applies to new networks, but this network is already trained; drop it")
    whitened_layer(artifact.model)


def _check_start_size(size: int, model: nn.Module, data: Dataset) -> None:
    full = data.train.image_shape[1]
    if size >= full:
        raise MicronetError(
            f"--start-size is {size}, but the images are only {full} pixels wide; use a smaller size, or drop it"
        )
    if size:
        try:
            check_model_fits(model, data, size)
        except MicronetError as error:
            raise MicronetError(f"--start-size {size}: {error}; use a larger size, or drop it") from error


def _check_amp(config: TrainConfig, artifact: Artifact, data: Dataset, context: RunContext) -> None:
    if config.amp == "bf16" and context.device.type == "cpu":
        distributed.from_rank_zero(lambda: _check_bf16(config, artifact.model, data))


def _check_bf16(config: TrainConfig, model: nn.Module, data: Dataset) -> None:
    """Raise MicronetError if bfloat16 does not make this network's steps faster on this CPU."""
    if not has_bf16():
        raise MicronetError(
            "--amp bf16: this processor has neither AVX-512 BF16 nor AMX, so bf16 would be emulated; drop --amp bf16"
        )
    off, bf16 = (step_seconds(replace(config, amp=amp), model, data) for amp in ("off", "bf16"))
    if bf16 >= off:
        raise MicronetError(
            f"--amp bf16 is not faster here: a step of {TIMED_IMAGES} images takes {1000 * bf16:.1f} ms, compared "
            f"with {1000 * off:.1f} ms without it; drop it"
        )


def step_seconds(config: TrainConfig, model: nn.Module, data: Dataset) -> float:
    """Return the least CPU time, forward and backward, of a training step of a copy of a network."""
    trial = copy_model(model).to(memory_format=memory_format(model)).train()
    config = replace(config, ema=0.0)
    step = TrainStep(trial, torch.optim.SGD(trial.parameters()), config, torch.device("cpu"))  # it takes no step
    batch = next(eval_batches(data.validation, data.spec, TIMED_IMAGES))
    times = []
    with torch.random.fork_rng():
        for _ in range(1 + TIMED_STEPS):
            start = time.process_time()
            step._backward(*batch, share=1.0, more_follow=True)
            times.append(time.process_time() - start)
    return min(times[1:])
