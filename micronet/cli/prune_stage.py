"""The prune command's work: gradients, steps with training between, what a group matters, what was gained."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from micronet.artifact.artifact import Artifact
from micronet.cli import stages
from micronet.data.batches import eval_batches
from micronet.data.dataset import Dataset
from micronet.data.split import random_subset
from micronet.errors import MicronetError
from micronet.evaluation.accuracy import evaluate, evaluating
from micronet.evaluation.latency import latencies
from micronet.evaluation.network import Predictor
from micronet.evaluation.plot import draw
from micronet.models.device import memory_format
from micronet.onnx.export import to_onnx
from micronet.pruning.config import PruneConfig
from micronet.pruning.plan import Plan
from micronet.pruning.prune import Pruner, prune_model
from micronet.pruning.sensitivity import GroupSensitivity, measure_sensitivity
from micronet.runtimes.config import CodeOptions, RuntimeOptions
from micronet.runtimes.onnxruntime import session_predictor
from micronet.training.config import TrainConfig
from micronet.training.loop import RunContext

GRADIENT_BATCHES = 8
BATCH = 64


@dataclass(frozen=True)
class Task:
    """A network to prune: its artifact, two images of the shape it takes, how to open its data, how to run its code."""

    artifact: Artifact
    example: Tensor
    open_data: Callable[[], Dataset] | None
    code: CodeOptions

    @cached_property
    def data(self) -> Dataset:
        """The data. Raises MicronetError where none are known."""
        if self.open_data is None:
            raise MicronetError("no data set is remembered; name one with --data")
        return self.open_data()


def prune(task: Task, config: PruneConfig, seed: int) -> tuple[Artifact, Plan]:
    """Cut a network's channels once."""
    model = task.artifact.model
    if config.criterion == "taylor":
        _accumulate(model, task.data, seed)
    cost = None
    if config.target is not None and config.target[0] == "target_latency":
        cost = _Latency(task)
    pruned, record, plan = prune_model(model, config, task.example, cost)
    model.zero_grad(set_to_none=True)
    pruned.zero_grad(set_to_none=True)
    return task.artifact.after(record, model=pruned, metrics={}), plan


def prune_in_steps(task: Task, config: PruneConfig, steps: int, training: TrainConfig, run: RunContext) -> Artifact:
    """Prune a little and train, several times; each step's artifact stays beside the output, for a resume."""
    part = config.share_per_step(steps)
    artifact = task.artifact
    for step in range(1, steps + 1):
        path = run.output.with_name(f"{run.output.stem}-step{step}.safetensors")
        if run.resume and path.exists():
            artifact = _made_before(path, replace(task, artifact=artifact), part, training, run.seed)
            continue
        pruned, plan = prune(replace(task, artifact=artifact), part, run.seed)
        run.progress.line(f"step {step} of {steps}: cut {plan.cut:,} of {plan.total:,} channels")
        artifact = stages.fit_stage("finetune", pruned, task.data, training, replace(run, output=path))
        stages.keep(artifact, path)
    return artifact


def _made_before(path: Path, task: Task, config: PruneConfig, training: TrainConfig, seed: int) -> Artifact:
    """Return an earlier run's step. Raises MicronetError where it is not this run's."""
    made = stages.open_artifact(path, task.code)
    before = task.artifact.history
    step = [record.config for record in made.history[len(before) :]]
    same = made.history[: len(before)] == before and step == [config.to_json(), training.to_json()]
    if not same or (made.data, made.seed) != (task.data.spec.to_json(), seed):
        raise MicronetError(f"{path} was made with other settings; give those, or remove it and leave --resume out")
    return made


def sensitivity(task: Task, config: PruneConfig, run: RunContext) -> list[GroupSensitivity]:
    """Cut each group of channels alone and measure on the validation images."""
    if config.criterion == "taylor":
        _accumulate(task.artifact.model, task.data, run.seed)
    pruner = Pruner(task.artifact.model, config, task.example)
    return measure_sensitivity(pruner, stages.validation_accuracy(task.data), run.progress)


def gains(before: Artifact, after: Artifact, task: Task) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return two networks' measured latency of one image in ONNX Runtime and, with data, their test accuracy."""
    image = task.example[:1].numpy()
    timed = latencies([_in_onnxruntime(artifact, task.example) for artifact in (before, after)], [image, image])
    found: list[dict[str, Any]] = [{"latency_ms": latency.p50_ms} for latency in timed]
    if task.open_data is not None:
        for shown, artifact in zip(found, (before, after), strict=True):
            with evaluating(artifact.model) as predict:
                batches = eval_batches(task.data.test, task.data.spec)
                shown["test_accuracy"] = evaluate(predict, batches).accuracy
    return found[0], found[1]


def draw_sensitivity(rows: list[GroupSensitivity], path: Path) -> None:
    """Draw a line a group, accuracy lost over the share cut."""

    def fill(axes: Any) -> None:
        for row in rows:
            lost = [0, *(100 * drop for drop in row.drops.values())]
            axes.plot([0, *row.drops], lost, marker="o", label=row.layers[0])
        axes.set_xlabel("share of the group's channels cut")
        axes.set_ylabel("accuracy lost, points")
        axes.legend(fontsize=7)

    draw(path, (8, 5), fill)


class _Latency:
    """Milliseconds of one image in ONNX Runtime, each time against the whole network's in the same minute."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._whole = _in_onnxruntime(task.artifact, task.example)

    def __call__(self, model: nn.Module) -> float:
        """Return a network's time over the whole network's."""
        own = _in_onnxruntime(replace(self._task.artifact, model=model), self._task.example)
        image = self._task.example[:1].numpy()
        whole, measured = latencies([self._whole, own], [image, image])
        return measured.p50_ms / whole.p50_ms


def _in_onnxruntime(artifact: Artifact, example: Tensor) -> Predictor:
    return session_predictor(to_onnx(artifact, example).SerializeToString(), RuntimeOptions())


def _accumulate(model: nn.Module, dataset: Dataset, seed: int) -> None:
    """Let the loss's gradients on some training images add up in a network's parameters."""
    was_training = model.training
    model.eval().zero_grad(set_to_none=True)
    images, layout = random_subset(dataset.train, GRADIENT_BATCHES * BATCH, seed), memory_format(model)
    for inputs, labels in eval_batches(images, dataset.spec, BATCH):
        loss = F.cross_entropy(model(inputs.contiguous(memory_format=layout)), labels)
        loss.backward()  # type: ignore[no-untyped-call]
    model.train(was_training)
