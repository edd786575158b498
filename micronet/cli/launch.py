"""How a command is carried out: in this process, as one of several, or in several that are started for it.

They are started as torchrun would, by the same part of torch.
"""

import ctypes
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from uuid import uuid4

import typer

from micronet.cli import console
from micronet.core import ranks
from micronet.errors import FailedError, MicronetError

_PR_SET_PDEATHSIG = 1  # prctl.h: the signal that comes when the parent ends


def carry_out(call: Callable[[], None], processes: int | None, words: Callable[[], list[str]]) -> None:
    """Run a command. ``processes``: how many are asked for, None where it knows only one; ``words``: its command line.

    Raises MicronetError where a command that knows only one is one of several.
    """
    if ranks.world_size() > 1:
        if processes is None:
            raise MicronetError("this command runs in one process; leave torchrun out")
        _join(call)
    elif processes is None or processes == 1:
        call()
    else:
        _launch(words(), processes)


def _join(call: Callable[[], None]) -> None:
    """Run a command as one of several processes; the one that has the first error tells it."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # we say once what it says of every try to meet the others
    # Ctrl-C ends the process at once until the work begins: torch waits for the others without hearing it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if ranks.is_launched() and sys.platform == "linux":  # or a killed launcher leaves writers behind
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    from micronet.training import distributed

    try:
        with distributed.process_group(console.tell):
            signal.signal(signal.SIGINT, signal.default_int_handler)
            call()
    except distributed.ProcessExitError as ended:
        raise typer.Exit(ended.exit_code) from None


def _launch(words: list[str], processes: int) -> None:
    """Run a command line in so many processes and wait; ends with the exit code of the first that failed.

    Raises FailedError where one was killed.
    """
    with _interrupts_waiting():
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from micronet.core.machine import usable_cores

    os.environ[ranks.LAUNCHED] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    logging.disable()  # what torch would say of the processes' ends, we say in one line
    try:
        elastic_launch(config, sys.executable)("-m", "micronet.cli.app", *words)
    except SignalException as stop:
        raise typer.Exit(128 + stop.sigval) from None
    except ChildFailedError as error:
        raise _ended({rank: failure.exitcode for rank, failure in error.failures.items()}, processes) from None
    finally:
        logging.disable(logging.NOTSET)


@contextmanager
def _interrupts_waiting() -> Iterator[None]:
    """Let Ctrl-C wait for the end of this context: some of what torch imports catches it and goes on."""
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


def _ended(codes: dict[int, int], processes: int) -> Exception:
    """Return what to raise for the exit codes of the ranks that failed, in the order in which they were seen to end."""
    from micronet.training.distributed import LOST, RESUME

    said = [code for code in codes.values() if code > 0 and code != LOST]
    if said:  # torch ends the other processes with signals then, which are nobody's news
        return typer.Exit(said[0])
    for rank, code in codes.items():
        if code < 0:
            return FailedError(f"process {rank} of {processes} was killed ({signal.Signals(-code).name}); {RESUME}")
    return FailedError(f"the {processes} processes lost one another; {RESUME}")
