"""The result of ``predict``."""

from typing import Any

from micronet.cli import console


def show(summary: list[dict[str, Any]], config: Any) -> None:
    """Print one line per image."""
    for row in summary:
        classes = "  ".join(f"{ranked['name']} {ranked['score']:.1%}" for ranked in row["classes"])
        console.print_line(f"{row['image']}  {classes}")
