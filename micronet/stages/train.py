"""The stages that train: ``train``, ``sparse-train`` and ``finetune``, and what every training stage shares."""

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from micronet import registry
from micronet.artifact.header import StageRecord, read_header
from micronet.core.config import flatten, group, setting
from micronet.errors import MicronetError
from micronet.pruning.config import SparsityConfig
from micronet.stages.config import DataConfig, ModelConfig, ReadSettings, RunConfig, TrainingSettings, input_file
from micronet.stages.execute import finish
from micronet.stages.quantize_defaults import stays_close
from micronet.stages.stage import BEFORE_FUSING, PRUNE_FIRST, Context, Outcome, Stage
from micronet.stages.words import introduce, noun_of, stage_after_training
from micronet.training.config import TrainConfig

if TYPE_CHECKING:
    from micronet.artifact.artifact import Artifact
    from micronet.data.dataset import Dataset
    from micronet.training.config import RunContext, TrainHooks

SPARSE = TrainConfig(preset="plain")
FINETUNING_LR = 0.005
FINETUNING = TrainConfig(epochs=4, lr=FINETUNING_LR)
LARGEST_SPARSE_FALL = 0.1  # of the main metric, relative; pruned networks do not recover from a ruined one


@dataclass(frozen=True)
class Train(TrainingSettings, Stage):
    """Trains a network from scratch."""

    name = "train"
    example = "micronet train --model nin --width 0.25 --data digits --epochs 2 -o float.safetensors"
    begins = True
    takes_module = True
    leads_to = "quantize"

    trust_code: bool = setting(False, "Allow code stored in the teacher's file (--distill) to run.")
    model: ModelConfig = group(ModelConfig)

    def check(self) -> None:
        """Refuse trust in a teacher that there is not."""
        super().check()
        if self.trust_code and self.training.distill is None:
            raise MicronetError("--trust-code has no effect without --distill; drop it")

    def run(self, context: Context) -> Outcome:
        """Build a network that fits the data, unless one was given in memory, and train it."""
        run = run_context(self, context)
        if context.source is None:
            return trained(fit_new(self.model, self.data, self.training, run))
        from micronet.stages.inputs import open_data

        self.model.check_unused()
        dataset = open_data(self.data, context.source, run.seed)
        say_start(dataset, context.source, self.training, run)
        return trained(fit_stage("train", context.source, dataset, self.training, run))


@dataclass(frozen=True)
class SparseTrain(TrainingSettings, Stage):
    """Trains with a sparsity penalty."""

    name = "sparse-train"
    details = (
        "The weights of the last epoch are saved instead of the best ones, because the penalty takes time to act. "
        "Channels that cannot be pruned, such as class scores, are not penalized. An artifact is trained at a peak "
        "learning rate of 0.005, a new network at 0.01, unless --lr is given."
    )
    example = "micronet sparse-train float.safetensors --s 1e-3 --epochs 2 -o sparse.safetensors"
    ending = "-sparse.safetensors"
    leads_to = "prune"
    cannot_follow = {"quantize": PRUNE_FIRST, "bn-fuse": BEFORE_FUSING}  # noqa: RUF012  # never changed

    artifact: Path | None = input_file("A float artifact; without one, a new network is trained.", None)
    trust_code: bool = setting(False, "Allow code stored in the artifact to run.")
    sparsity: SparsityConfig = group(SparsityConfig)
    model: ModelConfig = group(ModelConfig)
    training: TrainConfig = group(SPARSE)

    def check(self) -> None:
        """Refuse a description of a new network beside an artifact, and a penalty that the optimizer would undo."""
        super().check()
        criterion = self.sparsity.criterion
        if criterion in ("l1", "l2") and self.training.chosen("optimizer") == "muon":
            raise MicronetError(
                f"--criterion {criterion} penalizes weights, but Muon keeps their norms constant; add "
                "--optimizer adam, or use --criterion bn-scale"
            )
        if self.artifact is not None:
            self.model.check_unused()

    def records(self) -> list[str]:
        """Return this stage, after a training of no epochs if the network is new."""
        return ["sparse-train"] if self.artifact is not None else ["train", "sparse-train"]

    def run(self, context: Context) -> Outcome:
        """Train with the criterion's penalty."""
        from micronet.models.device import as_inputs
        from micronet.pruning.groups import find_groups
        from micronet.stages.inputs import example_input, new_fitting, open_data
        from micronet.training.config import TrainHooks

        run, training = run_context(self, context), self.training
        if context.source is None:
            fresh, dataset = new_fitting(self.model, self.data, run.seed)
            artifact = fresh.after(StageRecord("train", {"epochs": 0}))
        else:
            artifact, dataset = context.source, open_data(self.data, context.source, run.seed)
            training = _for_trained(training, run)
        say_start(dataset, artifact, training, run)
        example = example_input(replace(artifact, data=dataset.spec.to_json()))
        criterion = registry.resolve(registry.CRITERIA, self.sparsity.criterion, "criterion")
        model = artifact.model.to(run.device)
        channels = find_groups(model, as_inputs(model, example))
        penalty = criterion.penalty(channels.network.model, channels, self.sparsity.s)
        hooks = TrainHooks(
            penalty=penalty, keep="last", config=self.sparsity.to_json(),
            largest_fall=math.inf if context.source is None else LARGEST_SPARSE_FALL, way_out="a smaller --s",
        )  # fmt: skip
        return trained(fit_stage("sparse-train", artifact, dataset, training, run, hooks))


@dataclass(frozen=True)
class Finetune(TrainingSettings, ReadSettings, Stage):
    """Trains an artifact further."""

    name = "finetune"
    details = "Quantized artifacts continue with QAT, or with QAFT if their ranges are frozen."
    example = "micronet finetune pruned.safetensors --epochs 2 --distill float.safetensors -o finetuned.safetensors"
    ending = "-finetuned.safetensors"
    cannot_follow = {"bn-fuse": BEFORE_FUSING}  # noqa: RUF012  # never changed

    training: TrainConfig = group(FINETUNING)

    def next_stage(self, product: Any) -> str:
        """Return ``quantize`` or, for a quantized network, what its batch norms need."""
        return stage_after_training(product)

    def run(self, context: Context) -> Outcome:
        """Train the artifact with its quantizers, if it has any, observing or frozen as they are."""
        from micronet.quantization.calibrate import frozen, is_frozen, observing
        from micronet.stages.inputs import open_data
        from micronet.training.config import TrainHooks

        artifact = context.artifact
        run = run_context(self, context)
        dataset = open_data(self.data, artifact, run.seed)
        is_qaft = is_frozen(artifact.model) or any(record.config.get("mode") == "qaft" for record in artifact.history)
        hooks = TrainHooks(frozen if is_qaft else observing, as_evaluated=stays_close(artifact.history))
        say_start(dataset, artifact, self.training, run)
        return trained(fit_stage("finetune", artifact, dataset, self.training, run, hooks))


def _for_trained(training: TrainConfig, run: "RunContext") -> TrainConfig:
    """Return the settings of sparse training with the default learning rate of a network that is trained already.

    A run that an earlier version began, at the default of new networks, is resumed as it began.
    """
    from micronet.training.checkpoint import Checkpoint
    from micronet.training.config import DEFAULT_LR
    from micronet.training.distributed import from_rank_zero

    if training.lr is not None:
        return training
    recorded = from_rank_zero(Checkpoint.beside(run.output, {}).recorded) if run.resume else {}
    return replace(training, lr=DEFAULT_LR if recorded.get("lr") == DEFAULT_LR else FINETUNING_LR)


def run_context(stage: Any, context: Context) -> "RunContext":
    """Return where and how the training of a stage runs."""
    import torch

    from micronet.artifact.artifact import weights_hash
    from micronet.models.device import pick_device
    from micronet.training.config import RunContext
    from micronet.training.distributed import local_device

    run: RunConfig = stage.execution
    device = pick_device(local_device(run.device))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return RunContext(
        output=context.output,
        device=device,
        seed=run.seed,
        resume=run.resume,
        force=stage.output.force,
        progress=context.progress,
        deadline=math.inf if run.max_time is None else time.monotonic() + 60 * run.max_time,
        checkpoint_minutes=run.checkpoint_minutes,
        initial_weights="" if context.source is None else weights_hash(context.source.model),
        compiled=run.compile,
        skip_test=getattr(run, "skip_test", False),  # prune has no such setting
        artifacts=context.memory.artifacts,
        tracker=run.log,
        trust_code=flatten(stage).get("trust_code", False),
    )


def fit_new(model: ModelConfig, data: DataConfig, training: TrainConfig, run: "RunContext") -> "Artifact":
    """Build a network that fits the data and train it."""
    from micronet.stages.inputs import new_fitting

    artifact, dataset = new_fitting(model, data, run.seed)
    say_start(dataset, artifact, training, run)
    return fit_stage("train", artifact, dataset, training, run)


def say_start(dataset: "Dataset", artifact: "Artifact", training: TrainConfig, run: "RunContext") -> None:
    """Report the data, the network and the device.

    Before that, raises MicronetError if the teacher or the test data cannot be read: afterwards, a training is lost.
    """
    if training.distill is not None and training.distill not in run.artifacts:
        read_header(training.distill)
    if not run.skip_test:
        dataset.test  # noqa: B018  # files are listed, not decoded
    run.progress.line(introduce(dataset, artifact, run.device))


def fit_stage(
    stage: str,
    artifact: "Artifact",
    dataset: "Dataset",
    training: TrainConfig,
    run: "RunContext",
    hooks: "TrainHooks | None" = None,
) -> "Artifact":
    """Train an artifact and record that as a stage."""
    from micronet.training.config import NO_HOOKS
    from micronet.training.loop import fit_artifact
    from micronet.training.preset import settle

    hooks, training = hooks or NO_HOOKS, settle(training, artifact, dataset, run)
    fitted = fit_artifact(artifact, dataset, training, run, hooks)
    return fitted.after(StageRecord(stage, {**hooks.config, **training.to_json()}))


def keep(artifact: "Artifact", path: Path) -> None:
    """Save what a training made, then remove the checkpoint that could have recreated it."""
    from micronet.artifact.artifact import save

    finish(lambda: save(artifact, path), path)


def trained(artifact: "Artifact") -> Outcome:
    """Return the outcome of a stage whose summary is the artifact's metrics."""
    return Outcome(artifact, {**artifact.metrics, "noun": noun_of(artifact)})
