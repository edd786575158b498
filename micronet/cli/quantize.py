"""``micronet quantize``: quantization-aware training of an artifact, or of the default network from nothing."""

from pathlib import Path
from typing import Annotated

import typer

from micronet.cli import console
from micronet.cli.options import (
    DataOptions,
    ModelOptions,
    OutputOptions,
    RunConfig,
    default_name,
    with_configs,
)
from micronet.quantization.config import QuantConfig
from micronet.runtime.options import CodeOptions
from micronet.training_config import TrainConfig

NAME = "quantize"
EXAMPLE = "micronet quantize float.safetensors --w-bits 8 --a-bits 8 --q-type sym --epochs 1 -o int8.safetensors"

GENTLE = TrainConfig(epochs=2, lr=0.001)  # the float network is trained already


@with_configs
def run(
    artifact: Annotated[
        Path | None,
        typer.Argument(metavar="[ARTIFACT]", help="A float artifact; without one a network is trained first."),
    ] = None,
    trust_code: Annotated[bool, typer.Option("--trust-code", help="Run the code recorded in an artifact.")] = False,
    *,
    quantization: QuantConfig,
    training: TrainConfig = GENTLE,
    model: ModelOptions,
    data: DataOptions,
    running: RunConfig,
    output: OutputOptions,
) -> None:
    """Quantize a network and train it to live with that (QAT).

    Without an artifact the network of --model is trained on --data first, with the defaults of `micronet train`.
    """
    from micronet.cli import quantize_stage, stages

    begun = artifact or model.file
    ending = f"-w{quantization.w_bits}a{quantization.a_bits}.safetensors"
    path = output.output or default_name(begun, ending)
    stages.check_output(path, output, running)
    if artifact is not None:
        model.check_unused()
    with console.progress(output.quiet) as progress:
        job = stages.make_run(path, running, output, progress)
        if artifact is None:
            floating = quantize_stage.float_artifact(model, data, job)
        else:
            floating = stages.open_artifact(artifact, CodeOptions(model.model, trust_code), NAME)
        quantized = quantize_stage.quantize(floating, quantization, training, data, job)
    stages.keep(quantized, path)
    stages.report(quantized, path, output)
    if not output.json and not output.quiet:
        for name, why in quantized.history[-1].result["left_float"].items():
            console.print_line(f"left float: {name} ({why})")
