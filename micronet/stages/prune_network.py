"""The work of ``prune``: gradients for the criterion, steps with training between them, what was gained."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from micronet.artifact.artifact import Artifact, load
from micronet.data.batches import eval_batches
from micronet.data.dataset import Dataset, DataSpec
from micronet.data.split import random_subset
from micronet.errors import MicronetError, count
from micronet.evaluation.accuracy import evaluate, evaluating
from micronet.evaluation.cost import count_macs
from micronet.graph.graph_module import uncalled
from micronet.models.device import Example, memory_format, place_inputs
from micronet.models.modes import copy_model, eval_mode
from micronet.pruning.config import PruneConfig
from micronet.pruning.plan import PrunePlan
from micronet.pruning.prune import Pruner, prune_model
from micronet.pruning.sensitivity import GroupSensitivity, measure_sensitivity
from micronet.stages.inputs import open_data, reference_of, validation_accuracy
from micronet.stages.prune import Prune
from micronet.stages.prune_latency import in_onnxruntime, time_predictors
from micronet.stages.train import fit_stage, keep
from micronet.tasks.agreement import energy
from micronet.tasks.task import outputs_of
from micronet.training.config import RunContext
from micronet.training.fits import check_model_fits
from micronet.training.gradients import add_gradients
from micronet.training.preset import settle

GRADIENT_BATCHES = 8
BATCH = 64


@dataclass(frozen=True)
class Pruning:
    """A network to prune, with what it takes to judge it.

    Attributes:
        artifact: The network.
        settings: The stage.
        example: An input batch, or a tuple of several inputs.
        run: Where and how training between steps runs.
    """

    artifact: Artifact
    settings: Prune
    example: Example
    run: RunContext

    @property
    def has_data(self) -> bool:
        """Whether a data set is named, or remembered by the artifact."""
        spec = DataSpec.from_json(self.artifact.data)
        return self.settings.data.data is not None or spec.image_size is not None or spec.inputs is not None

    @cached_property
    def data(self) -> Dataset:
        """The data set; MicronetError if it is not known."""
        if not self.has_data:
            raise MicronetError("the artifact does not record a data set; specify one with --data")
        return open_data(self.settings.data, self.artifact, self.run.seed)

    def once(self) -> tuple[Artifact, PrunePlan]:
        """Cut the network's channels once; return it, and what was decided."""
        model, config = self._with_gradients(), self._config
        needs_latency = config.target is not None and config.target[0] == "target_latency"
        cost = _relative_latency(self.artifact, self.example) if needs_latency else None
        pruned, record, plan = prune_model(model, config, self.example, cost, progress=self.run.progress)
        for network in (model, pruned):
            network.zero_grad(set_to_none=True)
        return self.artifact.after(record, model=pruned, metrics={}), plan

    def in_steps(self) -> Artifact:
        """Prune a little and train, several times; each step's artifact stays beside the output for a resume."""
        settings, steps, artifact = self.settings, self.settings.steps, self.artifact
        part = replace(self, settings=replace(settings, pruning=settings.pruning.share_per_step(steps)))
        for step in range(1, steps + 1):
            path = self.run.output.with_name(f"{self.run.output.stem}-step{step}.safetensors")
            before = replace(part, artifact=artifact)
            if self.run.resume and path.exists():
                artifact = before._finished_step(path)
                continue
            pruned, plan = before.once()
            self.run.progress.line(f"step {step} of {steps}: removed {plan.cut:,} of {count(plan.total, 'channel')}")
            artifact = fit_stage("finetune", pruned, self.data, settings.training, replace(self.run, output=path))
            keep(replace(artifact, metrics={**artifact.metrics, "initial_weights": self.run.initial_weights}), path)
        return artifact

    def sensitivity(self) -> list[GroupSensitivity]:
        """Cut each group of channels alone and measure the accuracy lost on the validation images."""
        pruner = Pruner(self._with_gradients(), self._config, self.example, self.run.progress)
        accuracy = validation_accuracy(self.data, copy_model(self.artifact.model))
        return measure_sensitivity(pruner, accuracy, self.run.progress)

    def summary(self, pruned: Artifact, plan: PrunePlan, source: Path | None) -> dict[str, Any]:
        """Return the plan and the network's size before and after, with its main metric if measured."""
        before, after = self.sizes(pruned, source).values()
        if self.settings.measure:
            measure = self._quality()
            before |= measure(self.artifact)
            after |= measure(pruned)
        groups = [
            {"layers": group.layers, "before": group.before, "after": group.after, "note": group.note}
            for group in plan.groups.values()
        ]
        counts = {"asked": plan.requested, "cut": plan.cut, "total": plan.total}
        return {**counts, "before": before, "after": after, "groups": groups, "not_pruned": _not_pruned(plan)}

    def sizes(self, pruned: Artifact, source: Path | None) -> dict[str, dict[str, Any]]:
        """Return the numbers of parameters and multiply-accumulates before and after, and the input file's bytes."""
        before, after = (self._sizes(artifact.model) for artifact in (self.artifact, pruned))
        if source is not None and source.is_file():
            before["size_bytes"] = source.stat().st_size
        return {"before": before, "after": after}

    @property
    def _config(self) -> PruneConfig:
        """How to prune; ``auto`` ranks channels by what a sparse training pushed toward zero."""
        config, history = self.settings.pruning, self.artifact.history
        trained: list[Any] = [record.config["criterion"] for record in history if record.stage == "sparse-train"]
        return replace(config, criterion=trained[-1]) if config.criterion == "auto" and trained else config

    def _with_gradients(self) -> nn.Module:
        """Return the network; for the criterion taylor with the gradients of some training images."""
        if self.settings.pruning.criterion == "taylor":
            if self.data.is_labelled:
                check_model_fits(self.artifact.model, self.data)
            accumulate_gradients(self.artifact.model, self.data, self.run)
        return self.artifact.model

    def _finished_step(self, path: Path) -> Artifact:
        """Return a step that an earlier run finished; MicronetError if it was made with other settings."""
        code, before = self.settings.code, self.artifact.history
        made = load(path, code.model, trust_code=code.trust_code)
        step = [record.config for record in made.history[len(before) :]]
        for config in step:
            if "distill" in config:
                config["distill"] = Path(config["distill"]).name  # the whole path in earlier files
        training = settle(self.settings.training, self.artifact, self.data, self.run, step[-1] if step else {})
        expected = [self._config.to_json(), training.to_json()]
        same = made.history[: len(before)] == before and step == expected
        same &= made.metrics.pop("initial_weights", self.run.initial_weights) == self.run.initial_weights
        if not same or (made.data, made.seed) != (self.data.spec.to_json(), self.run.seed):
            raise MicronetError(
                f"{path} was created with different settings; use the same settings, or remove it and drop --resume"
            )
        return made

    def _sizes(self, model: nn.Module) -> dict[str, Any]:
        """Return the number of parameters, and of multiply-accumulates for a batch of one."""
        whole = self.example
        sample = whole[:1] if isinstance(whole, Tensor) else tuple(each[:1] for each in whole)
        params = sum(parameter.numel() for parameter in model.parameters())
        self.run.progress.step("counting MACs", 0, 1)
        return {"params": params, "macs": count_macs(model, sample)}

    def _quality(self) -> Callable[[Artifact], dict[str, float]]:
        """Return a function that measures a network's main metric on the test data; it is empty without data."""
        if not self.has_data:
            return lambda _: {}
        data = self.data.with_reference(reference_of(self.artifact.model))

        def measure(artifact: Artifact) -> dict[str, float]:
            with evaluating(artifact.model.to(self.run.device)) as predict:
                batches = data.referenced(eval_batches(data.test, data.spec))
                metrics = evaluate(predict, batches, task=data.task).metrics
            artifact.model.cpu()
            return {f"test_{data.task.main}": metrics[data.task.main]}

        return measure


def _not_pruned(plan: PrunePlan) -> list[str]:
    """Return the recurrent layers, and the modules that the forward never calls, with their parameters."""
    network = plan.channels.network
    modules = dict(network.given.named_modules())
    unused = uncalled(network.given, network.model, network.graphs)
    recurrent = (name for name, module in modules.items() if isinstance(module, nn.RNNBase) and name not in unused)
    found = [f"{name} ({type(modules[name]).__name__})" for name in recurrent]
    for name in unused:
        params = sum(parameter.numel() for parameter in modules[name].parameters())
        found.append(f"{name} (never called; {count(params, 'parameter')})")
    return found


def accumulate_gradients(model: nn.Module, dataset: Dataset, run: RunContext) -> None:
    """Add up the loss's gradients over some training images in a network's parameters.

    Without labels, the loss is the outputs' energy.
    """
    model.to(run.device).zero_grad(set_to_none=True)
    check_model_fits(model, dataset)  # and find out the memory format that it takes
    images, layout = random_subset(dataset.train, GRADIENT_BATCHES * BATCH, run.seed), memory_format(model)
    with eval_mode(model):
        for batch in eval_batches(images, dataset.spec, BATCH):
            given, targets = tree_map_only(Tensor, lambda x: x.to(run.device), batch)
            outputs = outputs_of(model(*place_inputs(given, run.device, layout)))
            has_labels = dataset.is_labelled and not dataset.task.needs_reference
            loss = dataset.task.loss(outputs, targets) if has_labels else energy(outputs)
            add_gradients(loss)


def _relative_latency(artifact: Artifact, example: Example) -> Callable[[nn.Module], float]:
    """Return a function from a network to its latency for one sample, as a share of the artifact's at that moment."""
    whole = in_onnxruntime(artifact, example)

    def share(model: nn.Module) -> float:
        own = in_onnxruntime(replace(artifact, model=model), example)
        before, after = time_predictors([whole, own], example)
        return after / before

    return share
