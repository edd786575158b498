"""The result of ``import``."""

from typing import Any

from micronet.cli import console
from micronet.cli.views import written


def show(summary: dict[str, Any], config: Any) -> None:
    """Print the file, and whether it remembers data."""
    written.show(summary, config)
    if summary["data"] is None:
        console.print_line("it remembers no data set yet; give --data to the next command")
