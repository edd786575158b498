"""Draw figures into files with matplotlib, an optional dependency."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from micronet.errors import MicronetError


def draw(path: Path, size: tuple[float, float], fill: Callable[[Any], None]) -> None:
    """Write a figure of some width and height in inches; the path's suffix chooses the format, ``fill`` draws the axes.

    Raises MicronetError if matplotlib is not installed, or the file cannot be written.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise MicronetError("--plot needs matplotlib; run pip install matplotlib") from None
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a matplotlibrc in the working directory could have LaTeX run
        figure = Figure(figsize=size, layout="constrained")
        fill(figure.subplots())
        try:
            figure.savefig(path)
        except (ValueError, OSError) as error:
            raise MicronetError(f"--plot {path} could not be written: {error}") from error
