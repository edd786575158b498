"""Run one command line in this process, and judge how it ended."""

import os
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from micronet.cli.app import run
from tests.fuzz.watch import watched

SECONDS, MOST_WAITED = 10, 300  # of CPU time, and by the clock, on a machine that others use too
MOST_MEMORY = 2 << 30  # bytes beyond the most that the process has held before
CODES = (0, 1, 2, 3)
NOISE = re.compile(r"\[[EWF]:onnxruntime[^\n]{,80}|Traceback|Warning:[^\n]{,80}|[\x00-\x08\x0b-\x1f\x7f]")


@dataclass(frozen=True)
class Verdict:
    """How a command ended; ``faults`` is empty if it ended as it should."""

    code: int | None
    seconds: float
    faults: list[str] = field(default_factory=list)
    text: str = ""


class _HangError(BaseException):
    pass


def attempt(arguments: list[str]) -> Verdict:
    """Run a command with everything that it prints caught, even by libraries that write to the file handles."""
    faults, code, began, held = [], None, time.perf_counter(), _most_held()
    with tempfile.TemporaryFile("w+b") as sink, _redirected(sink.fileno()), watched(arguments) as seen:
        for limit in (signal.SIGALRM, signal.SIGPROF):
            signal.signal(limit, _hang)
        signal.alarm(MOST_WAITED)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            code = run(arguments)
        except _HangError:
            faults.append("hang")
        except BaseException as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            faults.append(f"traceback {type(error).__name__} at {Path(place.filename).name}:{place.lineno}")
        finally:
            signal.alarm(0)
            signal.setitimer(signal.ITIMER_PROF, 0)
        sink.seek(0)
        text = sink.read().decode("utf-8", "replace")
    seconds = time.perf_counter() - began
    if code is not None:
        errors = len(re.findall(r"^(?:error|stopped): ", text, re.MULTILINE))
        if code not in CODES or (code == 0) != (errors == 0) or errors > 1:
            faults.append(f"exit code {code} with {errors} error lines")
        if found := NOISE.search(text):
            faults.append(f"noise {found[0]!r}")
    faults += [f"executed: {event}" for event in seen[:1]]
    if _most_held() - held > MOST_MEMORY:
        faults.append("memory")
    return Verdict(code, seconds, faults, text)


def _most_held() -> int:
    """Return the most bytes of memory that this process has held at once."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _hang(*_: Any) -> None:
    raise _HangError


@contextmanager
def _redirected(handle: int) -> Iterator[None]:
    """Send both output streams of this process to a file handle."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = streams
        for number, old in zip((1, 2), kept, strict=True):
            os.dup2(old, number)
            os.close(old)
