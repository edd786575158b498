"""A command started anew in several processes of this machine, as torchrun would, by the same part of torch."""

import logging
import os
import signal
import sys
from uuid import uuid4

import typer

from micronet.errors import FailedError

# The artifact's header records the command line, which begins with the program's name.
_PROGRAM = "import sys; sys.argv[0] = 'micronet'; from micronet.cli.app import main; main()"


def launch(words: list[str], processes: int) -> None:
    """Run a command line in so many processes and wait; ends with the exit code of the first that failed.

    Raises FailedError where one was killed.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from micronet.distributed import LAUNCHED
    from micronet.machine import usable_cores

    os.environ[LAUNCHED] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // processes)))
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # what it would say, we say in one line
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-c", _PROGRAM, *words)
    except SignalException as stop:
        raise typer.Exit(128 + stop.sigval) from None
    except ChildFailedError as error:
        killed = [rank for rank, failure in error.failures.items() if failure.exitcode < 0]
        if killed:  # the others, which lost it, may have been seen to end before it, and have left the word to us
            rank, failure = killed[0], error.failures[killed[0]]
            raise FailedError(
                f"process {rank} of {processes} was killed ({signal.Signals(-failure.exitcode).name}); "
                "the last checkpoint is whole: add --resume to go on from it"
            ) from None
        raise typer.Exit(error.get_first_failure()[1].exitcode) from None
