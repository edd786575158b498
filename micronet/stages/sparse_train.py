"""The ``sparse-train`` stage: training that shows which channels a network can do without."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from micronet import registry
from micronet.core.config import group, setting
from micronet.pruning.config import SparsityConfig
from micronet.stages.config import DataConfig, DistributedConfig, ModelConfig, OutputConfig, input_file
from micronet.stages.stage import BEFORE_FUSING, PRUNE_FIRST, Context, Outcome, Stage
from micronet.training.config import TrainConfig

if TYPE_CHECKING:
    from micronet.artifact.artifact import Artifact


@dataclass(frozen=True)
class SparseTrainSettings:
    """The settings of ``sparse-train``."""

    artifact: Path | None = input_file("A float artifact; without one, a new network is trained.", None)
    trust_code: bool = setting(False, "Run the code recorded in the artifact.")
    sparsity: SparsityConfig = group(SparsityConfig)
    training: TrainConfig = group(TrainConfig)
    model: ModelConfig = group(ModelConfig)
    data: DataConfig = group(DataConfig)
    run: DistributedConfig = group(DistributedConfig)
    output: OutputConfig = group(OutputConfig)


class SparseTrain(Stage):
    """Trains with a sparsity penalty."""

    name = "sparse-train"
    details = (
        "The weights of the last epoch are kept, not those of the best: the penalty takes time to act. Channels that "
        "cannot be cut, such as class scores, are left alone."
    )
    example = "micronet sparse-train float.safetensors --s 1e-3 --epochs 2 -o sparse.safetensors"
    Config = SparseTrainSettings
    ending = "-sparse.safetensors"
    cannot_follow = {"quantize": PRUNE_FIRST, "bn-fuse": BEFORE_FUSING}  # noqa: RUF012  # never changed

    def check(self, config: SparseTrainSettings) -> None:
        """Refuse a description of a new network beside an artifact."""
        if config.artifact is not None:
            config.model.check_unused()

    def records(self, config: Any) -> list[str]:
        """Return this stage, after a training of no epochs if the network is new."""
        return ["sparse-train"] if config.artifact is not None else ["train", "sparse-train"]

    def run(self, artifact: "Artifact | None", config: SparseTrainSettings, context: Context) -> Outcome:
        """Train with the criterion's penalty."""
        import torch

        from micronet.artifact.history import StageRecord
        from micronet.pruning.groups import find_groups
        from micronet.stages.fitting import fit_stage, run_context, trained
        from micronet.stages.inputs import new_artifact, open_data
        from micronet.training.context import TrainHooks

        run = run_context(config.run, context, force=config.output.force)
        dataset = open_data(config.data, artifact, run.seed)
        if artifact is None:
            fresh = new_artifact(config.model, dataset.spec, run.seed)
            artifact = fresh.after(StageRecord("train", {"epochs": 0}))
        size = dataset.spec.image_size or 0
        example = torch.rand(2, dataset.spec.channels or 0, size, size)
        criterion = registry.resolve(registry.CRITERIA, config.sparsity.criterion, "criterion")
        model = artifact.model.to(run.device)
        penalty = criterion.penalty(model, find_groups(model, example.to(run.device)), config.sparsity.s)
        hooks = TrainHooks(penalty=penalty, keep="last", config=config.sparsity.to_json())
        return trained(fit_stage("sparse-train", artifact, dataset, config.training, run, hooks))


SPARSE_TRAIN = SparseTrain()
