"""The process of a command: its standard streams, and how Ctrl-C and SIGTERM end it.

Imports almost nothing, so that Ctrl-C finds it ready soon after the start.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SHOW_CURSOR = b"\x1b[?25h"  # which progress bars hide


def open_streams() -> None:
    """Open the null device in place of closed standard streams; the next file opened would get what libraries print."""
    for handle in range(3):
        try:
            os.fstat(handle)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number


def end_at_once() -> None:
    """Let Ctrl-C and SIGTERM end the process from now on, with 128 and the signal's number as the exit code."""
    _handle(_end)


@contextmanager
def ending_in_order() -> Iterator[None]:
    """In this context, the first Ctrl-C or SIGTERM raises KeyboardInterrupt with its number, the next ends the process.

    The first one, too, ends it at once during an import.
    """
    before, hook = [(number, signal.getsignal(number)) for number in SIGNALS], sys.unraisablehook
    try:
        sys.unraisablehook = _end_if_lost
        _handle(_interrupt)
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)
        sys.unraisablehook = hook


def discard_output() -> None:
    """Discard what is left of standard output, which nobody reads; Python would complain at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def cause(number: int) -> str:
    """Return what a signal did, in words."""
    return "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"


def _handle(handler: Callable[[int, Any], None]) -> None:
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup and background jobs of shells ask for
            signal.signal(number, handler)


def _interrupt(number: int, frame: Any) -> None:
    end_at_once()
    if _is_importing(frame):  # libraries take an exception there for a missing module, and go on half imported
        with suppress(OSError):
            os.write(2, f"error: {cause(number)}\n".encode())
        _end(number)
    raise KeyboardInterrupt(number)


def _is_importing(frame: Any) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _end(number: int, frame: Any = None) -> None:
    with suppress(OSError):
        if os.isatty(2):
            os.write(2, _SHOW_CURSOR)
    os._exit(128 + number)


def _end_if_lost(error: Any) -> None:
    """End the process if KeyboardInterrupt was raised where Python ignores exceptions, such as ``__del__``."""
    if isinstance(error.exc_value, KeyboardInterrupt):
        _end(*error.exc_value.args[:1] or (signal.SIGINT,))
    sys.__unraisablehook__(error)
