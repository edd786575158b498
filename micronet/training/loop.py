"""The only training loop: epochs over a data set, the best kept by validation, checkpoints after each and within.

What a step does follows from (seed, epoch, step) and the checkpoint alone, so a training that was killed and resumed
ends bit-identical to one that was not.
"""

import hashlib
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from micronet.artifact.artifact import Artifact
from micronet.core import ranks
from micronet.core.files import file_hash
from micronet.core.machine import memory_mib, tune_allocator
from micronet.core.progress import Progress, Silent
from micronet.data.batches import batch_sizes, eval_batches, train_batches
from micronet.data.dataset import Dataset
from micronet.errors import FailedError, MicronetError, StoppedError
from micronet.evaluation.accuracy import check_scores, evaluating
from micronet.models.device import memory_format
from micronet.training import distributed
from micronet.training.checkpoint import Checkpoint, TrainState
from micronet.training.config import TrainConfig, learning_rate
from micronet.training.distillation import Teacher, load_teacher
from micronet.training.log import MetricsLog
from micronet.training.step import NotFiniteError, TrainStep, make_optimizer
from micronet.training.validation import evaluate_distributed

Observe = Callable[[nn.Module], AbstractContextManager[Any]]


@dataclass(frozen=True)
class TrainHooks:
    """What a stage adds to plain training.

    ``observe``: a context that each epoch's steps run in. ``penalty``: called between backward and the optimizer's
    step to add to the gradients. ``keep``: the epoch whose weights stay, the best on the validation images or the last.
    ``config``: the stage's own settings.
    """

    observe: Observe = nullcontext
    penalty: Callable[[], None] | None = None
    keep: Literal["best", "last"] = "best"
    config: dict[str, Any] = field(default_factory=dict)


NO_HOOKS = TrainHooks()


@dataclass(frozen=True)
class RunContext:
    """Where and how a stage that trains runs, apart from what it computes.

    ``output``: the artifact's path; the checkpoint and the log lie beside it. ``deadline``: in seconds of
    time.monotonic. ``compiled``: by torch.compile.
    """

    output: Path
    device: torch.device
    seed: int = 1
    resume: bool = False
    force: bool = False
    progress: Progress = Silent()  # noqa: RUF009  # it has no state
    deadline: float = math.inf
    checkpoint_minutes: float = 10.0
    compiled: bool = False


@dataclass
class Trainer:
    """Fits a model to a data set.

    ``identity``: what must be unchanged for a resume. ``teacher``: a network to learn from as well.
    """

    model: nn.Module
    data: Dataset
    config: TrainConfig
    run: RunContext
    identity: dict[str, Any]
    procedure: TrainHooks = NO_HOOKS
    teacher: Teacher | None = None

    def fit(self) -> dict[str, Any]:
        """Train, leave the kept epoch's weights in the model and return that epoch's numbers.

        Raises MicronetError for data that do not fit the model or an unclaimed checkpoint, FailedError when the loss
        is no longer finite, StoppedError at the deadline; the last checkpoint stays in all cases.
        """
        tune_allocator()
        self.model.to(self.run.device).to(memory_format=memory_format(self.model))
        check_model_fits(self.model, self.data)
        if not self.config.epochs:
            return {}
        self._check_config()
        optimizer = make_optimizer(self.model, self.config)
        settings = {name: value for name, value in self.config.to_json().items() if name != "patience"}
        checkpoint = Checkpoint.beside(self.run.output, {**settings, "seed": self.run.seed, **self.identity})
        reached = distributed.from_rank_zero(
            lambda: checkpoint.begin(self.model, optimizer, resume=self.run.resume, force=self.run.force)
        )
        distributed.broadcast_state(self.model, optimizer)
        self._say_where(reached)
        step = TrainStep(
            self.model, optimizer, self.config, self.run.device, self.run.compiled, self.teacher, self.procedure.penalty
        )
        if reached.scaler:  # torch refuses the empty state of a new training
            step.scaler.load_state_dict(reached.scaler)
        self._train(step, checkpoint, reached)
        if distributed.is_rank_zero():
            checkpoint.load_best(self.model)  # its file stays until the artifact is saved
        distributed.broadcast_state(self.model)
        return self._kept(reached.rows)

    def _check_config(self) -> None:
        batch, processes = min(self.config.batch_size, len(self.data.train)), distributed.world_size()
        if batch < processes:
            raise MicronetError(f"batches of {batch} images cannot be shared by {processes} processes; use fewer")
        if self.config.patience is not None and self.procedure.keep == "last":
            raise MicronetError("--patience waits for a better epoch, and here the last is kept; leave it out")

    def _say_where(self, reached: TrainState) -> None:
        if reached.step:
            where = f"resuming in epoch {reached.epoch} of {self.config.epochs}, after step {reached.step}"
        elif reached.rows:
            where = f"resuming after epoch {len(reached.rows)} of {self.config.epochs}"
        elif self.run.resume:
            where = "no interrupted training found; starting from the beginning"
        else:
            return
        self.run.progress.line(where)

    def _train(self, step: TrainStep, checkpoint: Checkpoint, reached: TrainState) -> None:
        """Train the epochs that are left."""
        log = MetricsLog(self.run.output, reached.rows)
        while reached.epoch <= self.config.epochs and not self._out_of_patience(reached.rows):
            start = time.perf_counter()
            row = {"epoch": reached.epoch, **self._train_epoch(step, checkpoint, reached)}
            row |= self._validate()
            row |= {"seconds": round(time.perf_counter() - start, 3), "memory_mib": memory_mib()}
            reached.end_epoch(row)
            reached.scaler = step.scaler.state_dict()
            if distributed.is_rank_zero():
                checkpoint.save(self.model, step.optimizer, reached, best=self._kept(reached.rows) is row)
            log.append(row)
            self.run.progress.line(_summary(reached.rows, self.config.epochs))
            if reached.epoch <= self.config.epochs and self._is_late():
                raise self._stopped(reached)
        log.close()

    def _out_of_patience(self, rows: list[dict[str, Any]]) -> bool:
        if self.config.patience is None or not rows:
            return False
        since = len(rows) - self._kept(rows)["epoch"]
        if since < self.config.patience:
            return False
        self.run.progress.line(f"no better validation for {since} epochs (--patience)")
        return True

    def _kept(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the epoch whose weights stay; of equal ones the first."""
        return rows[-1] if self.procedure.keep == "last" else max(rows, key=_rank)

    def _train_epoch(self, step: TrainStep, checkpoint: Checkpoint, reached: TrainState) -> dict[str, float]:
        """Take the steps of an epoch that are left, writing checkpoints on the way."""
        config, epoch = self.config, reached.epoch
        sizes = batch_sizes(len(self.data.train), config.batch_size)
        steps = math.ceil(len(sizes) / config.accumulate)
        batches = train_batches(
            self.data.train, self.data.spec, config.batch_size,
            seed=self.run.seed, epoch=epoch, start=reached.step * config.accumulate, device=self.run.device,
        )  # fmt: skip
        self.model.train()
        before, started = reached.images, time.perf_counter()
        with self.procedure.observe(self.model):
            while reached.step < steps:
                torch.manual_seed(_dropout_seed(self.run.seed, epoch, reached.step))
                rate = learning_rate(config, (epoch - 1) * steps + reached.step, config.epochs * steps)
                for group in step.optimizer.param_groups:
                    group["lr"] = rate
                part = sizes[reached.step * config.accumulate :][: config.accumulate]
                try:
                    loss = step(islice(batches, len(part)), part)
                except NotFiniteError as error:
                    raise self._diverged(error, reached) from None
                reached.add_step(loss, sum(part))
                speed = (reached.images - before) / (time.perf_counter() - started)
                numbers = {"loss": loss, "images_per_s": speed, "memory_mib": memory_mib()}
                self.run.progress.step(f"epoch {epoch}/{config.epochs}", reached.step, steps, **numbers)
                if reached.step < steps:
                    self._save_if_due(step, checkpoint, reached)
        speed = (reached.images - before) / (time.perf_counter() - started)
        return {"loss": reached.loss / reached.images, "images_per_s": round(speed, 1)}

    def _save_if_due(self, step: TrainStep, checkpoint: Checkpoint, reached: TrainState) -> None:
        """Write a checkpoint where the last one is old; at the deadline write one and raise StoppedError."""
        late = self._is_late()
        if distributed.is_rank_zero() and (late or checkpoint.age_s >= 60 * self.run.checkpoint_minutes):
            reached.scaler = step.scaler.state_dict()
            checkpoint.save(self.model, step.optimizer, reached)
        if late:
            raise self._stopped(reached)

    def _is_late(self) -> bool:
        deadline = self.run.deadline
        return deadline < math.inf and distributed.from_rank_zero(lambda: time.monotonic() >= deadline)

    def _stopped(self, reached: TrainState) -> StoppedError:
        return StoppedError(
            f"--max-time is over in epoch {reached.epoch} of {self.config.epochs}, after step {reached.step}; "
            "the same command with --resume goes on"
        )

    def _diverged(self, error: NotFiniteError, reached: TrainState) -> FailedError:
        layer = f", first in layer {error.layer}" if error.layer else ""
        return FailedError(
            f"{error} in epoch {reached.epoch}, step {reached.step + 1}{layer}; "
            f"lower --lr (it is {self.config.peak_lr:g}) and start again with --force"
        )

    def _validate(self) -> dict[str, float]:
        with evaluating(self.model) as predict:
            accuracy, loss = evaluate_distributed(predict, self.data.validation, self.data.spec)
        return {"validation_accuracy": accuracy, "validation_loss": loss}


def check_model_fits(model: nn.Module, data: Dataset) -> None:
    """Raise MicronetError where one validation image does not go through the model to a score a class."""
    images, _ = next(eval_batches(data.validation, data.spec, batch_size=1))
    with evaluating(model) as predict:
        check_scores(predict, images, len(data.spec.classes or []))


def fit_artifact(
    artifact: Artifact,
    data: Dataset,
    config: TrainConfig,
    run: RunContext,
    procedure: TrainHooks = NO_HOOKS,
) -> Artifact:
    """Train an artifact's model in place and return the artifact with its data and the metrics of the epoch kept.

    Its history is as it was: the caller knows which stage this is. Raises what ``Trainer.fit`` raises.
    """
    teacher = load_teacher(config, artifact, data.spec, run.device)
    identity = {
        "model": artifact.spec.to_json(),
        "history": [record.to_json() for record in artifact.history],
        "data": data.spec.to_json(),
        "images": hashlib.sha256(data.train.labels.numpy().tobytes()).hexdigest(),  # which are drawn follows from them
        "stage": {"keep": procedure.keep, **procedure.config},
        "teacher": None if config.distill is None else file_hash(config.distill),
    }
    kept = Trainer(artifact.model, data, config, run, identity, procedure, teacher).fit()

    images = len(data.test)
    own = images // distributed.world_size()  # or a batch more
    with evaluating(artifact.model) as predict:
        accuracy, loss = evaluate_distributed(
            predict, data.test, data.spec, lambda done: run.progress.step("testing", min(done, own), own)
        )
    metrics = {
        **{name: value for name, value in kept.items() if name.startswith(("epoch", "validation"))},
        "test_accuracy": accuracy,
        "test_loss": loss,
        "test_images": images,
    }
    return replace(artifact, metrics=metrics, data=data.spec.to_json(), seed=run.seed)


def _rank(row: dict[str, Any]) -> tuple[float, float]:
    """Order epochs: by validation accuracy, then by validation loss."""
    return row["validation_accuracy"], -row["validation_loss"]


def _dropout_seed(seed: int, epoch: int, step: int) -> int:
    """Return a number for each step and process, so that what a step draws does not depend on those before."""
    return (((seed * 100_003 + epoch) * 1_000_003 + step) * 1_009 + ranks.rank()) % 2**63


def _summary(rows: list[dict[str, Any]], epochs: int) -> str:
    row, left = rows[-1], epochs - len(rows)
    seconds = left * row["seconds"]
    ahead = f"  {seconds / 60:.1f} min left" if seconds >= 60 else f"  {seconds:.0f} s left" if left else ""
    return (
        f"epoch {row['epoch']}/{epochs}  loss {row['loss']:.4f}  validation {row['validation_accuracy']:.2%}  "
        f"{row['images_per_s']:.0f} images/s  {row['memory_mib']} MiB{ahead}"
    )
