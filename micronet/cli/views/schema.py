"""The result of ``schema``."""

from typing import Any

from micronet.cli import console


def show(summary: dict[str, Any], config: Any) -> None:
    """Print the schema as JSON."""
    console.print_json(summary)
