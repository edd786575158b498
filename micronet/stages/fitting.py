"""What the stages that train share. Imports torch, so import it late."""

import math
import time
from pathlib import Path

import torch

from micronet.artifact.artifact import Artifact, save
from micronet.artifact.history import StageRecord
from micronet.data.dataset import Dataset
from micronet.models.device import pick_device
from micronet.stages.config import DataConfig, ModelConfig, RunConfig
from micronet.stages.inputs import new_artifact, open_data
from micronet.stages.output import finish
from micronet.stages.stage import Context, Outcome
from micronet.training import distributed
from micronet.training.config import TrainConfig
from micronet.training.context import NO_HOOKS, RunContext, TrainHooks
from micronet.training.loop import fit_artifact


def run_context(run: RunConfig, context: Context, *, force: bool = False) -> RunContext:
    """Return where and how a training runs."""
    device = pick_device(distributed.local_device(run.device))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return RunContext(
        output=context.output,
        device=device,
        seed=run.seed,
        resume=run.resume,
        force=force,
        progress=context.progress,
        deadline=math.inf if run.max_time is None else time.monotonic() + 60 * run.max_time,
        checkpoint_minutes=run.checkpoint_minutes,
        compiled=run.compile,
    )


def fit_stage(
    stage: str,
    artifact: Artifact,
    dataset: Dataset,
    training: TrainConfig,
    run: RunContext,
    hooks: TrainHooks = NO_HOOKS,
) -> Artifact:
    """Train an artifact and record that as a stage."""
    fitted = fit_artifact(artifact, dataset, training, run, hooks)
    return fitted.after(StageRecord(stage, {**hooks.config, **training.to_json()}))


def fit_new(model: ModelConfig, data: DataConfig, training: TrainConfig, run: RunContext) -> Artifact:
    """Build a network that fits the data and train it."""
    dataset = open_data(data, seed=run.seed)
    return fit_stage("train", new_artifact(model, dataset.spec, run.seed), dataset, training, run)


def keep(artifact: Artifact, path: Path) -> None:
    """Save what a training made, then remove the checkpoint that could have recreated it."""
    finish(lambda: save(artifact, path), path)


def trained(artifact: Artifact, **more: object) -> Outcome:
    """Return the outcome of a stage whose summary is the artifact's metrics."""
    return Outcome(artifact, {**artifact.metrics, **more})
