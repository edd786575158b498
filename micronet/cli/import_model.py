"""``micronet import``: any network becomes an artifact."""

from pathlib import Path
from typing import Annotated

import typer

from micronet.cli import console
from micronet.cli.options import DataOptions, ModelOptions, OutputOptions, parse_json_object, with_configs

EXAMPLE = "micronet import --model torchvision:resnet18 --model-args '{\"num_classes\": 10}' -o resnet18.safetensors"


@with_configs
def run(
    weights: Annotated[
        Path | None,
        typer.Option(help="Tensors to fill it with (.safetensors, .pth, .pt); default: its initial weights."),
    ] = None,
    mean: Annotated[
        str | None, typer.Option(help="Per-channel mean of the pixels it expects, 0..1, as 0.485,0.456,0.406.")
    ] = None,
    std: Annotated[str | None, typer.Option(help="Per-channel standard deviation, likewise.")] = None,
    *,
    model: ModelOptions,
    data: DataOptions,
    output: OutputOptions,
) -> None:
    """Make an artifact of any network: torchvision's, your own factory's, or the original micronet's checkpoint."""
    from dataclasses import replace

    from micronet.artifact.artifact import save
    from micronet.artifact.foreign import import_model, preprocessing
    from micronet.cli import stages
    from micronet.core.files import check_output_path
    from micronet.data.load import load_data

    path = output.output or model.file
    check_output_path(path, output.force)
    artifact = import_model(model.name, _arguments(model), weights)
    spec = preprocessing(model.name, mean, std)
    if data.data is not None:
        spec = load_data(data.data, image_size=data.image_size, limit=data.limit, like=spec).spec
    artifact = replace(artifact, data=spec.to_json())
    save(artifact, path)
    stages.report(artifact, path, output)
    if not output.json and not output.quiet and data.data is None:
        console.print_line("it remembers no data set yet: give --data to the next command")


def _arguments(model: ModelOptions) -> dict[str, object]:
    given = parse_json_object(model.model_args, "model_args")
    return given if model.width is None else {"width": model.width, **given}
