"""The ``finetune`` stage: more training, whatever was done to the network before."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from micronet.core.config import group
from micronet.runtimes.config import CodeOptions
from micronet.stages.config import DataConfig, DistributedConfig, OutputConfig, input_file
from micronet.stages.stage import BEFORE_FUSING, Context, Outcome, Stage
from micronet.training.config import TrainConfig

if TYPE_CHECKING:
    from micronet.artifact.artifact import Artifact

FINETUNING = TrainConfig(epochs=4, lr=0.005)


@dataclass(frozen=True)
class FinetuneSettings:
    """The settings of ``finetune``."""

    artifact: Path = input_file()
    training: TrainConfig = group(FINETUNING)
    data: DataConfig = group(DataConfig)
    code: CodeOptions = group(CodeOptions)
    run: DistributedConfig = group(DistributedConfig)
    output: OutputConfig = group(OutputConfig)


class Finetune(Stage):
    """Trains an artifact further."""

    name = "finetune"
    details = "A quantized artifact continues as QAT, or as QAFT if its ranges are frozen."
    example = "micronet finetune pruned.safetensors --epochs 2 --distill float.safetensors -o finetuned.safetensors"
    Config = FinetuneSettings
    ending = "-finetuned.safetensors"
    cannot_follow = {"bn-fuse": BEFORE_FUSING}  # noqa: RUF012  # never changed

    def run(self, artifact: "Artifact | None", config: FinetuneSettings, context: Context) -> Outcome:
        """Train the artifact with its quantizers, if it has any, observing or frozen as they are."""
        from micronet.quantization.calibrate import frozen, is_frozen, observing
        from micronet.stages.fitting import fit_stage, run_context, trained
        from micronet.stages.inputs import open_data
        from micronet.training.context import TrainHooks

        assert artifact is not None
        run = run_context(config.run, context, force=config.output.force)
        dataset = open_data(config.data, artifact, run.seed)
        is_qaft = is_frozen(artifact.model) or any(record.config.get("mode") == "qaft" for record in artifact.history)
        hooks = TrainHooks(frozen if is_qaft else observing)
        return trained(fit_stage("finetune", artifact, dataset, config.training, run, hooks))


FINETUNE = Finetune()
