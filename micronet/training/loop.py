"""The training loop: epochs over a data set, the best epoch chosen on validation images, checkpoints on the way.

What a step computes depends only on (seed, epoch, step) and the checkpoint, so a training that was killed and resumed
ends bit-identical to one that was not.
"""

import math
import time
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from micronet.artifact.artifact import Artifact
from micronet.core import ranks
from micronet.core.machine import memory_mib, tune_allocator
from micronet.data.batches import batch_sizes, resized, train_batches
from micronet.data.dataset import Dataset
from micronet.errors import FailedError, MicronetError, StoppedError, count
from micronet.evaluation.accuracy import evaluating, predictor
from micronet.models.modes import train_as_evaluated
from micronet.training import distributed
from micronet.training.checkpoint import Checkpoint, TrainState
from micronet.training.config import NO_HOOKS, RunContext, TrainConfig, TrainHooks, image_size, learning_rate
from micronet.training.distillation import Teacher, load_teacher, teacher_hash
from micronet.training.fall import can_be_undone, describe_fall, is_fall
from micronet.training.fits import check_model_fits, prepare_training
from micronet.training.log import MetricsLog
from micronet.training.step import NotFiniteError, TrainStep, make_optimizer
from micronet.training.validation import evaluate_distributed, prefixed, validate
from micronet.training.whitening import whiten


@dataclass
class Trainer:
    """Trains a model on a data set.

    ``identity``: what must be the same when the training is resumed, besides config and seed.
    ``warns_of_fall``: whether to measure the model first, and to warn if the training left it worse.
    """

    model: nn.Module
    data: Dataset
    config: TrainConfig
    context: RunContext
    identity: dict[str, Any]
    hooks: TrainHooks = NO_HOOKS
    teacher: Teacher | None = None
    warns_of_fall: bool = False

    def fit(self) -> dict[str, Any]:
        """Train, leave the chosen epoch's weights in the model and return that epoch's metrics.

        Raises:
            MicronetError: The images do not fit the model, or there is a checkpoint and neither resume nor force.
            FailedError: The loss became NaN or infinite.
            StoppedError: The deadline has passed. The last checkpoint remains in all three cases.
        """
        tune_allocator()
        prepare_training(self.model, self.data, self.context.device)
        if not self.config.epochs:
            return {}
        self._check_config()
        config, context = self.config, self.context
        if config.chosen("whiten") == "on":
            whiten(self.model, self.data)
        step = TrainStep(
            self.model, make_optimizer(self.model, config), config, context.device, context.compiled, self.teacher,
            self.hooks.penalty, self.data.task,
        )  # fmt: skip
        undoes = self.warns_of_fall and can_be_undone(self.hooks, config, self.data.task)
        start = (
            {name: x.detach().cpu().clone() for name, x in self.model.state_dict().items()}
            if undoes and distributed.rank() == 0
            else None
        )
        identity = {**config.to_json(), "seed": context.seed, **self.identity}
        identity.pop("patience", None)
        checkpoint = Checkpoint.beside(context.output, identity)
        state = distributed.from_rank_zero(lambda: checkpoint.begin(step, resume=context.resume, force=context.force))
        distributed.broadcast_state(self.model, step.optimizer)
        if step.average is not None:
            distributed.broadcast_state(step.average)
        if state.scaler:  # empty before the first step, and if gradients are not scaled
            step.scaler.load_state_dict(state.scaler)
        self._report_start(state)
        if self.warns_of_fall and not (state.rows or state.step):
            state.before = validate(self.model, self.data)
        self._train(step, checkpoint, state)
        return self._finish(checkpoint, state, start)

    def _finish(self, checkpoint: Checkpoint, state: TrainState, start: dict[str, Tensor] | None) -> dict[str, Any]:
        """Give the network the chosen weights, or those from the start if it got worse, and return their row."""
        row, best = self._chosen(state.rows), checkpoint.best if distributed.rank() == 0 else {}
        if state.before and is_fall(state.before, row, self.data.task, self.hooks.largest_fall):
            undone = start is not None
            self.context.progress.line(
                describe_fall(state.before, row, self.data.task, self.config.peak_lr, self.hooks.way_out, undone=undone)
            )
            if start is not None:
                row, best = {"epoch": 0, **state.before}, start
        if distributed.rank() == 0:
            self.model.load_state_dict(best)  # the file stays until the artifact is saved
        distributed.broadcast_state(self.model)
        return row

    def _check_config(self) -> None:
        batch, world = min(self.config.chosen("batch_size"), len(self.data.train)), distributed.world_size()
        if batch < world:
            raise MicronetError(
                f"{world} processes cannot share a batch of {batch} images; use at most {batch} processes"
            )
        if self.config.patience is not None and self.hooks.keep == "last":
            raise MicronetError(
                "--patience has no effect here, because the last epoch is always saved; drop --patience"
            )

    def _report_start(self, state: TrainState) -> None:
        if self.config.preset == "fast":
            self.context.progress.line(f"fast: {self.config.unusual}; peak learning rate {self.config.peak_lr:g}")
        if state.step:
            line = f"resuming in epoch {state.epoch} of {self.config.epochs}, after step {state.step}"
        elif state.rows:
            line = f"resuming after epoch {len(state.rows)} of {self.config.epochs}"
        elif self.context.resume:
            line = "no checkpoint found; starting from the beginning"
        else:
            return
        self.context.progress.line(line)

    def _train(self, step: TrainStep, checkpoint: Checkpoint, state: TrainState) -> None:
        """Train the remaining epochs."""
        with closing(MetricsLog(self.context.output, self.context.tracker)) as log:
            if state.rows and distributed.rank() == 0:  # a kill may have come between the checkpoint and the log
                log.write(state.rows)
            while state.epoch <= self.config.epochs and not self._out_of_patience(state.rows):
                start = time.perf_counter()
                row = {"epoch": state.epoch, **self._train_epoch(step, checkpoint, state)}
                row |= validate(step.result, self.data)
                row |= {"seconds": round(time.perf_counter() - start, 3), "memory_mib": memory_mib()}
                state.end_epoch(row)
                if distributed.rank() == 0:
                    checkpoint.save(step, state, best=self._chosen(state.rows) is row)
                    log.write(state.rows)
                self.context.progress.line(_summary(state.rows, self.config.epochs, self.data))
                if state.epoch <= self.config.epochs and self._is_past_deadline():
                    raise self._stopped(state)

    def _out_of_patience(self, rows: list[dict[str, Any]]) -> bool:
        since = len(rows) - self._chosen(rows)["epoch"] if rows else 0
        if self.config.patience is None or since < self.config.patience:
            return False
        self.context.progress.line(
            f"no improvement on the validation images for {count(since, 'epoch')}; stopping (--patience)"
        )
        return True

    def _chosen(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the row of the epoch whose weights are the result; the first one of equals."""
        if self.hooks.keep == "last":
            return rows[-1]
        task, main = self.data.task, f"validation_{self.data.task.main}"
        return max(rows, key=lambda row: (task.quality({task.main: row[main]}), -row["validation_loss"]))

    def _train_epoch(self, step: TrainStep, checkpoint: Checkpoint, state: TrainState) -> dict[str, float]:
        """Take the remaining steps of the current epoch and return its training metrics."""
        config, epoch, seed = self.config, state.epoch, self.context.seed
        sizes = batch_sizes(len(self.data.train), config.chosen("batch_size"))
        steps = math.ceil(len(sizes) / config.accumulate)
        if not 0 <= state.step < steps:
            raise MicronetError(
                f"{checkpoint.path} is corrupted (it was written after step {state.step} of {steps}); add --force to "
                "start over"
            )
        batches = train_batches(
            self.data.train, self.data.spec, config.chosen("batch_size"),
            seed=seed, epoch=epoch, start=state.step * config.accumulate, device=self.context.device,
            flip=config.chosen("flip"), cutout=config.chosen("cutout"),
        )  # fmt: skip
        if self.hooks.as_evaluated and self.data.task.needs_reference:
            train_as_evaluated(self.model)
        else:
            self.model.train()
        before, started = state.images, time.perf_counter()
        with self.hooks.observe(self.model):
            while state.step < steps:
                torch.manual_seed(_step_seed(seed, epoch, state.step))
                taken, all_steps = (epoch - 1) * steps + state.step, config.epochs * steps
                rate = learning_rate(config, taken, all_steps)
                size = image_size(config, self.data.image_height, taken, all_steps)
                for group in step.optimizer.param_groups:
                    group["lr"] = rate * group.get("lr_factor", 1.0)  # checkpoints of earlier versions have none
                part = sizes[state.step * config.accumulate :][: config.accumulate]
                if self.hooks.before_step is not None:
                    self.hooks.before_step(taken / all_steps)
                try:
                    loss = step(self.data.referenced(resized(islice(batches, len(part)), size)), part)
                except NotFiniteError as error:
                    raise FailedError(
                        f"{error} in epoch {epoch}, step {state.step + 1}; use an --lr below {config.peak_lr:g} and "
                        "start over with --force"
                    ) from None
                state.add_step(loss, sum(part))
                speed = (state.images - before) / (time.perf_counter() - started)
                numbers = {"loss": loss, "images_per_s": speed, "memory_mib": memory_mib()}
                self.context.progress.step(f"epoch {epoch}/{config.epochs}", state.step, steps, **numbers)
                if state.step < steps:
                    self._save_if_due(step, checkpoint, state)
        return {"loss": state.loss / state.images, "images_per_s": round(speed, 1)}

    def _save_if_due(self, step: TrainStep, checkpoint: Checkpoint, state: TrainState) -> None:
        """Write a checkpoint if the last one is old enough; at the deadline write one and raise StoppedError."""
        if self._is_past_deadline():
            # The other ranks must not exit before it is written.
            distributed.from_rank_zero(lambda: checkpoint.save(step, state))
            raise self._stopped(state)
        due = time.monotonic() - checkpoint.saved_s >= 60 * self.context.checkpoint_minutes
        if due and distributed.rank() == 0:
            checkpoint.save(step, state)

    def _is_past_deadline(self) -> bool:
        deadline = self.context.deadline
        return deadline < math.inf and distributed.from_rank_zero(lambda: time.monotonic() >= deadline)

    def _stopped(self, state: TrainState) -> StoppedError:
        return StoppedError(
            f"--max-time reached in epoch {state.epoch} of {self.config.epochs}, after step {state.step}; run the "
            "same command with --resume to continue"
        )


def fit_artifact(
    artifact: Artifact, data: Dataset, config: TrainConfig, context: RunContext, hooks: TrainHooks = NO_HOOKS
) -> Artifact:
    """Train an artifact's model in place; return the artifact with its data and the chosen epoch's metrics.

    The history is left to the caller, who knows which stage this is. Raises what ``Trainer.fit`` raises.
    """
    teacher = load_teacher(config, artifact, data.spec, context)
    identity = {
        "model": artifact.spec.to_json(),
        "history": [record.to_json() for record in artifact.history],
        "data": data.spec.to_json(),
        "images": data.train.fingerprint(),
        "stage": {"keep": hooks.keep, **hooks.config},
        "initial_weights": context.initial_weights,
        "teacher": teacher_hash(config, context),
    }
    if teacher is not None:
        check_model_fits(teacher.model, data, name=f"--distill {config.distill}")
    if teacher is not None and data.task.needs_reference:
        data, teacher = data.with_reference(predictor(teacher.model)), None
    warns = bool(artifact.history) and hooks.largest_fall < math.inf
    row = Trainer(artifact.model, data, config, context, identity, hooks, teacher, warns).fit()
    metrics = {name: value for name, value in row.items() if name.startswith(("epoch", "validation"))}
    metrics |= {} if context.skip_test else _tested(artifact, data, context)
    return replace(artifact, metrics=metrics, data=data.spec.to_json(), seed=context.seed)


def _tested(artifact: Artifact, data: Dataset, context: RunContext) -> dict[str, Any]:
    """Return an artifact's metrics on the test data."""
    images = len(data.test)
    own = images // distributed.world_size()  # this rank's share, give or take a batch
    with evaluating(artifact.model) as predict:
        tested = evaluate_distributed(
            predict, data, data.test, lambda done: context.progress.step("testing", min(done, own), own)
        )
    return {**prefixed("test", tested), "test_images": images}


def _step_seed(seed: int, epoch: int, step: int) -> int:
    """Return a seed for each step and rank, so that dropout does not depend on the steps before."""
    return (((seed * 100_003 + epoch) * 1_000_003 + step) * 1_009 + ranks.rank()) % 2**63


def _summary(rows: list[dict[str, Any]], epochs: int, data: Dataset) -> str:
    row, left, task = rows[-1], epochs - len(rows), data.task
    seconds = left * row["seconds"]
    remaining = f"  {seconds / 60:.1f} min left" if seconds >= 60 else f"  {seconds:.0f} s left" if left else ""
    value = row[f"validation_{task.main}"]
    validation = f"{value:.2%}" if task.main == "accuracy" else f"{task.main} {value:.4f}"
    return (
        f"epoch {row['epoch']}/{epochs}  loss {row['loss']:.4f}  validation {validation}  "
        f"{row['images_per_s']:.0f} {data.train.noun}s/s  {row['memory_mib']} MiB{remaining}"
    )
