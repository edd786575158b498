"""Draw figures into files with matplotlib, an optional dependency."""

import io
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

from micronet.core.files import write_bytes
from micronet.errors import MicronetError, visible


def draw(
    path: Path, size: tuple[float, float], fill: Callable[[Any], None], panels: tuple[int, int] | None = None
) -> None:
    """Write a figure.

    Args:
        path: The file; its suffix chooses the format.
        size: Width and height in inches.
        fill: Draws on the axes.
        panels: Rows and columns of axes, of which ``fill`` then gets an array; None for a single one.

    Raises MicronetError if matplotlib is not installed or does not know the suffix, FailedError if the disk is full.
    """
    try:
        with chdir(Path(__file__).parent):  # it reads a matplotlibrc of the working directory when it is imported
            import matplotlib
            from matplotlib.figure import Figure
    except ImportError:
        raise MicronetError("drawing needs matplotlib; run pip install matplotlib") from None
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whoever imported it before may have read one, which could have LaTeX run
        matplotlib.rcParams["svg.hashsalt"] = "micronet"  # the same picture is the same file, without its date
        figure = Figure(figsize=size, layout="constrained")
        fill(figure.subplots() if panels is None else figure.subplots(*panels, squeeze=False))
        content = io.BytesIO()
        try:
            dated: dict[str, Any] = {"metadata": {"Date": None}} if path.suffix == ".svg" else {}
            figure.savefig(content, format=path.suffix[1:] or None, **dated)
        except ValueError as error:
            raise MicronetError(f"{path} could not be written: {error}") from error
    write_bytes(path, content.getvalue())


def plain(text: str) -> str:
    """Return a text that matplotlib shows as it is: between dollars it would expect mathematics."""
    return visible(text).replace("$", r"\$")
