"""The result of a command whose stages have printed theirs."""

from typing import Any


def show(summary: Any, config: Any) -> None:
    """Print nothing."""
