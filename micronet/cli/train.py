"""``micronet train``: a network from scratch."""

from micronet.cli import console
from micronet.cli.options import DataOptions, ModelOptions, OutputOptions, SpreadConfig, with_configs
from micronet.training.config import TrainConfig

EXAMPLE = "micronet train --model nin --width 0.25 --data digits --epochs 2 -o float.safetensors"


@with_configs
def run(
    model: ModelOptions,
    data: DataOptions,
    training: TrainConfig,
    running: SpreadConfig,
    output: OutputOptions,
) -> None:
    """Train a network from scratch."""
    from micronet.cli import stages

    path = output.output or model.file
    stages.check_output(path, output, running)
    with console.progress(output.quiet) as progress:
        artifact = stages.train(model, data, training, stages.make_run(path, running, output, progress))
    stages.keep(artifact, path)
    stages.report(artifact, path, output)
