"""Drawings into files, by matplotlib where it is installed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from micronet.errors import MicronetError


def draw(path: Path, size: tuple[float, float], fill: Callable[[Any], None]) -> None:
    """Write a figure of some size, inches; ``fill`` draws into its axes.

    Raises MicronetError where matplotlib is not there, or the file's kind is not known.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MicronetError("--plot needs matplotlib: pip install 'micronet[plot]'") from None
    figure = Figure(figsize=size, layout="constrained")
    fill(figure.subplots())
    try:
        figure.savefig(path)
    except (ValueError, OSError) as error:
        raise MicronetError(f"--plot {path}: {error}") from error
