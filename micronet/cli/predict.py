"""``micronet predict``: what a network sees in image files."""

from pathlib import Path
from typing import Annotated

import typer

from micronet.cli import console
from micronet.cli.options import ReportOptions, with_configs
from micronet.runtimes.config import RuntimeOptions

EXAMPLE = "micronet predict int8.onnx photo.png --top 3"


@with_configs
def run(
    file: Annotated[Path, typer.Argument(metavar="NETWORK", help="An artifact, or an .onnx, .packed or .engine file.")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files, or folders of them.")],
    top: Annotated[int, typer.Option(min=1, help="Classes to name for each image.")] = 5,
    *,
    runtime: RuntimeOptions,
    report: ReportOptions,
) -> None:
    """Name the likeliest classes of images, with the network's probability of each."""
    from micronet.evaluation.predict import predict
    from micronet.runtimes.network import open_network

    network = open_network(file, runtime)
    with console.progress(report.quiet) as progress:
        predictions = predict(network, images, str(file), progress)
    if report.json:
        console.print_json(
            [
                {"image": str(seen.image), "classes": [ranked._asdict() for ranked in seen.classes[:top]]}
                for seen in predictions
            ]
        )
        return
    for seen in predictions:
        likely = "  ".join(f"{ranked.name} {ranked.score:.1%}" for ranked in seen.classes[:top])
        console.print_line(f"{seen.image}  {likely}")
