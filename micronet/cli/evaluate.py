"""``micronet evaluate``: accuracy, loss and latency of one network."""

from pathlib import Path
from typing import Annotated

import typer

from micronet.cli import console
from micronet.cli.options import DataOptions, ReportOptions, with_configs
from micronet.runtimes.config import RuntimeOptions

EXAMPLE = "micronet evaluate int8.onnx --json"


@with_configs
def run(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An artifact, or an .onnx, .packed or .engine file.")],
    *,
    data: DataOptions,
    runtime: RuntimeOptions,
    report: ReportOptions,
) -> None:
    """Measure accuracy and loss on the test images, and latency at 1 and 64 images."""
    from micronet.cli.measure import measure

    rows = measure([file], data, runtime, report)
    row = rows[0]
    if report.json:
        kept = {key: value for key, value in row.to_json().items() if key not in ("drop", "agreement", "compression")}
        console.print_json(kept)
        return
    for label, value in (
        ("accuracy", f"{row.accuracy:.2%} of {row.images:,} images"),
        ("loss", f"{row.loss:.4f}"),
        ("latency, 1 image", f"{row.latency_ms:.2f} ms, p95 {row.latency_p95_ms:.2f} ms"),
        ("latency, 64 images", f"{row.latency_batch64_ms:.2f} ms, p95 {row.latency_batch64_p95_ms:.2f} ms"),
        ("file", f"{row.size_bytes:,} bytes"),
        ("parameters", f"{row.params:,}"),
        ("runtime", row.runtime),
    ):
        console.print_line(f"{label:<20}{value}")
