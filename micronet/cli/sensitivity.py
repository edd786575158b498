"""``micronet sensitivity``: which layers suffer most from few bits."""

from pathlib import Path
from typing import Annotated, Any

import typer

from micronet.cli import console
from micronet.cli.options import DataOptions, Input, ReportOptions, with_configs
from micronet.evaluation.plot import draw
from micronet.quantization.calibration_config import CalibrationConfig
from micronet.quantization.config import QuantConfig
from micronet.runtimes.config import CodeOptions

EXAMPLE = "micronet sensitivity float.safetensors --w-bits 4 --a-bits 4"

BAR = 40  # characters


@with_configs
def run(
    artifact: Input,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the layers into this .png or .svg (needs matplotlib).")
    ] = None,
    *,
    quantization: QuantConfig,
    calibration: CalibrationConfig,
    data: DataOptions,
    code: CodeOptions,
    report: ReportOptions,
) -> None:
    """Quantize one layer at a time, without training: the scores' signal-to-noise ratio, and the accuracy lost.

    Accuracy is on the validation images, which are split off the training images. The most sensitive layer is first.
    """
    from micronet.cli import quantize_stage, stages
    from micronet.core.files import check_writable
    from micronet.models.device import pick_device
    from micronet.quantization.sensitivity import Probe, measure_sensitivity

    check_writable(plot)
    opened = stages.open_artifact(artifact, code, "quantize")
    dataset = stages.open_data(data, opened)
    with console.progress(report.quiet) as progress:
        batches = list(quantize_stage.images(dataset, calibration, 1, pick_device("cpu")))
        probe = Probe(batches, calibration, stages.validation_accuracy(dataset))
        rows = measure_sensitivity(opened.model, quantization, probe, progress)
    if plot is not None:
        _draw([row.layer for row in rows], [row.sqnr_db for row in rows], plot)
    if report.json:
        console.print_json([row._asdict() for row in rows])
        return
    most = max((row.sqnr_db for row in rows if row.sqnr_db < float("inf")), default=1.0)
    table = [
        (
            row.layer,
            f"{row.sqnr_db:.1f} dB",
            "█" * max(0, round(BAR * min(1, row.sqnr_db / most))),
            f"{100 * row.drop:+.2f} pt",
        )
        for row in rows
    ]
    console.print_table(("layer", "SQNR", "", "drop alone"), table)


def _draw(names: list[str], values: list[float], path: Path) -> None:
    """Draw a bar a layer."""

    def fill(axes: Any) -> None:
        axes.barh(names[::-1], values[::-1])
        axes.set_xlabel("signal to quantization noise of the scores, dB (longer is better)")

    draw(path, (8, 0.3 * len(names) + 1.2), fill)
