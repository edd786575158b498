"""Printing: results on standard output, progress and errors on standard error."""

import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import monotonic
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from micronet.cli.process import discard_output
from micronet.core import ranks
from micronet.core.progress import Progress, Silent
from micronet.errors import FailedError, MicronetError, visible

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

WIDTH = 160  # of tables in files and pipes
QUIET_SECONDS = 30  # between the progress lines of a long step when output is not a terminal
out = Console(highlight=False, soft_wrap=True, emoji=False)  # a path such as net.py:X: would be one
err = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)


def plain(text: str) -> str:
    """Escape control characters, which a file may hold and a terminal would obey, and what it cannot show."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return visible(text, keep="\n\t").encode(encoding, "backslashreplace").decode(encoding)


class Bar:
    """Progress as a bar with the remaining time on a terminal, as plain lines elsewhere."""

    def __init__(self, bars: "RichProgress | None" = None) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}
        self._last_line = monotonic()

    def step(self, label: str, done: int, total: int, **numbers: float) -> None:
        """Move the bar called ``label``; a new label replaces the previous bar."""
        if self._bars is None:
            if monotonic() - self._last_line >= QUIET_SECONDS:
                self._last_line = monotonic()
                self.line(f"{label}: {done:,} of {total:,}")
            return
        if label not in self._tasks:
            for task in self._tasks.values():
                self._bars.remove_task(task)
            self._tasks = {label: self._bars.add_task(label, total=total, numbers="")}
        shown = "  ".join(f"{name.replace('_per_', '/')} {value:.4g}" for name, value in numbers.items())
        self._bars.update(self._tasks[label], completed=done, numbers=shown)

    def line(self, text: str) -> None:
        """Print a line that stays."""
        (self._bars.console if self._bars else err).print(plain(text), markup=False)


@contextmanager
def progress(quiet: bool) -> Iterator[Progress]:
    """Show progress inside this context; in distributed runs only rank 0 does."""
    if quiet or ranks.rank() > 0:
        yield Silent()
    elif not err.is_terminal:
        yield Bar()
    else:
        from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = (
            SpinnerColumn("line"),  # a step may take minutes in torch
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
        )
        with RichProgress(*columns, console=err, transient=True) as bars:
            yield Bar(bars)


def print_json(value: Any) -> None:
    """Print a value as JSON on standard output."""
    text = json.dumps(_without_nan(value), indent=2, allow_nan=False)
    with _to_standard_output():
        print(text)  # noqa: T201  # not rich: no wrapping, no colour


def _without_nan(value: Any) -> Any:
    """Replace NaN and infinities, which JSON cannot express, by null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return [_without_nan(item) for item in value] if isinstance(value, list | tuple) else value


def print_line(text: str) -> None:
    """Print one line of a result."""
    with _to_standard_output():
        out.print(plain(text), markup=False)


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None, optional: Sequence[str] = ()
) -> None:
    """Print a table with numbers aligned right.

    ``optional``: columns that are left out if the terminal is too narrow, the least important first.
    """
    from rich.table import Table

    wide = (
        Console(width=max(out.width, WIDTH), emoji=False) if not (out.is_terminal or "COLUMNS" in os.environ) else out
    )
    shown = [[plain(column), *(plain(row[index]) for row in rows)] for index, column in enumerate(columns)]
    left_out = _too_many(shown, optional, wide.width)
    table = Table(title=title, title_justify="left")
    shown = [cells for cells in shown if cells[0] not in left_out]
    for column, *cells in shown:
        numeric = all(cell[:1] in "+-0123456789?" for cell in cells if cell) and bool(rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in zip(*(cells[1:] for cells in shown), strict=True):
        table.add_row(*map(escape, row))
    with _to_standard_output():
        wide.print(table)
    if left_out:
        print_line(f"left out of this narrow table: {', '.join(left_out)} (--json has everything)")


def _too_many(columns: Sequence[Sequence[str]], optional: Sequence[str], width: int) -> list[str]:
    """Return the columns to leave out, of heads and cells, so that the others fit into a width."""
    from rich.cells import cell_len

    sizes = {cells[0]: max(map(cell_len, cells)) + len(" |") + 1 for cells in columns}
    left_out: list[str] = []
    for name in optional:
        if sum(sizes.values()) < width:
            break
        if sizes.pop(name, None) is not None:
            left_out.append(name)
    return left_out


@contextmanager
def _to_standard_output() -> Iterator[None]:
    """Name standard output in errors of writing to it, but let a closed pipe pass as it is."""
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise FailedError(f"standard output could not be written ({error.strerror or error})") from error


def print_error(text: str, label: str = "error") -> None:
    """Print one error line."""
    err.print(f"{label}: {plain(' '.join(text.split()))}", markup=False, style="red" if err.is_terminal else None)


def report_error(error: Exception) -> int:
    """Print an error that a user can cause as one line; return its exit code."""
    if isinstance(error, BrokenPipeError):  # the reader closed the pipe
        discard_output()
        return 1
    if isinstance(error, MicronetError):
        print_error(str(error), error.label)
        return error.exit_code
    if isinstance(error, OSError):
        print_error(f"{error.filename or 'a file or standard output'}: {error.strerror or error}")
    else:
        print_error("out of memory; reduce --batch-size, --image-size or --limit")
    return 1
