"""Printing: results on standard output, progress and errors on standard error."""

import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from micronet.cli.process import discard_output
from micronet.core import ranks
from micronet.core.progress import Progress, Silent
from micronet.errors import FailedError, MicronetError

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def plain(text: str) -> str:
    """Escape control characters, which a file may hold and a terminal would obey, and what it cannot show."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.translate(_CONTROLS).encode(encoding, "backslashreplace").decode(encoding)


class Bar:
    """Progress as a bar with the remaining time on a terminal, as plain lines elsewhere."""

    def __init__(self, bars: "RichProgress | None" = None) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def step(self, label: str, done: int, total: int, **numbers: float) -> None:
        """Move the bar called ``label``; a new label replaces the previous bar."""
        if self._bars is None:
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
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = (
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


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
    """Print a table with numbers aligned right."""
    from rich.table import Table

    wide = Console(width=max(out.width, 160)) if not out.is_terminal else out
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        numeric = all(row[index][:1] in "+-0123456789?" for row in rows if row[index]) and bool(rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(plain(cell)) for cell in row))
    with _to_standard_output():
        wide.print(table)


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
