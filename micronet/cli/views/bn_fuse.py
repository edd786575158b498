"""The result of ``bn-fuse``."""

from typing import Any

from micronet.cli import console
from micronet.cli.views import written


def show(summary: dict[str, Any], config: Any) -> None:
    """Print how many batch norms were folded, and the file."""
    folded = summary["folded"]
    nothing = "no batch norm to fold; rounded the biases to the integers' scale"
    console.print_line(f"folded {folded} batch norms" if folded else nothing)
    written.show(summary, config)
