"""Draw figures into files with matplotlib, an optional dependency."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from micronet.errors import MicronetError


def draw(path: Path, size: tuple[float, float], fill: Callable[[Any], None]) -> None:
    """Write a figure to a file.

    Args:
        path: The file; its suffix chooses the format.
        size: Width and height in inches.
        fill: Draws into the figure's axes.

    Raises:
        MicronetError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MicronetError("--plot needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=size, layout="constrained")
    fill(figure.subplots())
    try:
        figure.savefig(path)
    except (ValueError, OSError) as error:
        raise MicronetError(f"--plot {path}: {error}") from error
