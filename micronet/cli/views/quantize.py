"""The result of ``quantize``: an artifact, an ONNX file or a plan."""

from typing import Any

from micronet.cli import console
from micronet.cli.views import written


def show(summary: Any, config: Any) -> None:
    """Print the file with its accuracy and the layers left float, or the plan."""
    if isinstance(summary, list):
        console.print_table(("layer", "weight", "input", "note"), [tuple(row.values()) for row in summary])
        return
    if "float_test_accuracy" in summary:
        now, before = summary["test_accuracy"], summary["float_test_accuracy"]
        console.print_line(f"{written.line(summary)}  test accuracy {now:.2%}, float file {before:.2%}")
        return
    written.show(summary, config)
    for name, why in summary["left_float"].items():
        console.print_line(f"left float: {name} ({why})")
