"""``micronet compare``: networks side by side, everything measured."""

from pathlib import Path
from typing import Annotated

import typer

from micronet.cli import console
from micronet.cli.options import DataOptions, ReportOptions, with_configs
from micronet.errors import FailedError
from micronet.runtimes.config import RuntimeOptions

EXAMPLE = "micronet compare float.safetensors int8.safetensors int8.onnx"


@with_configs
def run(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Artifacts, .onnx, .packed and .engine files.")
    ],
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
    max_drop: Annotated[
        float | None, typer.Option(help="Exit 1 where a network is more points of accuracy below the first.")
    ] = None,
    *,
    data: DataOptions,
    runtime: RuntimeOptions,
    report: ReportOptions,
) -> None:
    """Put networks side by side: accuracy, MACs, bytes, latency, agreement. The first is what others are held to.

    Sizes are the files' bytes; times are measured here, in turns. An artifact keeps float weights to go on training
    with, so quantization shows in the size of the exported file.
    """
    from micronet.cli.measure import measure
    from micronet.core.machine import describe_machine
    from micronet.evaluation.report import COLUMNS, cells
    from micronet.evaluation.report import markdown as to_markdown

    rows = measure(files, data, runtime, report)
    if report.json:
        console.print_json({"machine": describe_machine(), "rows": [row.to_json() for row in rows]})
    elif markdown:
        console.print_line(to_markdown(rows))
    else:
        console.print_table(COLUMNS, [cells(row) for row in rows], f"{rows[0].images:,} test images")
    if max_drop is not None:
        fallen = [row for row in rows if 100 * row.drop > max_drop]
        if fallen:
            worst = max(fallen, key=lambda row: row.drop)
            raise FailedError(
                f"{worst.name} is {100 * worst.drop:.2f} points below {rows[0].name}; --max-drop allows {max_drop:g}"
            )
