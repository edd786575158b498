"""The result of ``trt-build``."""

from typing import Any

from micronet.cli import console
from micronet.cli.views import written


def show(summary: dict[str, Any], config: Any) -> None:
    """Print the engine, its precision and the data types that its layers compute in."""
    counts = ", ".join(f"{count} in {kind}" for kind, count in summary["multiplies_in"].items())
    console.print_line(
        f"{written.line(summary)}  {summary['backend']} {summary['version']}, {summary['precision']}; "
        f"matrix and convolution layers: {counts or 'none named in the log'}"
    )
