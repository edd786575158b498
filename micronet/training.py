"""The only training loop: epochs over a data set, the best kept by validation, a checkpoint after each.

What an epoch does follows from (seed, epoch) and the checkpoint alone, so a training that was killed and resumed ends
bit-identical to one that was not.
"""

import json
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from micronet.artifact import Artifact
from micronet.checkpoint import Checkpoint
from micronet.data.batches import batch_count, plain_batches, training_batches
from micronet.data.dataset import Dataset
from micronet.distillation import Teacher, open_teacher
from micronet.errors import FailedError
from micronet.evaluation import check_scores, evaluate, evaluating
from micronet.files import file_hash
from micronet.machine import tune_allocator
from micronet.progress import Progress, Silent
from micronet.training_config import TrainConfig, learning_rate

SGD_MOMENTUM = 0.9
Observe = Callable[[nn.Module], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Procedure:
    """What a stage adds to plain training.

    ``observe``: a context that each epoch's steps run in. ``penalty``: called between backward and the optimizer's
    step to add to the gradients. ``keep``: the epoch whose weights stay, the best on the validation images or the last.
    ``config``: the stage's own settings.
    """

    observe: Observe = nullcontext
    penalty: Callable[[], None] | None = None
    keep: Literal["best", "last"] = "best"
    config: dict[str, Any] = field(default_factory=dict)


PLAIN = Procedure()


@dataclass(frozen=True)
class Run:
    """Where and how a stage that trains runs, apart from what it computes.

    ``output``: the artifact's path; the checkpoint and the log lie beside it.
    """

    output: Path
    device: torch.device
    seed: int = 1
    resume: bool = False
    force: bool = False
    progress: Progress = Silent()  # noqa: RUF009  # it has no state


@dataclass
class Trainer:
    """Fits a model to a data set.

    ``identity``: what must be unchanged for a resume. ``teacher``: a network to learn from as well.
    """

    model: nn.Module
    data: Dataset
    config: TrainConfig
    run: Run
    identity: dict[str, Any]
    procedure: Procedure = PLAIN
    teacher: Teacher | None = None

    def fit(self) -> dict[str, Any]:
        """Train, leave the kept epoch's weights in the model and return that epoch's numbers.

        Raises MicronetError for data that do not fit the model or an unclaimed checkpoint, FailedError when the loss
        is no longer finite; the last checkpoint stays in both cases.
        """
        tune_allocator()
        self.model.to(self.run.device).to(memory_format=torch.channels_last)
        check_fit(self.model, self.data)
        if not self.config.epochs:
            return {}
        optimizer = self._optimizer()
        checkpoint = Checkpoint.beside(
            self.run.output, {**self.config.to_json(), "seed": self.run.seed, **self.identity}
        )
        rows = checkpoint.begin(self.model, optimizer, resume=self.run.resume, force=self.run.force)
        if rows:
            self.run.progress.line(f"resuming after epoch {len(rows)} of {self.config.epochs}")
        elif self.run.resume:
            self.run.progress.line("no interrupted training found; starting from the beginning")
        log = _Log(self.run.output, rows)
        for epoch in range(len(rows) + 1, self.config.epochs + 1):
            start = time.perf_counter()
            row = {"epoch": epoch, **self._train_epoch(optimizer, epoch), **self._validate()}
            row["seconds"] = round(time.perf_counter() - start, 3)
            rows.append(row)
            checkpoint.save(self.model, optimizer, rows, best=self._kept(rows) is row)
            log.append(row)
            self.run.progress.line(_summary(row, self.config.epochs))
        log.close()
        checkpoint.load_best(self.model)  # its file stays until the artifact is saved
        return self._kept(rows)

    def _kept(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the epoch whose weights stay; of equal ones the first."""
        return rows[-1] if self.procedure.keep == "last" else max(rows, key=_rank)

    def _train_epoch(self, optimizer: torch.optim.Optimizer, epoch: int) -> dict[str, float]:
        config, steps = self.config, batch_count(self.data.train, self.config.batch_size)
        torch.manual_seed(self.run.seed * 100_003 + epoch)  # dropout
        self.model.train()
        total, images, started = 0.0, 0, time.perf_counter()
        batches = training_batches(self.data.train, self.data.spec, config.batch_size, seed=self.run.seed, epoch=epoch)
        with self.procedure.observe(self.model):
            for step, (inputs, labels) in enumerate(batches):
                rate = learning_rate(config, (epoch - 1) * steps + step, config.epochs * steps)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                loss = self._step(optimizer, inputs.to(self.run.device), labels.to(self.run.device))
                if not math.isfinite(loss):
                    raise FailedError(
                        f"the loss became {loss} in epoch {epoch}, step {step + 1}; "
                        f"lower --lr (it is {config.peak_lr:g}) and start again with --force"
                    )
                total += loss * len(labels)
                images += len(labels)
                speed = images / (time.perf_counter() - started)
                self.run.progress.step(f"epoch {epoch}/{config.epochs}", step + 1, steps, loss=loss, images_per_s=speed)
        return {"loss": total / images, "images_per_s": round(images / (time.perf_counter() - started), 1)}

    def _step(self, optimizer: torch.optim.Optimizer, inputs: Tensor, labels: Tensor) -> float:
        scores = self.model(inputs)
        if not isinstance(scores, Tensor):  # networks with auxiliary heads give several in training; the first counts
            scores = scores[0]
        loss = F.cross_entropy(scores, labels, label_smoothing=self.config.label_smoothing)
        if self.teacher is not None:
            loss = self.teacher.blend(loss, scores, inputs)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if self.procedure.penalty is not None:
            self.procedure.penalty()
        optimizer.step()
        return float(loss.detach())

    def _validate(self) -> dict[str, float]:
        with evaluating(self.model) as predict:
            result = evaluate(predict, plain_batches(self.data.validation, self.data.spec))
        return {"validation_accuracy": result.accuracy, "validation_loss": result.loss}

    def _optimizer(self) -> torch.optim.Optimizer:
        config = self.config
        undecayed = {
            id(getattr(module, name))
            for module in self.model.modules()
            for name in getattr(module, "no_weight_decay", ())
        }
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trained if id(p) not in undecayed], "weight_decay": config.weight_decay},
            {"params": [p for p in trained if id(p) in undecayed], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        if config.optimizer == "adam":
            return torch.optim.Adam(groups, lr=config.peak_lr)
        return torch.optim.SGD(groups, lr=config.peak_lr, momentum=SGD_MOMENTUM, nesterov=True)


def check_fit(model: nn.Module, data: Dataset) -> None:
    """Raise MicronetError where one validation image does not go through the model to a score a class."""
    images, _ = next(plain_batches(data.validation, data.spec, batch_size=1))
    with evaluating(model) as predict:
        check_scores(predict, images, len(data.spec.classes or []))


def fit_artifact(
    artifact: Artifact,
    data: Dataset,
    config: TrainConfig,
    run: Run,
    procedure: Procedure = PLAIN,
) -> Artifact:
    """Train an artifact's model in place and return the artifact with its data and the metrics of the epoch kept.

    Its history is as it was: the caller knows which stage this is. Raises what ``Trainer.fit`` raises.
    """
    teacher = open_teacher(config, artifact, data.spec, run.device)
    identity = {
        "model": artifact.spec.to_json(),
        "history": [record.to_json() for record in artifact.history],
        "data": data.spec.to_json(),
        "stage": {"keep": procedure.keep, **procedure.config},
        "teacher": None if config.distill is None else file_hash(config.distill),
    }
    kept = Trainer(artifact.model, data, config, run, identity, procedure, teacher).fit()
    with evaluating(artifact.model) as predict:
        total = len(data.test)
        result = evaluate(
            predict,
            plain_batches(data.test, data.spec),
            lambda done: run.progress.step("testing", done, total),
        )
    metrics = {
        **{name: value for name, value in kept.items() if name.startswith(("epoch", "validation"))},
        "test_accuracy": result.accuracy,
        "test_loss": result.loss,
        "test_images": result.images,
    }
    return replace(artifact, metrics=metrics, data=data.spec.to_json(), seed=run.seed)


def _rank(row: dict[str, Any]) -> tuple[float, float]:
    """Order epochs: by validation accuracy, then by validation loss."""
    return row["validation_accuracy"], -row["validation_loss"]


def _summary(row: dict[str, Any], epochs: int) -> str:
    return (
        f"epoch {row['epoch']}/{epochs}  loss {row['loss']:.4f}  validation {row['validation_accuracy']:.2%}  "
        f"{row['images_per_s']:.0f} images/s"
    )


class _Log:
    """The epochs' numbers as JSON lines beside the artifact, and in TensorBoard where that is installed."""

    def __init__(self, output: Path, rows: list[dict[str, Any]]) -> None:
        self._path = output.with_name(f"{output.stem}.metrics.jsonl")
        self._path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        self._board: Any = None
        with suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(output.with_name(f"{output.stem}.tensorboard")))

    def append(self, row: dict[str, Any]) -> None:
        """Add one epoch."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self._board is not None:
            for name, value in row.items():
                self._board.add_scalar(name, value, row["epoch"])

    def close(self) -> None:
        """Flush what is buffered."""
        if self._board is not None:
            self._board.close()
