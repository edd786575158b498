"""The work of ``prune``: gradients for the criterion, steps with training between them, what was gained."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from micronet.artifact.artifact import Artifact, load
from micronet.data.batches import eval_batches
from micronet.data.dataset import Dataset
from micronet.data.split import random_subset
from micronet.errors import MicronetError
from micronet.evaluation.accuracy import evaluate, evaluating
from micronet.evaluation.cost import count_macs
from micronet.evaluation.latency import latencies
from micronet.evaluation.network import Predictor
from micronet.models.device import memory_format
from micronet.models.inputs import Example
from micronet.models.modes import eval_mode
from micronet.onnx.export import to_onnx
from micronet.pruning.config import PruneConfig
from micronet.pruning.plan import PrunePlan
from micronet.pruning.prune import Pruner, prune_model
from micronet.pruning.sensitivity import GroupSensitivity, measure_sensitivity
from micronet.runtimes.config import CodeOptions, RuntimeOptions
from micronet.runtimes.onnxruntime import session_predictor
from micronet.stages.fitting import fit_stage, keep
from micronet.stages.inputs import example_input, image_shape, open_data, validation_accuracy
from micronet.stages.prune import PruneSettings
from micronet.stages.stage import Memory
from micronet.training.config import TrainConfig
from micronet.training.context import RunContext

GRADIENT_BATCHES = 8
BATCH = 64


@dataclass(frozen=True)
class Pruning:
    """A network to prune, with what it takes to judge it.

    Attributes:
        artifact: The network.
        config: How to prune.
        example: An input batch, or a tuple of several inputs.
        open_data: Opens the data, or None if no data are known.
        code: How the network's code may run when a step is loaded again.
        run: Where and how training between steps runs.
    """

    artifact: Artifact
    config: PruneConfig
    example: Example
    open_data: Callable[[], Dataset] | None
    code: CodeOptions
    run: RunContext

    @classmethod
    def of(cls, artifact: Artifact, config: PruneSettings, run: RunContext, memory: Memory) -> "Pruning":
        """Return the work that the stage's config describes."""
        known = config.data.data is not None or image_shape(artifact) is not None
        opener = partial(open_data, config.data, artifact, run.seed) if known else None
        example = memory.example
        if example is None:
            example = memory.batches[0] if memory.batches else example_input(artifact, config.input_shape)
        return cls(artifact, config.pruning, example, opener, config.code, run)

    @cached_property
    def data(self) -> Dataset:
        """The data; MicronetError if none are known."""
        if self.open_data is None:
            raise MicronetError("the artifact remembers no data set; name one with --data")
        return self.open_data()

    def once(self) -> tuple[Artifact, PrunePlan]:
        """Cut the network's channels once; return it, and what was decided."""
        model = self._with_gradients()
        needs_latency = self.config.target is not None and self.config.target[0] == "target_latency"
        cost = _RelativeLatency(self.artifact, _single(self.example)) if needs_latency else None
        pruned, record, plan = prune_model(model, self.config, self.example, cost)
        for network in (model, pruned):
            network.zero_grad(set_to_none=True)
        return self.artifact.after(record, model=pruned, metrics={}), plan

    def in_steps(self, steps: int, training: TrainConfig) -> Artifact:
        """Prune a little and train, several times; each step's artifact stays beside the output for a resume."""
        part = replace(self, config=self.config.share_per_step(steps))
        artifact = self.artifact
        for step in range(1, steps + 1):
            path = self.run.output.with_name(f"{self.run.output.stem}-step{step}.safetensors")
            before = replace(part, artifact=artifact)
            if self.run.resume and path.exists():
                artifact = before._finished_step(path, training)
                continue
            pruned, plan = before.once()
            self.run.progress.line(f"step {step} of {steps}: cut {plan.cut:,} of {plan.total:,} channels")
            artifact = fit_stage("finetune", pruned, self.data, training, replace(self.run, output=path))
            keep(artifact, path)
        return artifact

    def sensitivity(self) -> list[GroupSensitivity]:
        """Cut each group of channels alone and measure the accuracy lost on the validation images."""
        pruner = Pruner(self._with_gradients(), self.config, self.example)
        return measure_sensitivity(pruner, validation_accuracy(self.data), self.run.progress)

    def summary(self, pruned: Artifact, plan: PrunePlan, source: Path | None, *, measure: bool) -> dict[str, Any]:
        """Return the plan and the network's size before and after, with latency and accuracy if measured."""
        before, after = _sizes(self.artifact.model, self._sample), _sizes(pruned.model, self._sample)
        if source is not None and source.is_file():
            before["size_bytes"] = source.stat().st_size
        if measure:
            for shown, gained in zip((before, after), self._gains(pruned), strict=True):
                shown |= gained
        groups = [
            {"layers": group.layers, "before": group.before, "after": group.after, "note": group.note}
            for group in plan.groups.values()
        ]
        counts = {"asked": plan.requested, "cut": plan.cut, "total": plan.total}
        return {**counts, "before": before, "after": after, "groups": groups}

    @property
    def _sample(self) -> Example:
        """The example with a batch of one."""
        whole = self.example
        return whole[:1] if isinstance(whole, Tensor) else tuple(each[:1] for each in whole)

    def _with_gradients(self) -> nn.Module:
        """Return the network; for the criterion taylor with the gradients of some training images."""
        if self.config.criterion == "taylor":
            accumulate_gradients(self.artifact.model, self.data, self.run)
        return self.artifact.model

    def _finished_step(self, path: Path, training: TrainConfig) -> Artifact:
        """Return a step that an earlier run finished; MicronetError if it was made with other settings."""
        made = load(path, self.code.model, trust_code=self.code.trust_code)
        before = self.artifact.history
        step = [record.config for record in made.history[len(before) :]]
        same = made.history[: len(before)] == before and step == [self.config.to_json(), training.to_json()]
        if not same or (made.data, made.seed) != (self.data.spec.to_json(), self.run.seed):
            raise MicronetError(
                f"{path} was made with other settings; use the same settings, or remove it and leave --resume out"
            )
        return made

    def _gains(self, pruned: Artifact) -> list[dict[str, float]]:
        """Return the latency of one image in ONNX Runtime and, with data, the test accuracy, before and after."""
        image = _single(self._sample).numpy()
        both = (self.artifact, pruned)
        timed = latencies([_in_onnxruntime(artifact, _single(self.example)) for artifact in both], [image, image])
        found = [{"latency_ms": latency.p50_ms} for latency in timed]
        if self.open_data is not None:
            for shown, artifact in zip(found, both, strict=True):
                with evaluating(artifact.model.to(self.run.device)) as predict:
                    batches = eval_batches(self.data.test, self.data.spec)
                    shown["test_accuracy"] = evaluate(predict, batches).accuracy
                artifact.model.cpu()
        return found


def accumulate_gradients(model: nn.Module, dataset: Dataset, run: RunContext) -> None:
    """Add up the loss's gradients over some training images in a network's parameters."""
    model.to(run.device).zero_grad(set_to_none=True)
    images, layout = random_subset(dataset.train, GRADIENT_BATCHES * BATCH, run.seed), memory_format(model)
    with eval_mode(model):
        for batch in eval_batches(images, dataset.spec, BATCH):
            inputs, labels = (tensor.to(run.device) for tensor in batch)
            loss = F.cross_entropy(model(inputs.contiguous(memory_format=layout)), labels)
            loss.backward()  # type: ignore[no-untyped-call]


def _single(example: Example) -> Tensor:
    """Return the example of a network with one input."""
    if isinstance(example, Tensor):
        return example
    raise MicronetError("latency in ONNX Runtime is measured for networks with one input; leave --measure out")


class _RelativeLatency:
    """The latency of one image in ONNX Runtime, as a share of the whole network's, measured in the same minute."""

    def __init__(self, artifact: Artifact, example: Tensor) -> None:
        self._artifact, self._example = artifact, example
        self._whole = _in_onnxruntime(artifact, example)

    def __call__(self, model: nn.Module) -> float:
        """Return a network's share."""
        own = _in_onnxruntime(replace(self._artifact, model=model), self._example)
        image = self._example[:1].numpy()
        whole, measured = latencies([self._whole, own], [image, image])
        return measured.p50_ms / whole.p50_ms


def _in_onnxruntime(artifact: Artifact, example: Tensor) -> Predictor:
    return session_predictor(to_onnx(artifact, example).SerializeToString(), RuntimeOptions())


def _sizes(model: nn.Module, example: Example) -> dict[str, Any]:
    return {
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "macs": count_macs(model, example),
    }
