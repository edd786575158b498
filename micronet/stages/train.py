"""The ``train`` stage: a network from scratch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from micronet.core.config import group
from micronet.stages.config import DataConfig, DistributedConfig, ModelConfig, OutputConfig
from micronet.stages.stage import Context, Outcome, Stage
from micronet.training.config import TrainConfig

if TYPE_CHECKING:
    from micronet.artifact.artifact import Artifact


@dataclass(frozen=True)
class TrainSettings:
    """The settings of ``train``."""

    model: ModelConfig = group(ModelConfig)
    data: DataConfig = group(DataConfig)
    training: TrainConfig = group(TrainConfig)
    run: DistributedConfig = group(DistributedConfig)
    output: OutputConfig = group(OutputConfig)


class Train(Stage):
    """Trains a network from scratch."""

    name = "train"
    example = "micronet train --model nin --width 0.25 --data digits --epochs 2 -o float.safetensors"
    Config = TrainSettings
    begins = True

    def run(self, artifact: "Artifact | None", config: TrainSettings, context: Context) -> Outcome:
        """Build a network that fits the data and train it."""
        from micronet.stages.fitting import fit_new, run_context, trained

        run = run_context(config.run, context, force=config.output.force)
        return trained(fit_new(config.model, config.data, config.training, run))


TRAIN = Train()
