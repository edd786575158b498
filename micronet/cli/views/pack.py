"""The result of ``pack``."""

from typing import Any

from micronet.cli import console
from micronet.cli.views import written


def show(summary: dict[str, Any], config: Any) -> None:
    """Print the file and how closely it agrees with torch."""
    agrees = f"agrees with torch on {summary['classes']:.2%} of {summary['images']} images"
    console.print_line(f"{written.line(summary)}  {agrees}")
