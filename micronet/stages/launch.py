"""Running a command in one process or several, which are started by the same part of torch as torchrun's."""

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from uuid import uuid4

from micronet.core import ranks
from micronet.core.machine import end_with_parent
from micronet.errors import FailedError, MicronetError


def run_in_processes(
    call: Callable[[], None], processes: int | None, program: list[str], report: Callable[[Exception], int]
) -> int:
    """Run a command in this process, as one rank of several, or in new processes; return its exit code.

    Args:
        call: The command's work.
        processes: How many processes to use; None if the command knows only one.
        program: The arguments of Python that run the command in a new process.
        report: Shows a rank's error and returns its exit code.

    Raises:
        MicronetError: A command that knows only one process is one rank of several.
        FailedError: A new process was killed.
    """
    if ranks.world_size() > 1:
        if processes is None:
            raise MicronetError("this command runs in a single process; start it without torchrun")
        return _run_rank(call, report)
    if processes is not None and processes > 1:
        return _launch(program, processes)
    call()
    return 0


def _run_rank(call: Callable[[], None], report: Callable[[Exception], int]) -> int:
    """Run a command as one rank; the first rank to fail reports its error, and all ranks return its code."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # we report a failed rendezvous once ourselves
    # Ctrl-C ends the process at once until the work begins: torch's rendezvous does not react to it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which a launcher ends the other ranks if one fails
    if ranks.is_launched():  # otherwise ranks survive a killed launcher and keep writing
        end_with_parent()
    from micronet.training import distributed

    try:
        with distributed.process_group(report):
            signal.signal(signal.SIGINT, signal.default_int_handler)
            call()
    except distributed.ProcessExitError as ended:
        return ended.exit_code
    return 0


def _launch(program: list[str], processes: int) -> int:
    """Run a Python program in new processes and wait; return the code of the first that failed, or 0."""
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
    logging.disable()  # torch logs pages about failed ranks; we print one line
    try:
        elastic_launch(config, sys.executable)(*program)
    except SignalException as stop:
        return 128 + int(stop.sigval)
    except ChildFailedError as error:
        return _exit_code({rank: failure.exitcode for rank, failure in error.failures.items()}, processes)
    finally:
        logging.disable(logging.NOTSET)
    return 0


@contextmanager
def _interrupts_waiting() -> Iterator[None]:
    """Delay Ctrl-C until the end of this context: some of torch's imports would swallow it."""
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


def _exit_code(codes: dict[int, int], processes: int) -> int:
    """Return the code of the first rank that reported an error, from failed ranks in the order in which they ended.

    Raises:
        FailedError: No rank could report: one was killed, or they lost contact.
    """
    from micronet.training.distributed import LOST, RESUME

    reported = [code for code in codes.values() if code > 0 and code != LOST]
    if reported:  # torch then kills the surviving ranks; not worth reporting
        return reported[0]
    for rank, code in codes.items():
        if code < 0:
            raise FailedError(f"process {rank} of {processes} was killed ({signal.Signals(-code).name}); {RESUME}")
    raise FailedError(f"the {processes} processes lost contact with each other; {RESUME}")
