"""``micronet sparse-train``: training that shows which channels a network can do without."""

from pathlib import Path
from typing import Annotated

import typer

from micronet.cli import console
from micronet.cli.options import DataOptions, ModelOptions, OutputOptions, SpreadConfig, default_name, with_configs
from micronet.pruning.config import SparsityConfig
from micronet.runtimes.config import CodeOptions
from micronet.training.config import TrainConfig

EXAMPLE = "micronet sparse-train float.safetensors --s 1e-3 --epochs 2 -o sparse.safetensors"


@with_configs
def run(
    artifact: Annotated[
        Path | None,
        typer.Argument(metavar="[ARTIFACT]", help="A float artifact; without one the network begins untrained."),
    ] = None,
    trust_code: Annotated[bool, typer.Option("--trust-code", help="Run the code recorded in an artifact.")] = False,
    *,
    sparsity: SparsityConfig,
    training: TrainConfig,
    model: ModelOptions,
    data: DataOptions,
    running: SpreadConfig,
    output: OutputOptions,
) -> None:
    """Train with the penalty of a pruning criterion, so that channels the network can do without approach zero.

    The weights of the last epoch are kept, not of the best: the penalty needs its time. What cannot be cut, like the
    class scores, is left alone.
    """
    import torch

    from micronet import registry
    from micronet.artifact.history import StageRecord
    from micronet.cli import stages
    from micronet.pruning.prune import channel_flow
    from micronet.training.loop import TrainHooks

    path = output.output or default_name(artifact or model.file, "-sparse.safetensors")
    stages.check_output(path, output, running)
    with console.progress(output.quiet) as progress:
        job = stages.make_run(path, running, output, progress)
        if artifact is None:
            dataset = stages.open_data(data, seed=job.seed)
            opened = stages.new_artifact(model, dataset.spec, job.seed).after(StageRecord("train", {"epochs": 0}))
        else:
            model.check_unused()
            opened = stages.open_artifact(artifact, CodeOptions(model.model, trust_code), "sparse-train")
            dataset = stages.open_data(data, opened, job.seed)
        size = dataset.spec.image_size or 0
        example = torch.rand(2, dataset.spec.channels or 0, size, size)
        criterion = registry.resolve(registry.CRITERIA, sparsity.criterion, "criterion")
        pushed = criterion.penalty(opened.model, channel_flow(opened.model, example), sparsity.s)
        procedure = TrainHooks(penalty=pushed, keep="last", config=sparsity.to_json())
        sparse = stages.fit_stage("sparse-train", opened, dataset, training, job, procedure)
    stages.keep(sparse, path)
    stages.report(sparse, path, output)
