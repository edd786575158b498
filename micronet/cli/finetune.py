"""``micronet finetune``: more training, whatever was done to the network before."""

from micronet.cli import console
from micronet.cli.options import DataOptions, Input, OutputOptions, SpreadConfig, default_name, with_configs
from micronet.runtimes.config import CodeOptions
from micronet.training.config import TrainConfig

EXAMPLE = "micronet finetune pruned.safetensors --epochs 2 --distill float.safetensors -o finetuned.safetensors"

TUNING = TrainConfig(epochs=4, lr=0.005)


@with_configs
def run(
    artifact: Input,
    *,
    training: TrainConfig = TUNING,
    data: DataOptions,
    code: CodeOptions,
    running: SpreadConfig,
    output: OutputOptions,
) -> None:
    """Train an artifact further: float or pruned as it is, quantized with its quantizers.

    That is QAT, or QAFT where the ranges are frozen.
    """
    from micronet.cli import stages
    from micronet.quantization.calibrate import frozen, is_frozen, observing
    from micronet.training.loop import TrainHooks

    path = output.output or default_name(artifact, "-finetuned.safetensors")
    stages.check_output(path, output, running)
    with console.progress(output.quiet) as progress:
        job = stages.make_run(path, running, output, progress)
        opened = stages.open_artifact(artifact, code, "finetune")
        dataset = stages.open_data(data, opened, job.seed)
        stays = is_frozen(opened.model) or any(record.config.get("mode") == "qaft" for record in opened.history)
        procedure = TrainHooks(frozen if stays else observing)
        tuned = stages.fit_stage("finetune", opened, dataset, training, job, procedure)
    stages.keep(tuned, path)
    stages.report(tuned, path, output)
